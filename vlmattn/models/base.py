"""What a family of models has to say about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.anatomy import Anatomy
from vlmattn.errors import InputError, UnsupportedError
from vlmattn.models.image_layout import Piece, square
from vlmattn.models.inputs import (
    OF_IMAGES,
    OF_PIXELS,
    OF_TOKENS,
    encoded_lengths,
    even_lengths,
    for_rows,
    share_out,
    warn_of_runs,
)
from vlmattn.models.reasons import HYBRID, NO_MLP
from vlmattn.models.sizes import heads_of, mlp_of, mlp_width, sources_of, vision_of, window_of
from vlmattn.models.tower import SeenTower
from vlmattn.request import IMAGE, TEXT, VIDEO, number_frames, number_images, video_runs


class Family(SeenTower):
    """One family of models: where its decoder is, how its image tokens are found, what is odd about it.

    What is here fits most: ``model.model.language_model`` decodes, an unbroken run of ``image_token_id`` is an image.
    """

    #: ``config.model_type`` values this class serves, each with a checkpoint people know ("" = none is named).
    model_types: ClassVar[Mapping[str, str]] = {}
    #: Config fields with ids of tokens that are in a prompt for the sake of its images, placeholders aside.
    markers: ClassVar[tuple[str, ...]] = ()
    #: All images have the same number of tokens.
    even: ClassVar[bool] = False
    #: Other tokens always stand between images, also where ``markers`` names none.
    separated: ClassVar[bool] = False
    #: Tokens of an image are cells of a square, row by row, and show the whole picture.
    square: ClassVar[bool] = False
    #: False: the bare model lets image tokens see tokens behind them.
    causal: ClassVar[bool] = True
    #: Pixel tensors have one row for each sequence of the batch, not for each image.
    by_sequence: ClassVar[bool] = False
    #: How many values decoder layers return in a tuple, the residual stream first; 0 = it alone.
    in_tuples: ClassVar[int] = 0
    #: Some layers read only the rows of a prompt that logits are asked for; methods must see all.
    leaves_rows_out: ClassVar[bool] = False
    #: The model counts positions itself, over padding too.
    counts_padding: ClassVar[bool] = False
    #: Axis of pixel tensors along which images follow one another.
    pixel_axis: ClassVar[int] = 0
    #: Kinds of methods that the family cannot have, and why: ``KINDS``, "opening" (masks that open edges), "rows"
    #: (about rows of image tokens), "turns" (that must know the user's), and of decoding methods "looking" (guided by
    #: attention), "dropping" (branches without an image), "rotating" (another base).
    refused: ClassVar[Mapping[str, str]] = {}
    #: Why nothing at all runs on the family; "" = something does.
    unsupported: ClassVar[str] = ""
    #: Why no test runs the family; "" = the tests build it small and run it.
    untested: ClassVar[str] = ""
    #: What the decoder gets beside embeddings, mask and positions, for passes that read other inputs.
    also_given: ClassVar[tuple[str, ...]] = ("visual_pos_masks", "deepstack_visual_embeds")
    #: Those of them that hold something for every token, ``[batch, tokens, ...]``.
    given_by_token: ClassVar[tuple[str, ...]] = ()

    @property
    def marker_ids(self) -> tuple[str, ...]:
        """Texts of tokens that tell images apart, which the tokenizer knows and the config may not."""
        return ()

    def check(self, model: PreTrainedModel) -> None:
        """Raise ``UnsupportedError`` for variants of the family that would be wrong."""

    def refuses(self, model: PreTrainedModel) -> dict[str, str]:
        """Kinds of methods that this model cannot have, and why."""
        layers = tuple(self.layers(model))
        found = {} if all(mlp_of(layer) is not None for layer in layers) else NO_MLP
        return found | ({} if all(map(self.attention, layers)) else HYBRID) | dict(self.refused)

    def entry(self, model: PreTrainedModel) -> nn.Module:
        """The module whose forward every step of generate() goes through."""
        return model  # type: ignore[no-any-return]

    def leading(self, model: PreTrainedModel) -> int:
        """Image tokens that lead every prompt, where the module that is entered gets embeddings without token ids."""
        return 0

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        """The text decoder: the module that gets ``inputs_embeds`` and holds ``layers``."""
        return model.model.language_model  # type: ignore[no-any-return, union-attr]

    def embedded(self, decoder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the decoder is called with, as ``inputs_embeds`` that have image features in place."""
        return kwargs

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Decoder layers in order; each gets the residual stream as its first argument."""
        return self.decoder(model).layers  # type: ignore[return-value]

    def attention(self, layer: nn.Module) -> nn.Module | None:
        """The self-attention module of a decoder layer; None for layers that have none."""
        return getattr(layer, "self_attn", None)

    def cross_attention(self, layer: nn.Module) -> nn.Module | None:
        """The attention of a decoder layer to images that are no tokens of the prompt; None for layers without."""
        return None

    def image_keys(self, model: PreTrainedModel) -> int:
        """Keys of each image in layers of cross-attention."""
        return 0

    def key_layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int) -> tuple[Piece, ...]:
        """As ``image_layout``, for the keys of an image in layers of cross-attention."""
        return ()

    def image_states(self, kwargs: Mapping[str, Any], batch: int) -> Tensor | None:
        """What a layer of cross-attention makes keys of, ``[batch, keys, width]``; None where they are cached."""
        return None

    def residual(self, hidden: Tensor) -> Tensor:
        """The residual stream ``[batch, tokens, hidden]`` in what a decoder layer gets."""
        return hidden

    def placeholders(self, model: PreTrainedModel) -> dict[int, int]:
        """Token ids that stand for visual features, each with its type."""
        names = {"video_token_id": VIDEO, "image_token_id": IMAGE}  # the last has its way where both are one token
        found = {getattr(model.config, name, None): kind for name, kind in names.items()}
        return {token: kind for token, kind in found.items() if token is not None}

    def token_types(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """uint8 ``[batch, tokens]``: TEXT, IMAGE or VIDEO, from token ids."""
        types = torch.full_like(ids, TEXT, dtype=torch.uint8)
        for token, kind in self.placeholders(model).items():
            types[ids == token] = kind
        return types

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        """Tokens of each image of a call, in (row, token) order; None: unbroken runs of image tokens are images."""
        return even_lengths(model, inputs) if self.even else None

    def image_numbers(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        types: Tensor,
        marker_ids: Mapping[str, int] | None = None,
    ) -> Tensor:
        """int16 ``[batch, tokens]``: number of the image of each visual token within its row, -1 for text.

        Every frame of a video (or group of frames that the tower merges) is an image with a number of its own.

        Args:
            types: of the tokens of the call.
            marker_ids: ids of the tokens in ``Family.marker_ids``, None = the tokenizer is not known.
        """
        numbers = self.numbers_of_runs(model, inputs, types, marker_ids)
        runs = video_runs(types) if VIDEO in self.placeholders(model).values() else []
        if not runs:
            return numbers
        lengths = for_rows(self.frame_lengths(model, inputs, runs), (types == VIDEO).sum(1).tolist())
        return number_frames(types, numbers, lengths or runs)

    def frame_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any], runs: Sequence[int]) -> list[int]:
        """Tokens of each frame of the videos of a call, in (row, token) order.

        Args:
            runs: lengths of the unbroken runs of video tokens, which are frames where text stands between frames.
        """
        return list(runs)

    def numbers_of_runs(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        types: Tensor,
        marker_ids: Mapping[str, int] | None = None,
    ) -> Tensor:
        """As ``image_numbers``, where an unbroken run of video tokens is one."""
        lengths = self.image_lengths(model, inputs)
        numbers = number_images(types, lengths)
        images = 0 if lengths is not None or self.separated or self.markers else self.given_images(inputs)
        if images > 1 and images > int((numbers.amax(1) + 1).sum()):
            warn_of_runs(model.config.model_type)
        return numbers

    def given_images(self, inputs: Mapping[str, Any]) -> int:
        """How many images a call brings (or tiles, where images are cut); 0 where that cannot be counted."""
        pixels = inputs.get("pixel_values")
        if pixels is None:
            return len(encoded_lengths(inputs) or ())
        return len(pixels) if isinstance(pixels, Tensor) and pixels.ndim >= 4 else 0

    def image_layout(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        image: int,
        tokens: int,
        marker_ids: Mapping[str, int] | None = None,
    ) -> tuple[Piece, ...]:
        """Where an image's tokens lie in the picture: tiles, and views of the whole, whose box is ``WHOLE``.

        A box speaks of the picture as the processor showed it to the tower, so of what is left of a cropped one, and of
        a padded one with its padding; padding that the inputs tell of is taken off. Tokens that show no place (a CLS
        token, ends of rows) are in no piece. () where tokens have no place, or the layout is not known.

        Args:
            inputs: of one prompt, without padding.
            image: its number there, and its ``tokens``, by ``image_numbers`` with the same ``marker_ids``.
        """
        types = self.token_types(model, inputs["input_ids"])
        numbers = self.image_numbers(model, inputs, types, marker_ids)[0]
        slots = (numbers == image).nonzero()[:, 0].cpu()
        if len(slots) != tokens:
            return ()
        video = bool(types[0, slots[0]] == VIDEO)
        number = int((torch.unique(numbers[types[0] == (VIDEO if video else IMAGE)]) < image).sum())
        return (self.frame_layout if video else self.layout)(model, inputs, number, slots)

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        """The pieces of an image whose tokens are in ``slots`` of the prompt, int64 ``[n]``, cpu (``image_layout``).

        Args:
            image: its number among the images of the prompt, videos aside.
        """
        return square(len(slots)) if self.square else ()

    def frame_layout(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], frame: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        """As ``layout``, of a frame: its number among the frames of all videos of the prompt."""
        return square(len(slots)) if self.square else ()

    def pixels(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        """Rows of each pixel tensor of a call that belong to each sequence of the batch: name -> counts."""
        return {name: counts for name, counts in self.per_row(model, inputs).items() if name in OF_PIXELS}

    def unpadded(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
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
                found[name] = self.rows_of(model, inputs, len(inputs[name]), VIDEO if "video" in name else IMAGE)
        return found

    def by_itself(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of one sequence, taken out of those of a batch, as they would be without the others."""
        return dict(inputs)

    def rows_of(self, model: PreTrainedModel, inputs: Mapping[str, Any], count: int, kind: int = IMAGE) -> list[int]:
        """How many of the ``count`` rows of an input belong to each sequence of the batch.

        Args:
            kind: IMAGE or VIDEO, what the input is about.

        Raises:
            InputError: the images do not fit the image tokens of the prompts.
        """
        types = self.token_types(model, inputs["input_ids"])
        if self.by_sequence or len(types) == 1:
            return [count // len(types)] * len(types)
        types = torch.where(types == kind, types, TEXT)
        runs = (number_images(types, None).amax(1) + 1).tolist()
        if sum(runs) == count:  # one for each image, or for each tile where tiles have tokens between them
            return [int(found) for found in runs]
        numbers = self.image_numbers(model, inputs, types)
        images = [len(torch.unique(row[row >= 0])) for row in numbers]
        if sum(images) == count:
            return [int(found) for found in images]
        tokens = [int(found) for found in (types != TEXT).sum(1)]
        return share_out(tokens, self.tiles(model, inputs, sum(tokens), count))

    def tiles(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], tokens: int, count: int
    ) -> list[tuple[int, int]]:
        """(tokens, rows) of each of ``count`` rows of pixels with ``tokens`` image tokens: tiles, all alike."""
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
        if self.counts_padding:
            return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
        return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)

    def text_mask(self, real: Tensor) -> Tensor:
        """The decoder's mask of a prompt without images, from ``real`` bool ``[batch, tokens]``: 2D, or 4D bool."""
        return real.long()

    def first_position(self, decoder: Any) -> int:
        """Position id of the first token."""
        return 0

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

    def anatomy(self, model: PreTrainedModel) -> Anatomy:
        text = model.config.get_text_config()
        sizes, layers = heads_of(text), tuple(enumerate(self.layers(model)))
        attending = tuple(n for n, layer in layers if self.attention(layer) is not None)
        return Anatomy(
            family=model.config.model_type,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=max(kv for kv, _ in sizes),
            head_dim=max(dim for _, dim in sizes),
            unlike=sizes if len(sizes) > 1 else (),
            hidden_size=text.hidden_size,
            backbone=(text.model_type, text.hidden_size, text.num_hidden_layers, mlp_width(text)),
            tower_layers=len(self.tower_attention(model)),
            source=model.name_or_path,
            deepstack=len(getattr(vision_of(model), "deepstack_visual_indexes", None) or ()),
            window=window_of(text),
            sources=sources_of(text),
            axes=3 if (getattr(text, "rope_parameters", None) or {}).get("mrope_section") else 1,
            attending=None if len(attending) == text.num_hidden_layers else attending,
            causal=self.causal,
            leading=self.leading(model),
            refused=tuple((self.refuses(model) | self._not_rotating(model)).items()),
            query_dim=getattr(text, "qk_head_dim", None) or 0,  # latent attention: longer than the values
            latent=bool(getattr(text, "kv_lora_rank", None)),
            cross=tuple(n for n, layer in layers if self.cross_attention(layer) is not None),
            image_keys=self.image_keys(model),
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


def marker_ids_of(family: Family, processor: Any) -> dict[str, int]:
    """Token ids of ``family.marker_ids``, as far as the tokenizer of a processor knows them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None or not family.marker_ids:
        return {}
    vocabulary = tokenizer.get_vocab()
    return {text: vocabulary[text] for text in family.marker_ids if text in vocabulary}
