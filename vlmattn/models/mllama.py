"""Llama 3.2 Vision: images are read by cross-attention layers, between layers of self-attention over the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, cells
from vlmattn.models.registry import register_family

_WHY = "its image tokens are not in the decoder's sequence but in cross-attention layers of their own"
_ROWS = (
    f"{_WHY}, so there are no rows of images that could see, or be seen, otherwise; methods about image keys and heads"
    " act in these layers, like pai, var, vhr and knockout_image_text"
)
_PRUNING = (
    f"{_WHY}, so no layer computes rows of them that could be spared, and the mask of the images is made for all of"
    " their keys; give smaller images, which have fewer tiles"
)
_DROPPING = (
    f"{_WHY}, whose keys a branch without the image would lack; use a rule that changes the image instead, like vcd"
)
_LOOKING = (
    f"{_WHY}, so attention to them cannot guide a decoding rule; use one that does not look at attention, like vcd"
)


@register_family
class Mllama(Family):
    """A prompt has one placeholder for each image; images are keys of cross-attention, tile after tile.

    Methods about image keys (PAI, VAR, VAF, heads_guided, knockout of images, sinks) act in the layers of
    cross-attention, where all keys are image tokens; those about text in the layers of self-attention; VHR and head
    gains in both.
    """

    model_types: ClassVar[Mapping[str, str]] = {"mllama": "meta-llama/Llama-3.2-11B-Vision-Instruct"}
    by_sequence: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("opening", "rows"), _ROWS),
        "pruning": _PRUNING,
        "looking": _LOOKING,
        "dropping": _DROPPING,
    }

    def refuses(self, model: PreTrainedModel) -> dict[str, str]:
        return dict(self.refused)

    def embedded(self, decoder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = dict(kwargs)
        if (ids := given.pop("input_ids", None)) is not None:
            given["inputs_embeds"] = decoder.embed_tokens(ids)
        return given

    def cross_attention(self, layer: nn.Module) -> nn.Module | None:
        return getattr(layer, "cross_attn", None)

    def image_keys(self, model: PreTrainedModel) -> int:
        vision: Any = model.config.vision_config
        return int(vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1))  # a CLS token each

    def key_layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int) -> tuple[Piece, ...]:
        vision: Any = model.config.vision_config
        rows, columns = vision.supported_aspect_ratios[int(inputs["aspect_ratio_ids"][0, image]) - 1]
        side = vision.image_size // vision.patch_size
        return tuple(
            Piece(
                cells(side, side, first=(row * columns + column) * (side**2 + 1) + 1),
                (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows),
            )
            for row in range(rows)
            for column in range(columns)
        )

    def image_states(self, kwargs: Mapping[str, Any], batch: int) -> Tensor | None:
        states: Tensor | None = kwargs.get("cross_attention_states")
        return None if states is None else states.reshape(batch, -1, states.shape[-1])

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        ids = inputs.get("input_ids")
        return None if ids is None else [1] * int((ids == model.config.image_token_id).sum())

    def unpadded(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        return (slice(int((inputs["aspect_ratio_ids"][rows] > 0).sum())),)
