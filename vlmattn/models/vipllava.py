"""VipLLaVA: LLaVA with features of several tower layers side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import register_family
from vlmattn.models.llava import Llava


class VipLlava(Llava):
    """The CLS token never reaches the prompt."""

    model_types: ClassVar[Mapping[str, str]] = {"vipllava": "llava-hf/vip-llava-7b-hf"}

    def drops_cls(self, model: PreTrainedModel) -> bool:
        return True

    def patch_features(self, model: PreTrainedModel, output: Any) -> list[tuple[Tensor, Tensor | None]]:
        return []


register_family(VipLlava())
