"""Gemma 3n: four residual streams, of which one is read; the last layers reuse keys and values of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.reasons import STREAMS
from vlmattn.models.registry import register_family


@register_family
class Gemma3n(Family):
    """Every layer also gets embeddings of its own for each token."""

    model_types: ClassVar[Mapping[str, str]] = {"gemma3n": "google/gemma-3n-E4B-it"}
    markers: ClassVar[tuple[str, ...]] = ("boi_token_id", "eoi_token_id")
    square: ClassVar[bool] = True
    also_given: ClassVar[tuple[str, ...]] = ("per_layer_inputs",)
    given_by_token: ClassVar[tuple[str, ...]] = also_given
    refused: ClassVar[Mapping[str, str]] = {
        "pruning": "its residual stream is four streams side by side, and its last layers reuse keys and values of"
        " others",
        "steering": STREAMS,
    }

    def residual(self, hidden: Tensor) -> Tensor:
        return hidden[0] if hidden.ndim == 4 else hidden  # altup_active_idx is 0 in all checkpoints

    def logits(self, model: PreTrainedModel, hidden: Tensor, normed: bool = True) -> Tensor:
        found, cap = super().logits(model, hidden, normed), model.config.get_text_config().final_logit_softcapping
        return found if cap is None else cap * (found / cap).tanh()
