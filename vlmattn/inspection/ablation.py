"""One head after another replaced, in copies of a prompt that run together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError, quoted
from vlmattn.inspection.measuring import INFO, only
from vlmattn.interventions import Intervention
from vlmattn.kernels import AttentionEdit, HeadPart
from vlmattn.options import MethodInfo
from vlmattn.request import LayerContext

Ablation = Literal["mean", "zero"]
"""What stands for a head's output: its mean over prompts, or nothing."""


def check(ablation: str, batch_size: int) -> None:
    """Raise ``OptionError`` for another ablation, or less than one copy in a forward."""
    if ablation not in ("mean", "zero"):
        raise OptionError(f"ablation must be 'mean' or 'zero', got {quoted(ablation)}")
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, got {batch_size}")


@dataclass(frozen=True, eq=False)
class Ablations:
    """Every head of a model replaced in turn, in every row of a prompt.

    Attributes:
        means: mean output of each head ``[layers, heads, dim]``, which stands for it with ``ablation`` "mean".
        copies: of the prompt in one forward; each has another head replaced.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    means: Tensor
    ablation: Ablation
    copies: int

    @property
    def places(self) -> list[tuple[int, int] | None]:
        """The head that is replaced in one copy after another: none at first and in the copies that are left over."""
        heads = [(layer, head) for layer in range(self.anatomy.layers) for head in range(self.anatomy.heads)]
        return [None, *heads, *[None] * (-(1 + len(heads)) % self.copies)]  # batches of one shape round alike

    def bar(self, prompts: int, progress: bool) -> tqdm[Any]:
        """A bar over all copies of so many prompts."""
        return tqdm(total=len(self.places) * prompts, desc="heads", unit="row", disable=not progress)

    def run(self, inputs: dict[str, Any], rows: int, read: Callable[[Tensor], Tensor], bar: tqdm[Any]) -> Tensor:
        """What each head does to a number that is read from the logits of a prompt, or of a batch of prompts.

        Args:
            rows: how many of the last ones have logits.
            read: makes one number ``[copies]`` of logits ``[copies, batch, rows, words]``, float32.
            bar: goes on by one for each copy.

        Returns:
            The number of the bare model less that of the model without the head, ``[layers, heads]``, on the cpu.
        """
        batch, places, found = len(inputs["input_ids"]), self.places, []
        instead = self.means if self.ablation == "mean" else torch.zeros_like(self.means)
        copies = {name: _repeated(value, self.copies) for name, value in inputs.items()}
        for start in range(0, len(places), self.copies):
            chosen = tuple(place for place in places[start : start + self.copies] for _ in range(batch))
            with only(self.model, _Replace(places=chosen, instead=instead)):
                logits = self.model(**copies, use_cache=False, logits_to_keep=rows).logits[:, -rows:].float()
            found.append(read(logits.unflatten(0, (self.copies, batch))).cpu())
            bar.update(self.copies)
        values = torch.cat(found)
        effects = values[0] - values[1 : 1 + self.anatomy.layers * self.anatomy.heads]
        return effects.view(self.anatomy.layers, self.anatomy.heads)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Replace(Intervention):
    """In row n of the batch the output of the head ``places[n]`` is ``instead`` ``[layers, heads, dim]``."""

    info: ClassVar[MethodInfo] = INFO
    places: tuple[tuple[int, int] | None, ...]
    instead: Tensor

    def edit(self, context: LayerContext) -> AttentionEdit:
        instead = self.instead[context.layer].to(context.device)
        gain = instead.new_ones(len(self.places), len(instead))
        offset = torch.zeros_like(instead).repeat(len(self.places), 1, 1)
        for row, place in enumerate(self.places):
            if place is not None and place[0] == context.layer:
                gain[row, place[1]], offset[row, place[1]] = 0, instead[place[1]]
        return AttentionEdit() if bool((gain == 1).all()) else AttentionEdit(head_gain=(HeadPart(gain, None, offset),))


def _repeated(value: Any, times: int) -> Any:
    """A processor output's value for copies of the prompts: rows and images both repeat as a whole."""
    return torch.cat([value] * times) if isinstance(value, Tensor) else value
