"""Vision towers with one token per patch and projections of their own for queries and keys: CLIP, SigLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, square

_KNOWN = ("clip_vision_model", "siglip_vision_model")


class PatchTower(Family):
    """A tower whose patches are the image tokens, in their order; towers of other kinds are not looked at."""

    def tower(self, model: PreTrainedModel) -> nn.Module | None:
        known = model.config.vision_config.model_type in _KNOWN
        return model.model.vision_tower if known else None  # type: ignore[no-any-return, union-attr]

    def tower_attention(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        tower: Any = self.tower(model)
        return [module.self_attn for module in tower.modules() if hasattr(module, "self_attn")] if tower else []

    def has_cls(self, model: PreTrainedModel) -> bool:
        """The tower's first token is a CLS token, whose query sums the image up."""
        return bool(model.config.vision_config.model_type == "clip_vision_model")

    def drops_cls(self, model: PreTrainedModel) -> bool:
        """The first token of the tower is no image token of the prompt."""
        return bool(getattr(model.config, "vision_feature_select_strategy", "full") == "default")

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        return square(len(slots), first=int(self.has_cls(model) and not self.drops_cls(model)))

    def summary_attention(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        images, tokens, _ = hidden.shape
        attn: Any = module
        query = attn.q_proj(hidden[:, :1] if self.has_cls(model) else hidden).mean(1)
        query = query.view(images, attn.num_heads, 1, -1).float()
        key = attn.k_proj(hidden).view(images, tokens, attn.num_heads, -1).transpose(1, 2).float()
        attention = torch.softmax(query @ key.transpose(-1, -2) * attn.scale, -1)[:, :, 0]
        return list(attention[..., int(self.drops_cls(model)) :])

    def patch_keys(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        attn: Any = module
        keys = attn.k_proj(hidden).unflatten(-1, (attn.num_heads, -1)).mean(2).float()
        return list(keys[:, int(self.drops_cls(model)) :])
