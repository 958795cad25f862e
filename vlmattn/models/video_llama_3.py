"""VideoLLaMA 3: images of any size without separators; frames of a video have their times before them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, by_grid, whole
from vlmattn.models.inputs import encoded_lengths, share_out
from vlmattn.models.registry import register_family
from vlmattn.request import IMAGE, VIDEO


@register_family
class VideoLlama3(Family):
    """Of later frames only those tokens are left that changed since the frame before."""

    model_types: ClassVar[Mapping[str, str]] = {"video_llama_3": "lkhl/VideoLLaMA3-2B-Image-HF"}

    def image_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int] | None:
        found, grids = encoded_lengths(inputs), inputs.get("image_grid_thw")
        if found is not None or grids is None:
            return found
        return (grids.prod(-1) // inputs["image_merge_sizes"].to(grids) ** 2).tolist()  # type: ignore[no-any-return]

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        merge = int(inputs["image_merge_sizes"][image])
        return by_grid(inputs, image, len(slots), merge, merge)

    def frame_layout(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], frame: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        """A frame of which nothing was left out is one piece; else each run of neighbours in a row is."""
        grids, merges = inputs["video_grid_thw"].cpu(), inputs["video_merge_sizes"].cpu()
        sides = (grids[:, 1:] // merges[:, None]).repeat_interleave(grids[:, 0], 0)
        shown = [
            kept.view(*side)
            for kept, side in zip(kept_of(inputs, sides.prod(1)), sides.tolist(), strict=True)
            if kept.any()
        ]  # a frame without a token has no number
        if frame >= len(shown) or int(shown[frame].sum()) != len(slots):
            return ()
        return whole(len(slots), *shown[frame].shape) or runs_of(shown[frame])

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        types, found = self.token_types(model, inputs["input_ids"]), {}
        for kind, name, of in ((IMAGE, "pixel_values", "image"), (VIDEO, "pixel_values_videos", "video")):
            if inputs.get(name) is not None:
                grids, merges = inputs[f"{of}_grid_thw"], inputs[f"{of}_merge_sizes"]
                patches = grids.prod(-1)
                made = sizes = patches // merges.to(grids) ** 2
                tokens = (types == kind).sum(1).tolist()
                if kind == VIDEO and inputs.get("video_compression_mask") is not None:
                    sizes = torch.stack([kept.sum() for kept in kept_of(inputs, made)])
                    found["video_compression_mask"] = share_out(
                        tokens, list(zip(sizes.tolist(), made.tolist(), strict=True))
                    )
                found[name] = share_out(tokens, list(zip(sizes.tolist(), patches.tolist(), strict=True)))
                rows = share_out(tokens, [(size, 1) for size in sizes.tolist()])
                found |= {f"{of}_grid_thw": rows, f"{of}_merge_sizes": rows}
        return found


def kept_of(inputs: Mapping[str, Any], sizes: Tensor) -> tuple[Tensor, ...]:
    """Which tokens of parts of ``sizes`` tokens, videos or frames, were not left out: bool, on the CPU."""
    kept = inputs.get("video_compression_mask")
    kept = torch.ones(int(sizes.sum()), dtype=torch.bool) if kept is None else kept.cpu()
    return tuple(torch.split(kept, sizes.tolist()))


def runs_of(kept: Tensor) -> tuple[Piece, ...]:
    """Pieces of the unbroken runs in rows of ``kept``, bool ``[rows, columns]``, whose tokens are numbered in order."""
    rows, columns = kept.shape
    found, first = [], 0
    for row, line in enumerate(kept.tolist()):
        for there, run in groupby(range(columns), line.__getitem__):
            if there:
                own = list(run)
                box = (own[0] / columns, row / rows, (own[-1] + 1) / columns, (row + 1) / rows)
                found.append(Piece(torch.arange(first, first + len(own))[None], box))
                first += len(own)
    return tuple(found)
