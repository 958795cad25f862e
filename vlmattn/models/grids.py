"""Images of any size and videos, told by grids of patches (``image_grid_thw``): what Qwen-VL and its kin share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.image_layout import Piece, by_grid, whole
from vlmattn.models.inputs import share_out
from vlmattn.request import IMAGE, VIDEO


def rows_by_grid(
    types: Tensor, inputs: Mapping[str, Any], made: Callable[[int, int, int], int], together: int = 1
) -> dict[str, list[int]]:
    """Rows of patches and of grids that belong to each sequence.

    Args:
        made: how many tokens a grid of (frames, height, width) patches becomes; together: so many frames of a video
            become tokens of one.
    """
    found = {}
    for kind, name, sizes in (
        (IMAGE, "pixel_values", "image_grid_thw"),
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        if inputs.get(name) is not None:
            patches = inputs[sizes].prod(-1).tolist()
            count = together if kind == VIDEO else 1
            lengths = [made(frames // count, *sides) for frames, *sides in inputs[sizes].tolist()]
            tokens = (types == kind).sum(1).tolist()
            found[name] = share_out(tokens, list(zip(lengths, patches, strict=True)))
            found[sizes] = share_out(tokens, [(length, 1) for length in lengths])
    times = ("second_per_grid_ts", "video_second_per_grid")
    return found | {name: found["video_grid_thw"] for name in times if isinstance(inputs.get(name), Tensor)}


class Gridded(Family):
    """Images and videos are always separated by their markers, so unbroken runs are whole images or videos.

    The tower merges two frames of a video into one, which counts as an image.
    """

    markers: ClassVar[tuple[str, ...]] = ("vision_start_token_id", "vision_end_token_id")
    #: Image tokens at the end of each row that show no place.
    behind: ClassVar[int] = 0

    def merge(self, model: PreTrainedModel) -> int:
        """Patches along each side of what becomes a token."""
        return int(model.config.vision_config.spatial_merge_size)

    def together(self, model: PreTrainedModel) -> int:
        """Frames of the grid of a video that become tokens of one."""
        return 1

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        types = self.token_types(model, inputs["input_ids"])
        return rows_by_grid(types, inputs, partial(self.tokens_of_grid, model), self.together(model))

    def tokens_of_grid(self, model: PreTrainedModel, frames: int, height: int, width: int) -> int:
        """How many tokens a grid of patches becomes."""
        merge = self.merge(model)
        return frames * (height // merge) * (width // merge + self.behind)

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        merge = self.merge(model)
        return by_grid(inputs, image, len(slots), merge, merge, self.behind)

    def frame_lengths(self, model: PreTrainedModel, inputs: Mapping[str, Any], runs: Sequence[int]) -> list[int]:
        """As the grids tell: a run is a video, a frame, or some frames between stretches of sound."""
        if inputs.get("video_grid_thw") is None:
            return list(runs)
        return [self.tokens_of_grid(model, 1, *sides) for sides in self.frame_grids(model, inputs).tolist()]

    def frame_grids(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Patches (rows, columns) of each frame of the videos of a call, int64 ``[frames, 2]``, cpu."""
        grids = inputs["video_grid_thw"].cpu()
        return grids[:, 1:].repeat_interleave(grids[:, 0] // self.together(model), 0)  # type: ignore[no-any-return]

    def frame_layout(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], frame: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        merge = self.merge(model)
        height, width = self.frame_grids(model, inputs)[frame].tolist()
        return whole(len(slots), height // merge, width // merge, behind=self.behind)


def axes_of(model: PreTrainedModel) -> int:
    """In how many dimensions positions are counted."""
    return len((model.config.get_text_config().rope_parameters or {}).get("mrope_section") or (0, 0, 0))


class Spatial(Gridded):
    """Positions count time, height and width (M-RoPE)."""

    #: The decoder is given the positions of the text before those in time, height and width.
    text_axis: ClassVar[bool] = True

    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """``[4, batch, tokens]``: of the text, then time, height and width; ``[3, ...]`` without ``text_axis``."""
        text = super().positions(model, inputs)
        space = self.rope_index(model, inputs) if self.has_images(inputs) else text.expand(axes_of(model), -1, -1)
        space = space.to(text.device)  # some count time in fractions
        return torch.cat([text[None], space]) if self.text_axis else space

    def has_images(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the model is told of images and of the kind of each token, without which it counts text only."""
        grids = (inputs.get(name) for name in ("image_grid_thw", "video_grid_thw"))
        return inputs.get("mm_token_type_ids") is not None and any(grid is not None for grid in grids)

    def rope_index(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """Positions ``[3, batch, tokens]`` as the model counts them."""
        names = (
            *("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts"),
            "attention_mask",
        )
        return model.model.get_rope_index(**{name: inputs.get(name) for name in names})[0]  # type: ignore[union-attr, operator, no-any-return]
