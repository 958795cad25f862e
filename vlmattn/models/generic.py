"""Models of no registered family: a patcher that goes by what transformers says of every model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn.errors import UnsupportedError
from vlmattn.models.base import Family

_HINT = "add one with vlmattn.register_family (docs/extend/family.md)"


class Generic(Family):
    """A decoder-only model whose parts transformers names; ``wrap`` checks that its attention is reached.

    Only attention edits: what pruning, masks and branches need to know is different in every family.
    """

    refused: ClassVar = dict.fromkeys(("masks", "pruning", "decoding"), f"no family knows this model; {_HINT}")

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        found: Any = model.get_decoder()
        while not hasattr(found, "layers"):
            found = found.model
        return found  # type: ignore[no-any-return]

    def layers(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return self.decoder(model).layers  # type: ignore[return-value]


def generic_family(model: PreTrainedModel, known: str) -> Generic:
    """The generic patcher, for models that it can serve.

    Raises:
        UnsupportedError: what the model is instead, and what to do.
    """
    family, name = Generic(), f"{type(model).__name__} (model type '{model.config.model_type}') is not supported"
    if not model.can_generate():
        raise UnsupportedError(
            f"{name}: it writes no text, so there is nothing to edit; load the model with its head, e.g. with"
            f" AutoModelForImageTextToText; {known}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name}: it is an encoder-decoder, whose image tokens (if it has any) are not in the decoder's sequence;"
            f" {known}"
        )
    if not family.placeholders(model):
        raise UnsupportedError(
            f"{name}: it has no image tokens (config.image_token_id), so it reads text only or keeps its images"
            f" elsewhere; {_HINT}; {known}"
        )
    try:
        layers = family.layers(model)
    except (AttributeError, NotImplementedError):
        layers = ()
    attending = [family.attention(layer) for layer in layers if family.attention(layer) is not None]
    if not attending or any(not hasattr(attention, "layer_idx") for attention in attending):
        raise UnsupportedError(f"{name}: its decoder layers were not found; {_HINT}; {known}")
    return family
