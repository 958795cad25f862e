"""Chameleon: images are 1024 tokens of a codebook each, in a decoder of the Llama kind without a tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from vlmattn.errors import UnsupportedError
from vlmattn.models.base import Family
from vlmattn.models.registry import register_family


@register_family
class Chameleon(Family):
    """The decoder is ``model.model`` itself; <racm3:break> and <eoss> stand around each image."""

    model_types: ClassVar[Mapping[str, str]] = {"chameleon": "facebook/chameleon-7b"}
    even: ClassVar[bool] = True
    square: ClassVar[bool] = True
    in_tuples: ClassVar[int] = 1

    def check(self, model: PreTrainedModel) -> None:
        if getattr(model.config, "image_token_id", None) is None:
            raise UnsupportedError(
                "config.vocabulary_map of this Chameleon has no '<image>', so image tokens cannot be found"
            )

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model.model  # type: ignore[no-any-return]

    def embedded(self, decoder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder encodes images itself."""
        given = dict(kwargs)
        ids, pixels, encoded = (given.pop(name, None) for name in ("input_ids", "pixel_values", "mm_encoder_outputs"))
        if ids is None:
            return kwargs
        embeds, found = decoder.embed_tokens(ids), (encoded or {}).get("image")
        if found is None and pixels is not None:
            found = decoder.get_image_features(pixels, return_dict=True)
        if found is not None:
            visual = (ids == decoder.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(visual, found.pooler_output.to(embeds))
        return given | {"inputs_embeds": embeds}
