"""Kosmos-2 and Kosmos-2.5: a mask among the inputs tells where images are, and positions are added to embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece
from vlmattn.models.registry import register_family
from vlmattn.request import IMAGE, TEXT

_MASK = "image_embeds_position_mask"
_WHY = (
    f"where its images are is told by {_MASK}, not by token ids, so prompts for the branches cannot be made; attention"
    " edits and masks run"
)
_PRUNING = (
    "its positions are added to the embeddings, and layers have no rotary tables by which later layers could be asked"
    " ahead which tokens they attend to; attention edits and masks run"
)


@register_family
class Kosmos2(Family):
    """``generate`` encodes the image and goes on with the language model's own, so that is where hooks are."""

    model_types: ClassVar[Mapping[str, str]] = {"kosmos-2": "microsoft/kosmos-2-patch14-224"}
    separated: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {"pruning": _PRUNING, "decoding": _WHY}

    def entry(self, model: PreTrainedModel) -> nn.Module:
        return model.text_model  # type: ignore[no-any-return]

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model.text_model.model  # type: ignore[no-any-return, union-attr]

    def norm(self, model: PreTrainedModel) -> nn.Module:
        return self.decoder(model).layer_norm  # type: ignore[return-value]

    def embedded(self, decoder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder puts image features in place itself, and counts positions from token ids."""
        given = dict(kwargs)
        if (ids := given.pop("input_ids", None)) is None:
            return kwargs
        embeds, images = decoder.embed_tokens(ids), given.pop("image_embeds", None)
        if images is not None:
            embeds = embeds.masked_scatter((given[_MASK] != 0)[..., None], images.to(embeds))
        if given.get("position_ids") is None:
            past, table = compat.cache_of(given), decoder.embed_positions
            length = 0 if past is None else past.get_seq_length()
            given["position_ids"] = table.create_position_ids_from_input_ids(ids, table.padding_idx, length)
        return given | {"inputs_embeds": embeds}

    def first_position(self, decoder: Any) -> int:
        return int(decoder.embed_positions.padding_idx) + 1

    def types_of_call(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        types = torch.full(tokens.shape[:2], TEXT, dtype=torch.uint8, device=tokens.device)
        return types if inputs.get(_MASK) is None else types.masked_fill(inputs[_MASK] != 0, IMAGE)

    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        mask: Tensor = inputs["attention_mask"]
        return mask.long().cumsum(-1) * mask + self.first_position(self.decoder(model)) - 1

    def image_layout(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        image: int,
        tokens: int,
        marker_ids: Mapping[str, int] | None = None,
    ) -> tuple[Piece, ...]:
        """Image tokens are latent queries, which have no place."""
        return ()


@register_family
class Kosmos25(Kosmos2):
    """The whole model takes part in ``generate``."""

    model_types: ClassVar[Mapping[str, str]] = {"kosmos-2.5": "microsoft/kosmos-2.5"}

    def entry(self, model: PreTrainedModel) -> nn.Module:
        return model  # type: ignore[no-any-return]
