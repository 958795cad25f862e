"""Qwen2.5-VL: images of any size between <|vision_start|> and <|vision_end|>, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn import compat
from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, by_grid, whole
from vlmattn.models.inputs import share_out
from vlmattn.models.registry import register_family
from vlmattn.request import IMAGE, VIDEO


def rows_by_grid(
    types: Tensor, inputs: Mapping[str, Any], merged: int, frames_merged: bool = False
) -> dict[str, list[int]]:
    """Rows of patches and of grids that belong to each sequence, where ``merged`` patches become a token.

    Args:
        frames_merged: all frames of a grid become tokens of one.
    """
    found = {}
    for kind, name, sizes in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if inputs.get(name) is not None:
            patches = inputs[sizes].prod(-1).tolist()
            made = (
                (inputs[sizes][:, 1:].prod(-1) // merged).tolist() if frames_merged else [n // merged for n in patches]
            )
            tokens = (types == kind).sum(1).tolist()
            found[name] = share_out(tokens, list(zip(made, patches, strict=True)))
            found[sizes] = share_out(tokens, [(count, 1) for count in made])
    return found


@register_family
class Qwen25VL(Family):
    """Images and videos are always separated by their markers, so unbroken runs are whole images or videos.

    The tower merges two frames of a video into one, which counts as an image.
    """

    model_types: ClassVar[Mapping[str, str]] = {"qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct"}
    markers: ClassVar[tuple[str, ...]] = ("vision_start_token_id", "vision_end_token_id")

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        types = self.token_types(model, inputs["input_ids"])
        return rows_by_grid(types, inputs, model.config.vision_config.spatial_merge_size**2)

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        merge = model.config.vision_config.spatial_merge_size
        return by_grid(inputs, image, len(slots), merge, merge)

    def frame_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any], runs: Sequence[int]) -> list[int]:
        grids = inputs.get("video_grid_thw")
        if grids is None:
            return list(runs)
        unit = model.config.vision_config.spatial_merge_size**2
        videos = dict(zip((grids.prod(-1) // unit).tolist(), grids[:, 0].tolist(), strict=True))
        if not videos.keys() >= set(runs):  # frames have text between them
            return list(runs)
        return [tokens // videos[tokens] for tokens in runs for _ in range(videos[tokens])]

    def frame_layout(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], frame: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        merge, grids = model.config.vision_config.spatial_merge_size, inputs["video_grid_thw"].cpu()
        height, width = grids[:, 1:].repeat_interleave(grids[:, 0], 0)[frame].tolist()
        return whole(len(slots), height // merge, width // merge)

    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """``[4, batch, tokens]``: of the text, then time, height and width."""
        text = super().positions(model, inputs)
        if inputs.get("mm_token_type_ids") is None or all(
            inputs.get(name) is None for name in ("image_grid_thw", "video_grid_thw")
        ):
            return text.expand(4, -1, -1)
        names = (
            "input_ids",
            "mm_token_type_ids",
            "image_grid_thw",
            "video_grid_thw",
            "second_per_grid_ts",
            "attention_mask",
        )
        space, _ = model.model.get_rope_index(**{name: inputs.get(name) for name in names})  # type: ignore[union-attr, operator]
        return torch.cat([text[None], space.to(text)])

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
