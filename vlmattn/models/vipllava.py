"""VipLLaVA: LLaVA with features of several tower layers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from transformers import PreTrainedModel

from vlmattn.models.llava import Llava
from vlmattn.models.registry import register_family


@register_family
class VipLlava(Llava):
    """The CLS token never reaches the prompt."""

    model_types: ClassVar[Mapping[str, str]] = {"vipllava": "llava-hf/vip-llava-7b-hf"}

    def drops_cls(self, model: PreTrainedModel) -> bool:
        return True

    def feature_layers(self, model: PreTrainedModel) -> Sequence[int]:
        config = model.config  # transformers before 5.23 or so have the plural
        layers = getattr(config, "vision_feature_layers", None) or config.vision_feature_layer
        return [layers] if isinstance(layers, int) else layers
