"""Step 3.7: parts of the picture, then the whole in small, each between markers; layers with windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedModel

from vlmattn.models.inputs import share_out
from vlmattn.models.registry import register_family
from vlmattn.models.tiles import Tiled


@register_family
class Step3p7(Tiled):
    """The whole picture comes last and ends an image."""

    model_types: ClassVar[Mapping[str, str]] = {"step3p7": "stepfun-ai/Step-3.7-Flash"}
    last: ClassVar[str] = "<im_start>"

    def per_row(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
        if inputs.get("pixel_values") is None:
            return {}
        runs = (self.token_types(model, inputs["input_ids"]) != 0).int()
        starts = ((runs[:, 1:] - runs[:, :-1]) == 1).sum(1).tolist()
        parts = inputs.get("num_local_patches")
        counts = [0] * len(inputs["pixel_values"]) if parts is None else [int(count) for count in parts]
        found = {"pixel_values": share_out(starts, [(1 + count, 1) for count in counts])}
        if parts is not None:
            found["pixel_values_local"] = share_out(starts, [(1 + count, count) for count in counts])
            found["num_local_patches"] = found["pixel_values"]
        return found
