"""Idefics2: 64 perceiver tokens for each image, or for each of the five parts of a split one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmattn.models.base import Family
from vlmattn.models.registry import register_family
from vlmattn.models.tiles import real_tiles
from vlmattn.request import TEXT, number_images

_PARTS = 5


@register_family
class Idefics2(Family):
    """Parts of an image have one <fake_token_around_image> between them, and so have adjacent images: runs with one
    token between them are images by fives, if there are that many, else images of their own."""

    model_types: ClassVar[Mapping[str, str]] = {"idefics2": "HuggingFaceM4/idefics2-8b"}
    by_sequence: ClassVar[bool] = True

    def decoder(self, model: PreTrainedModel) -> nn.Module:
        return model.model.text_model  # type: ignore[no-any-return, union-attr]

    def numbers_of_runs(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        types: Tensor,
        marker_ids: Mapping[str, int] | None = None,
    ) -> Tensor:
        runs = number_images(types, None)
        found = torch.full_like(runs, -1)
        for row, numbers in enumerate(runs.cpu()):  # once per prompt
            slots = [(numbers == run).nonzero().flatten() for run in range(int(numbers.max()) + 1)]
            groups: list[list[Tensor]] = []
            for run in slots:
                follows = bool(groups) and int(run[0]) - int(groups[-1][-1][-1]) == 2
                groups = [*groups[:-1], [*groups[-1], run]] if follows else [*groups, [run]]
            images = 0
            for group in groups:
                parts = _PARTS if len(group) % _PARTS == 0 else 1
                for number, run in enumerate(group):
                    found[row, run.to(found.device)] = images + number // parts
                images += len(group) // parts
        assert bool(((found >= 0) == (types != TEXT)).all())
        return found

    def unpadded(self, model: PreTrainedModel, inputs: Mapping[str, Any], name: str, rows: slice) -> tuple[slice, ...]:
        return real_tiles(inputs[name][rows])
