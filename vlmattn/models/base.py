"""What a family of models has to say about itself, and the registry of families."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.errors import InputError, UnsupportedError
from vlmattn.request import IMAGE, TEXT, VIDEO


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a decoder that methods may need, and which pretrained language model it looks like.

    ``backbone`` is (model type of the language model, hidden size, layers, MLP width): enough to recognise the
    language models of the published sink tables, whatever vision tower is in front of them. ``tower_layers`` counts the
    attention layers of the vision tower, ``source`` is the folder or hub name that the model came from. ``deepstack``
    counts the first decoder layers after which visual features are added to the residual stream, ``sliding`` says that
    some decoder layer sees a sliding window, ``axes`` counts the position ids of a token (3 with M-RoPE).
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    backbone: tuple[str, int, int, int]
    tower_layers: int = 0
    source: str = ""
    deepstack: int = 0
    sliding: bool = False
    axes: int = 1

    @property
    def fingerprint(self) -> str:
        """Hash of all sizes: profiles of heads, sinks and directions belong to models that share it."""
        sizes = (self.backbone, self.heads, self.kv_heads, self.head_dim)
        return hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]


class Family(ABC):
    """One family of models: where its decoder is, how its image tokens are found, what is odd about it."""

    #: ``config.model_type`` values this class serves, each with the checkpoints people know.
    model_types: ClassVar[Mapping[str, str]]

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027 (most families have nothing to refuse)
        """Raise ``UnsupportedError`` for variants of the family that would be wrong."""

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text decoder: the module that gets ``inputs_embeds`` and holds ``layers``."""
        return model.model.language_model  # type: ignore[no-any-return, union-attr]

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Decoder layers in order; each gets the residual stream as its first argument."""
        return self.decoder(model).layers  # type: ignore[return-value]

    def token_types(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """uint8 ``[batch, tokens]``: TEXT, IMAGE or VIDEO, from token ids."""
        types = torch.full_like(ids, TEXT, dtype=torch.uint8)
        types[ids == model.config.image_token_id] = IMAGE
        video = getattr(model.config, "video_token_id", None)
        if video is not None:
            types[ids == video] = VIDEO
        return types

    @abstractmethod
    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        """Tokens of each image of a forward call, in (row, token) order; None when the inputs do not tell."""

    @abstractmethod
    def pixels(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        """Rows of each pixel tensor of a call that belong to each sequence of the batch: name -> counts."""

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        """As ``pixels``, for all inputs that come image by image."""
        return self.pixels(model, inputs)

    def image_ids(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Token ids that are in a prompt for the sake of its images only."""
        found = (getattr(model.config, name, None) for name in ("image_token_id", "video_token_id"))
        return tuple(token for token in found if token is not None)

    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Position ids ``[..., batch, tokens]`` of a prompt as generate() makes them, without a trace on the model."""
        mask: Tensor = inputs["attention_mask"]
        return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)

    def rotary(self, model: PreTrainedModel) -> nn.Module:
        """The module that makes cosines and sines of positions."""
        return self.decoder(model).rotary_emb  # type: ignore[return-value]

    def logits(self, model: PreTrainedModel, hidden: Tensor, normed: bool = True) -> Tensor:
        """What the residual stream says at any depth: final norm (or none) and head."""
        if normed:
            hidden = self.decoder(model).norm(hidden)  # type: ignore[operator]
        return model.lm_head(hidden)  # type: ignore[no-any-return, operator]

    def projections(self, layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Attention module of a decoder layer, its query and its key projection (before any norm and the rotation)."""
        attn = layer.self_attn
        return attn, attn.q_proj, attn.k_proj  # type: ignore[return-value, union-attr]

    @abstractmethod
    def tower(self, model: PreTrainedModel) -> nn.Module:
        """The vision tower."""

    @abstractmethod
    def tower_attention(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Attention modules of the vision tower, in order."""

    @abstractmethod
    def summary_attention(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """How much each image's summary query attends to its tokens in one attention module of the tower.

        The summary query is the CLS token's where the tower has one, else the mean query (ours).

        Args:
            hidden: what the attention module gets.
            inputs: what the whole tower got.

        Returns:
            For each image float32 ``[heads, tokens]``, in the order of its tokens in the prompt.
        """

    @abstractmethod
    def patch_keys(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Mean key over heads of each image's tokens, before any rotation, in one attention module of the tower.

        Args, order: as for ``summary_attention``. Returns float32 ``[tokens, dim]`` for each image.
        """

    def patch_features(self, model: PreTrainedModel, output: Any) -> list[tuple[Tensor, Tensor | None]]:
        """What the tower says of each image before the projection: ``[tokens, width]``, and ``[width]`` of a CLS token.

        Empty where what the language model gets is the first that belongs to single tokens.
        """
        return []

    def project(self, model: PreTrainedModel, features: Tensor) -> Tensor:
        """What the language model gets ``[n, hidden]`` for features ``[n, width]`` of ``patch_features``."""
        return features

    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        text = model.config.get_text_config()
        heads = text.num_attention_heads
        return Anatomy(
            family=model.config.model_type,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            hidden_size=text.hidden_size,
            backbone=(text.model_type, text.hidden_size, text.num_hidden_layers, text.intermediate_size),
            tower_layers=len(self.tower_attention(model)),
            source=model.name_or_path,
            deepstack=len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ()),
            sliding=_slides(text),
            axes=3 if (getattr(text, "rope_parameters", None) or {}).get("mrope_section") else 1,
        )

    def types_of_call(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Token types of a forward call from ``input_ids`` or, without them, from placeholder embeddings."""
        if (ids := inputs.get("input_ids")) is not None:
            return self.token_types(model, ids)
        embeds = inputs.get("inputs_embeds")
        if embeds is None:
            raise InputError("the model was called without input_ids or inputs_embeds")
        table = model.get_input_embeddings()
        types = torch.full(embeds.shape[:2], TEXT, dtype=torch.uint8, device=embeds.device)
        for name, kind in (("image_token_id", IMAGE), ("video_token_id", VIDEO)):
            token = getattr(model.config, name, None)
            if token is not None:
                row = table(torch.tensor(token, device=embeds.device))
                types[(embeds == row).all(-1)] = kind
        return types


def _slides(text: Any) -> bool:
    """Whether some layer of a language model sees a sliding window, from its config."""
    window, used = getattr(text, "sliding_window", None), getattr(text, "use_sliding_window", None)
    return "sliding_attention" in (getattr(text, "layer_types", None) or ()) or (bool(window) and used is not False)


def share_out(tokens: Sequence[int], items: Sequence[tuple[int, int]]) -> list[int]:
    """Pixel rows of each sequence, from its number of image tokens and (tokens, pixel rows) of each image in order.

    Raises:
        InputError: images that do not end where a sequence does.
    """
    counts, left = [], list(items)
    for wanted in tokens:
        rows = 0
        while wanted > 0 and left:
            size, pixels = left.pop(0)
            wanted, rows = wanted - size, rows + pixels
        counts.append(rows)
        if wanted:
            break
    if left or len(counts) < len(tokens) or wanted:
        raise InputError("the images do not fit the image tokens of the prompts; give each prompt the images it names")
    return counts


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known; its model types must be free."""
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise UnsupportedError(
                f"model type '{model_type}' is already served by {type(_FAMILIES[model_type]).__name__}"
            )
        _FAMILIES[model_type] = family


def supported_families() -> dict[str, str]:
    """Model types and the checkpoints they stand for."""
    return {name: family.model_types[name] for name, family in sorted(_FAMILIES.items())}


def find_family(model: nn.Module) -> Family:
    """The family of a model, or an error that lists the supported ones."""
    supported = ", ".join(f"{name} ({what})" for name, what in supported_families().items())
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is not a transformers PreTrainedModel; supported: {supported}")
    family = _FAMILIES.get(model.config.model_type)
    if family is None or not hasattr(model, "generate"):
        raise UnsupportedError(
            f"{type(model).__name__} (model type '{model.config.model_type}') is not supported; supported: {supported}"
        )
    family.check(model)
    return family
