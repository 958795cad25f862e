"""Qwen2.5-VL: images of any size between <|vision_start|> and <|vision_end|>, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.models.base import Family, register_family


class Qwen25VL(Family):
    """Images and videos are always separated by their markers, so unbroken runs are whole images."""

    model_types: ClassVar[Mapping[str, str]] = {"qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        return None

    def tower(self, model: PreTrainedModel) -> nn.Module:
        return model.model.visual  # type: ignore[no-any-return, union-attr]

    def tower_attention(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        return [block.attn for block in self.tower(model).blocks]  # type: ignore[union-attr]

    def summary_attention(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Before the rotation, so that the mean query has no position; patches that become one token are summed."""
        tower: Any = self.tower(model)
        grid, unit = inputs["grid_thw"], tower.spatial_merge_size**2
        attn: Any = module
        query, key = attn.qkv(hidden).view(len(hidden), 3, attn.num_heads, -1).float().unbind(1)[:2]
        sizes = grid.prod(-1).tolist()
        found = []
        for q, k in zip(query.split(sizes), key.split(sizes), strict=True):
            scores = torch.einsum("hd,nhd->hn", q.mean(0), k) * attn.scaling
            found.append(torch.softmax(scores, -1).view(len(scores), -1, unit).sum(-1))
        windowed = torch.cat(found, -1)  # the tower works window by window
        tokens = torch.empty_like(windowed)
        tokens[:, _window_order(tower, grid).to(tokens.device)] = windowed
        return list(torch.split(tokens, [size // unit for size in sizes], -1))


def _window_order(tower: Any, grid: Tensor) -> Tensor:
    """Position of each token in the prompt, in the order in which the tower has them."""
    try:
        from transformers.vision_utils import get_vision_window_index
    except ImportError:  # transformers before 5.20 or so
        return torch.as_tensor(tower.get_window_index(grid)[0])
    order: Tensor = get_vision_window_index(
        grid, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size, patch_size=tower.patch_size
    )[0]
    return order


register_family(Qwen25VL())
