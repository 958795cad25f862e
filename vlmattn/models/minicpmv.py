"""MiniCPM-V 4.6 and 4.7, MiniCPM-OCR: the picture in small, then its slices, between markers; hybrid layers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.models.image_layout import Piece, cells
from vlmattn.models.inputs import share_out
from vlmattn.models.reasons import HYBRID
from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Tiled
from vlmattn.request import IMAGE, VIDEO


@register_family
class MiniCPMV(Tiled):
    """Patches of all images lie side by side in one long strip of pixels."""

    model_types: ClassVar[Mapping[str, str]] = {
        "minicpmv4_6": "openbmb/MiniCPM-V-4.6",
        "minicpm_ocr": "openbmb/MiniCPM-OCR",
    }
    refused: ClassVar[Mapping[str, str]] = HYBRID
    first: ClassVar[str] = "<image>"
    markers: ClassVar[tuple[str, ...]] = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id")
    pixel_axis: ClassVar[int] = 3

    def known_marker_ids(self, model: PreTrainedModel) -> dict[str, int]:
        start = getattr(model.config, "image_start_id", None)
        return {} if start is None else {self.first: start}

    def image_numbers(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        types: Tensor,
        marker_ids: Mapping[str, int] | None = None,
    ) -> Tensor:
        """A frame is cut into slices as an image is, between the same markers."""
        return self.numbers_of_runs(model, inputs, types, marker_ids)

    def sides(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> int:
        """Patches along each side of what becomes a token."""
        mode = inputs.get("downsample_mode") or model.config.downsample_mode
        return int(model.config.merge_kernel_size[0] ** model.config.merger_times) * (1 if mode == "4x" else 2)

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        types, found = self.token_types(model, inputs["input_ids"]), {}
        side = self.sides(model, inputs)
        for kind, name, sizes in (
            (IMAGE, "pixel_values", "target_sizes"),
            (VIDEO, "pixel_values_videos", "target_sizes_videos"),
        ):
            if inputs.get(name) is not None:
                patches = inputs[sizes].prod(-1).tolist()
                tokens = (types == kind).sum(1).tolist()
                long = inputs[name].shape[-2]  # a patch is as wide as it is high
                found[name] = share_out(tokens, [(n // side**2, n * long) for n in patches])
                found[sizes] = share_out(tokens, [(n // side**2, 1) for n in patches])
        return found

    def layout(self, model: PreTrainedModel, inputs: Mapping[str, Any], image: int, slots: Tensor) -> tuple[Piece, ...]:
        """A new line ends each row of slices but the last."""
        return self._pieces(model, inputs, "target_sizes", IMAGE, slots)

    def frame_layout(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], frame: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        return self._pieces(model, inputs, "target_sizes_videos", VIDEO, slots)

    def _pieces(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], sizes: str, kind: int, slots: Tensor
    ) -> tuple[Piece, ...]:
        side = self.sides(model, inputs)
        shapes = (inputs[sizes] // side).tolist()
        types = self.token_types(model, inputs["input_ids"])[0]
        before = int((types[: int(slots[0])] == kind).sum())
        starts = torch.tensor([0, *(high * wide for high, wide in shapes)]).cumsum(0).tolist()
        if before not in starts or before + len(slots) not in starts:
            return ()
        own = shapes[starts.index(before) : starts.index(before + len(slots))]
        runs = torch.tensor_split(slots, (slots.diff() > 1).nonzero()[:, 0] + 1)
        lines = [int(other[0]) - int(one[-1]) > 3 for one, other in pairwise(runs[1:])]  # markers, and a new line
        if len(runs) != len(own):
            return ()
        rows = 1 + sum(lines)
        columns, found, first = (len(own) - 1) // rows, [Piece(cells(*own[0]))], own[0][0] * own[0][1]
        for number, (high, wide) in enumerate(own[1:]):
            row, column = divmod(number, columns)
            box = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
            found.append(Piece(cells(high, wide, first), box))
            first += high * wide
        return tuple(found)


@register_family
class MiniCPMV47(MiniCPMV):
    """Slices lie on one canvas, whose positions count time, height and width (M-RoPE)."""

    model_types: ClassVar[Mapping[str, str]] = {"minicpmv4_7": "openbmb/MiniCPM-V-4.7"}

    def positions(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
        """``[4, batch, tokens]``: of the text, then time, height and width."""
        text = super().positions(model, inputs)
        if inputs.get("mm_token_type_ids") is None:
            return text.expand(4, -1, -1)
        names = ("input_ids", "mm_token_type_ids", "target_sizes", "target_sizes_videos", "attention_mask")
        given = {name: inputs.get(name) for name in names}
        mode = inputs.get("downsample_mode")
        space, _ = model.model.get_rope_index(**given, downsample_mode=mode)  # type: ignore[union-attr, operator]
        return torch.cat([text[None], space.to(text)])
