"""BLIP-2, InstructBLIP and its kin for videos with a decoder-only language model: query tokens lead every prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn.errors import UnsupportedError
from vlmattn.models.base import Family
from vlmattn.models.registry import register_family

_FRAMES = 4  # of every video, as its processor writes placeholders


@register_family
class Blip2(Family):
    """``generate`` hands embeddings over to the language model's own ``generate``, so that is where hooks are."""

    model_types: ClassVar[Mapping[str, str]] = {
        "blip-2": "Salesforce/blip2-opt-2.7b",
        "instructblip": "Salesforce/instructblip-vicuna-7b",
    }
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("pruning", "decoding"),
            "its generate() gives the language model embeddings only, and no images to make other prompts of",
        ),
        "turns": "its generate() gives the language model embeddings only, and no token ids to find the user's"
        " turns in",
    }

    def check(self, model: PreTrainedModel) -> None:
        if model.config.get_text_config().is_encoder_decoder:
            raise UnsupportedError(
                f"{type(model).__name__} with an encoder-decoder language model has its image tokens in the encoder,"
                " where no edit acts; use a checkpoint with OPT or Vicuna"
            )

    def entry(self, model: PreTrainedModel) -> nn.Module:
        return model.language_model  # type: ignore[no-any-return]

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        inner: Any = model.language_model.model  # type: ignore[union-attr]
        return inner.decoder if hasattr(inner, "decoder") else inner  # type: ignore[no-any-return]

    def norm(self, model: PreTrainedModel) -> nn.Module:
        decoder: Any = self.decoder(model)
        return decoder.norm if hasattr(decoder, "norm") else decoder.final_layer_norm  # type: ignore[no-any-return]

    def leading(self, model: PreTrainedModel) -> int:
        return int(model.config.num_query_tokens)


@register_family
class InstructBlipVideo(Blip2):
    """The query tokens of all frames lead the prompt, frame by frame."""

    model_types: ClassVar[Mapping[str, str]] = {"instructblipvideo": "Salesforce/instructblip-vicuna-7b"}

    def leading(self, model: PreTrainedModel) -> int:
        return _FRAMES * super().leading(model)
