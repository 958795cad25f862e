"""VideoLLaMA 3: images of any size without separators; frames of a video have their times before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, by_grid
from vlmattn.models.inputs import encoded_lengths, share_out
from vlmattn.models.registry import register_family
from vlmattn.request import IMAGE, VIDEO


@register_family
class VideoLlama3(Family):
    """Tokens of a video that change little from frame to frame are left out, so those of a frame show no places."""

    model_types: ClassVar[Mapping[str, str]] = {"video_llama_3": "lkhl/VideoLLaMA3-2B-Image-HF"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        found, grids = encoded_lengths(inputs), inputs.get("image_grid_thw")
        if found is not None or grids is None:
            return found
        return (grids.prod(-1) // inputs["image_merge_sizes"].to(grids) ** 2).tolist()  # type: ignore[no-any-return]

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        merge = int(inputs["image_merge_sizes"][image])
        return by_grid(inputs, image, len(slots), merge, merge)

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        types, found = self.token_types(model, inputs["input_ids"]), {}
        for kind, name, of in ((IMAGE, "pixel_values", "image"), (VIDEO, "pixel_values_videos", "video")):
            if inputs.get(name) is not None:
                grids, merges = inputs[f"{of}_grid_thw"], inputs[f"{of}_merge_sizes"]
                patches = grids.prod(-1)
                made = patches // merges.to(grids) ** 2
                kept = inputs.get("video_compression_mask") if kind == VIDEO else None
                if kept is not None:
                    made = torch.stack([part.sum() for part in kept.split(made.tolist())])
                tokens, sizes = (types == kind).sum(1).tolist(), made.tolist()
                found[name] = share_out(tokens, list(zip(sizes, patches.tolist(), strict=True)))
                rows = share_out(tokens, [(size, 1) for size in sizes])
                found |= {f"{of}_grid_thw": rows, f"{of}_merge_sizes": rows}
        return found
