"""Qwen2.5-VL: images of any size between <|vision_start|> and <|vision_end|>, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.models.grids import Spatial
from vlmattn.models.registry import register_family


@register_family
class Qwen25VL(Spatial):
    """The tower works window by window."""

    model_types: ClassVar[Mapping[str, str]] = {"qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct"}

    def tower(self, model: PreTrainedModel) -> nn.Module | None:
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
        return [image.T for image in self._by_image(tower, grid, torch.cat(found, -1).T)]

    def patch_keys(
        self, model: PreTrainedModel, module: nn.Module, hidden: Tensor, inputs: Mapping[str, Any]
    ) -> list[Tensor]:
        """Patches that become one token are averaged."""
        tower: Any = self.tower(model)
        attn: Any = module
        keys = attn.qkv(hidden).view(len(hidden), 3, attn.num_heads, -1)[:, 1].float().mean(1)
        unit = tower.spatial_merge_size**2
        return self._by_image(tower, inputs["grid_thw"], keys.view(-1, unit, keys.shape[-1]).mean(1))

    def _by_image(self, tower: Any, grid: Tensor, tokens: Tensor) -> list[Tensor]:
        """Values ``[token, ...]`` of all images, as the tower has them, image by image; a video is one."""
        ordered = self.in_prompt_order(tower, grid, tokens)
        return list(torch.split(ordered, (grid.prod(-1) // tower.spatial_merge_size**2).tolist()))

    def in_prompt_order(self, tower: Any, grid: Tensor, tokens: Tensor) -> Tensor:
        """Values ``[token, ...]`` of all images in the order of the prompt; the tower works window by window."""
        found = torch.empty_like(tokens)
        found[compat.window_order(tower, grid).to(tokens.device)] = tokens
        return found
