"""What a family of models has to say about itself, and the registry of families."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.errors import InputError, UnsupportedError
from vlmattn.models.pieces import Piece, by_grid, square
from vlmattn.request import IMAGE, TEXT, VIDEO, number_images

#: Kinds of methods, as families support or refuse them.
KINDS = ("edits", "masks", "pruning", "decoding")
#: Inputs of forward() that say what kind each token is.
OF_TOKENS = ("mm_token_type_ids", "token_type_ids")
#: Inputs of forward() that belong to images.
OF_IMAGES = (
    "pixel_values",
    "pixel_values_images",
    "pixel_values_videos",
    "high_res_pixel_values",
    "pixel_attention_mask",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "image_sizes",
    "image_sizes_videos",
    "batch_num_images",
    "spatial_shapes",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "cross_attention_mask",
)


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a decoder that methods may need, and which pretrained language model it looks like.

    ``backbone`` is (model type of the language model, hidden size, layers, MLP width): enough to recognise the
    language models of the published sink tables, whatever vision tower is in front of them. ``tower_layers`` counts the
    attention layers of the vision tower, ``source`` is the folder or hub name that the model came from. ``deepstack``
    counts the first decoder layers after which visual features are added to the residual stream, ``window`` is the length
    of the sliding window that some decoder layer sees (0 = none does), ``axes`` counts the position ids of a token (3 with
    M-RoPE). ``attending`` are the layers with self-attention (None = all). ``causal`` False: image tokens may see tokens
    behind them in the bare model. ``leading`` image tokens stand before every prompt (0 = token ids tell).
    ``query_dim``: size of each head's query (0 in the constructor = ``head_dim``). ``refused``: kinds of methods (``KINDS``) that the family cannot have, and why.
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
    window: int = 0
    axes: int = 1
    attending: tuple[int, ...] | None = None
    causal: bool = True
    leading: int = 0
    refused: tuple[tuple[str, str], ...] = ()
    query_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "query_dim", self.query_dim or self.head_dim)

    @property
    def fingerprint(self) -> str:
        """Hash of all sizes: profiles of heads, sinks and directions belong to models that share it."""
        sizes = (self.backbone, self.heads, self.kv_heads, self.head_dim)
        return hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]


class Family:
    """One family of models: where its decoder is, how its image tokens are found, what is odd about it.

    What is here fits most: the decoder is ``model.model.language_model``, image tokens are ``config.image_token_id``, an
    image is an unbroken run of them.
    """

    #: ``config.model_type`` values this class serves, each with the checkpoints people know.
    model_types: ClassVar[Mapping[str, str]] = {}
    #: Config fields with ids of tokens that are in a prompt for the sake of its images, placeholders aside.
    markers: ClassVar[tuple[str, ...]] = ()
    #: False: the bare model lets image tokens see tokens behind them.
    causal: ClassVar[bool] = True
    #: Pixel tensors have one row for each sequence of the batch, not for each image.
    by_sequence: ClassVar[bool] = False
    #: Kinds of methods (``KINDS``, "opening" for masks that open edges, "looking" for decoding methods that are guided by
    #: attention, "dropping" for branches without the image, "rotating" for those with another rotary base, or "turns" for
    #: methods that must know the user's) that the family cannot have, and why.
    refused: ClassVar[Mapping[str, str]] = {}
    #: Why nothing at all runs on the family; "" = something does.
    unsupported: ClassVar[str] = ""
    #: Why no test runs the family; "" = the tests build it small and run it.
    untested: ClassVar[str] = ""
    #: What the decoder gets beside embeddings, mask and positions, for passes that read other inputs.
    also_given: ClassVar[tuple[str, ...]] = ("visual_pos_masks", "deepstack_visual_embeds")

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts of tokens that tell images apart, which the tokenizer knows and the config may not."""
        return ()

    def check(self, model: PreTrainedModel) -> None:
        """Raise ``UnsupportedError`` for variants of the family that would be wrong."""

    def refuses(self, model: PreTrainedModel) -> dict[str, str]:
        """Kinds of methods that this model cannot have, and why."""
        if all(self.attention(layer) is not None for layer in self.layers(model)):
            return dict(self.refused)
        why = "some of its layers have no attention but a state of all tokens before; attention edits act in the others"
        return dict.fromkeys(("pruning", "decoding"), f"{why}, and these methods need attention in every layer") | dict(
            self.refused
        )

    def entry(self, model: PreTrainedModel) -> nn.Module:
        """The module whose forward every step of generate() goes through."""
        return model  # type: ignore[no-any-return]

    def leading(self, model: PreTrainedModel) -> int:
        """Image tokens that lead every prompt, where the module that is entered gets embeddings without token ids."""
        return 0

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text decoder: the module that gets ``inputs_embeds`` and holds ``layers``."""
        return model.model.language_model  # type: ignore[no-any-return, union-attr]

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Decoder layers in order; each gets the residual stream as its first argument."""
        return self.decoder(model).layers  # type: ignore[return-value]

    def attention(self, layer: nn.Module) -> nn.Module | None:
        """The self-attention module of a decoder layer; None for layers that have none."""
        return getattr(layer, "self_attn", None)

    def residual(self, hidden: Tensor) -> Tensor:
        """The residual stream ``[batch, tokens, hidden]`` in what a decoder layer gets."""
        return hidden

    def placeholders(self, model: PreTrainedModel) -> dict[int, int]:
        """Token ids that stand for visual features, each with its type."""
        names = {"image_token_id": IMAGE, "video_token_id": VIDEO}
        found = {getattr(model.config, name, None): kind for name, kind in names.items()}
        return {token: kind for token, kind in found.items() if token is not None}

    def token_types(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """uint8 ``[batch, tokens]``: TEXT, IMAGE or VIDEO, from token ids."""
        types = torch.full_like(ids, TEXT, dtype=torch.uint8)
        for token, kind in self.placeholders(model).items():
            types[ids == token] = kind
        return types

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        """Tokens of each image of a forward call, in (row, token) order; None: unbroken runs of image tokens are images."""
        return None

    def image_numbers(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], types: Tensor, marks: Mapping[str, int] | None = None
    ) -> Tensor:
        """int16 ``[batch, tokens]``: number of the image of each visual token within its row, -1 for text.

        Args:
            types: of the tokens of the call; marks: ids of the tokens ``marks``, None = the tokenizer is not known.
        """
        return number_images(types, self.image_lengths(model, inputs))

    def pieces(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        image: int,
        tokens: int,
        marks: Mapping[str, int] | None = None,
    ) -> tuple[Piece, ...]:
        """Where the tokens of an image lie in the picture: tiles, and views of the whole picture, whose box is ``WHOLE``.

        A box speaks of the picture as the processor showed it to the tower, so of what is left of a cropped one, and of a
        padded one with its padding; padding that the inputs tell of is taken off. Tokens that show no place (a CLS token,
        ends of rows) are in no piece. () where tokens have no place, the layout is not known, or there are videos.

        Args:
            inputs: of one prompt, without padding.
            image: its number there, and its ``tokens``, by ``image_numbers`` with the same ``marks``.
        """
        if any(inputs.get(name) is not None for name in ("pixel_values_videos", "video_grid_thw")):
            return ()  # frames are numbered like images
        numbers = self.image_numbers(model, inputs, self.token_types(model, inputs["input_ids"]), marks)[0]
        slots = (numbers == image).nonzero()[:, 0].cpu()
        return self.layout(model, inputs, image, slots) if len(slots) == tokens else ()

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        """The pieces of an image whose tokens are in ``slots`` of the prompt, int64 ``[n]`` on the CPU; see ``pieces``."""
        if inputs.get("image_grid_thw") is None:
            return square(len(slots))
        merge = getattr(_vision(model), "spatial_merge_size", 1)
        return by_grid(inputs, image, len(slots), merge, merge)

    def pixels(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        """Rows of each pixel tensor of a call that belong to each sequence of the batch: name -> counts."""
        names = ("pixel_values", "pixel_values_images", "pixel_values_videos", "high_res_pixel_values")
        return {name: counts for name, counts in self.per_row(model, inputs).items() if name in names}

    def own(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        """The part of rows of a pixel tensor that is no padding, which is there for larger images of other sequences.

        Args:
            name: of the tensor; rows: those of one sequence.
        """
        return ()

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        """As ``pixels``, for all inputs that come image by image."""
        found = {}
        for name in OF_IMAGES:
            if isinstance(inputs.get(name), Tensor):
                found[name] = self.rows_of(model, inputs, len(inputs[name]))
        return found

    def rows_of(self, model: PreTrainedModel, inputs: Mapping[str, Any], count: int) -> list[int]:
        """How many of the ``count`` rows of an input belong to each sequence of the batch.

        Raises:
            InputError: the images do not fit the image tokens of the prompts.
        """
        types = self.token_types(model, inputs["input_ids"])
        if self.by_sequence or len(types) == 1:
            return [count // len(types)] * len(types)
        runs = (number_images(types, None).amax(1) + 1).tolist()
        if sum(runs) == count:  # one for each image, or for each tile where tiles have tokens between them
            return [int(found) for found in runs]
        images = (self.image_numbers(model, inputs, types).amax(1) + 1).tolist()
        if sum(images) == count:
            return [int(found) for found in images]
        tokens = [int(found) for found in (types != TEXT).sum(1)]
        return share_out(tokens, self.tiles(model, inputs, sum(tokens), count))

    def tiles(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], tokens: int, count: int
    ) -> list[tuple[int, int]]:
        """(tokens, rows) of each of the ``count`` rows of pixels, which have ``tokens`` image tokens: they are tiles, all alike."""
        return [(tokens // count if count else 0, 1)] * count

    def image_ids(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Token ids that are in a prompt for the sake of its images only."""
        found = (getattr(model.config, name, None) for name in self.markers)
        return (*self.placeholders(model), *(token for token in found if token is not None))

    def retyped(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Inputs that say what kind each token is, made anew for other ``input_ids``."""
        types = self.token_types(model, inputs["input_ids"])
        return {name: types.to(inputs[name].dtype) for name in OF_TOKENS if name in inputs}

    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Position ids ``[..., batch, tokens]`` of a prompt as generate() makes them, without a trace on the model."""
        mask: Tensor = inputs["attention_mask"]
        return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)

    def text_mask(self, real: Tensor) -> Tensor:
        """The decoder's mask of a prompt without images, from ``real`` bool ``[batch, tokens]``: 2D, or 4D bool."""
        return real.long()

    def rotary(self, model: PreTrainedModel) -> nn.Module:
        """The module that makes cosines and sines of positions.

        Raises:
            UnsupportedError: there is none, or tables differ between layers.
        """
        decoder = self.decoder(model)
        found = getattr(decoder, "rotary_emb", None)
        rope = getattr(getattr(found, "config", None), "rope_parameters", None) or {}
        if found is None or "rope_theta" not in rope:
            raise UnsupportedError(f"the positions of {type(model).__name__} are not one rotary table for all layers")
        return found  # type: ignore[no-any-return]

    def _not_rotating(self, model: PreTrainedModel) -> dict[str, str]:
        """Refuses rules with other rotary bases where there is not one table for all layers."""
        try:
            self.rotary(model)
        except UnsupportedError as error:
            return {"rotating": str(error)}
        return {}

    def logits(self, model: PreTrainedModel, hidden: Tensor, normed: bool = True) -> Tensor:
        """What the residual stream says at any depth: final norm (or none) and head."""
        if normed:
            hidden = self.norm(model)(hidden)
        return model.get_output_embeddings()(hidden)  # type: ignore[no-any-return, operator, misc]

    def norm(self, model: PreTrainedModel) -> nn.Module:
        """The norm before the head."""
        return self.decoder(model).norm  # type: ignore[return-value]

    def tower(self, model: PreTrainedModel) -> nn.Module | None:
        """The vision tower, where each image token of the prompt is one of its tokens (or a few); None = it is not looked at."""
        return None

    def tower_attention(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Attention modules of the vision tower, in order."""
        return ()

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
        raise NotImplementedError

    def patch_keys(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Mean key over heads of each image's tokens, before any rotation, in one attention module of the tower.

        Args, order: as for ``summary_attention``. Returns float32 ``[tokens, dim]`` for each image.
        """
        raise NotImplementedError

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
        attending = tuple(n for n, layer in enumerate(self.layers(model)) if self.attention(layer) is not None)
        return Anatomy(
            family=model.config.model_type,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            hidden_size=text.hidden_size,
            backbone=(text.model_type, text.hidden_size, text.num_hidden_layers, _mlp_width(text)),
            tower_layers=len(self.tower_attention(model)),
            source=model.name_or_path,
            deepstack=len(getattr(_vision(model), "deepstack_visual_indexes", None) or ()),
            window=_window(text),
            axes=3 if (getattr(text, "rope_parameters", None) or {}).get("mrope_section") else 1,
            attending=None if len(attending) == text.num_hidden_layers else attending,
            causal=self.causal,
            leading=self.leading(model),
            refused=tuple((self.refuses(model) | self._not_rotating(model)).items()),
            query_dim=getattr(text, "qk_head_dim", None) or 0,  # latent attention: longer than the values
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
        for token, kind in self.placeholders(model).items():
            row = table(torch.tensor(token, device=embeds.device))
            types[(embeds == row).all(-1)] = kind
        return types


def _vision(model: PreTrainedModel) -> Any:
    return getattr(model.config, "vision_config", None)


def _mlp_width(text: Any) -> int:
    width = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 0
    return int(width if isinstance(width, int) else width[0])


def _window(text: Any) -> int:
    """The length of the sliding window that some layer of a language model sees, from its config; 0 = none does."""
    kinds, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None)
    if kinds is not None and "chunked_attention" in kinds:
        return int(text.attention_chunk_size)
    if kinds is not None:
        return int(window or 0) if "sliding_attention" in kinds else 0
    return int(window) if window and getattr(text, "use_sliding_window", None) is not False else 0


def encoded_lengths(inputs: Mapping[str, Any]) -> list[int] | None:
    """Tokens of each image, where generate() encoded the images before the first forward."""
    encoded = inputs.get("mm_encoder_outputs") or {}
    found = [encoded[kind].pooler_output for kind in ("image", "video") if encoded.get(kind) is not None]
    return [len(features) for features in found[0]] if len(found) == 1 and found[0] is not None else None


def even_lengths(model: PreTrainedModel, inputs: Mapping[str, Any], name: str = "pixel_values") -> list[int] | None:
    """Tokens of each image of families whose images all have the same number of them; ``name``: of the pixels."""
    pixels, ids = inputs.get(name), inputs.get("input_ids")
    if (found := encoded_lengths(inputs)) is not None or pixels is None or ids is None:
        return found
    return [int((ids == model.config.image_token_id).sum()) // len(pixels)] * len(pixels)


def marks_of(family: Family, processor: Any) -> dict[str, int]:
    """Token ids of ``family.marks``, as far as the tokenizer of a processor knows them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None or not family.marks:
        return {}
    vocabulary = tokenizer.get_vocab()
    return {text: vocabulary[text] for text in family.marks if text in vocabulary}


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
    """Make a family known, so that ``wrap`` serves its model types.

    Raises:
        UnsupportedError: a model type that is served already, or none at all.
    """
    if not family.model_types:
        raise UnsupportedError(
            f"{type(family).__name__} names no model types; give it model_types = {{'type': 'checkpoint'}}"
        )
    for model_type in family.model_types:
        if model_type in _FAMILIES:
            raise UnsupportedError(
                f"model type '{model_type}' is already served by {type(_FAMILIES[model_type]).__name__}"
            )
    _FAMILIES.update(dict.fromkeys(family.model_types, family))


def registered() -> dict[str, Family]:
    """Model types and the families that serve them."""
    return dict(sorted(_FAMILIES.items()))


def supported_families() -> dict[str, str]:
    """Model types and the checkpoints they stand for."""
    return {name: family.model_types[name] for name, family in registered().items() if not family.unsupported}


def find_family(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedError: a model that is no vision-language model, or one whose attention cannot be reached.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is not a transformers PreTrainedModel; {_known()}")
    family = _FAMILIES.get(model.config.model_type)
    if family is not None and family.unsupported:
        raise UnsupportedError(f"{type(model).__name__} is not supported: {family.unsupported}; {_known()}")
    if family is None or not model.can_generate():
        from vlmattn.models.generic import generic_family

        family = generic_family(model, _known())
    family.check(model)
    return family


def _known() -> str:
    """What is supported, for messages."""
    return f"supported: {', '.join(supported_families())}; see vlmattn.supported_families()"
