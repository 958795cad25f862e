"""The same question under several recipes: each one's own answer, and how likely it is under the others."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vlmattn.inspection.looking import look
from vlmattn.inspection.measuring import Inputs
from vlmattn.inspection.trace import Trace


@dataclass(frozen=True, eq=False)
class Side:
    """An answer under one recipe.

    Attributes:
        trace: the answer and what was looked at.
        logprobs: name of a recipe -> log-probability of each token of this answer under it, ``[step]``; its own is
            among them.
    """

    trace: Trace
    logprobs: Mapping[str, Tensor] = field(repr=False)


def compare_answers(
    model: PreTrainedModel,
    processor: Any,
    inputs: Inputs,
    recipes: Sequence[Any],
    *,
    max_new_tokens: int = 64,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[Side]:
    """Ask under each recipe, then have every recipe say the others' answers.

    Args:
        recipes: as for ``wrap``; "none" is the bare model.
        folder: where the traces are written, a folder for each recipe; None = they stay in memory.
        progress: show a bar.
        model, processor, inputs, max_new_tokens: as for ``look``.

    Raises:
        InputError, UnsupportedError: as for ``look``.
    """
    own: list[Trace] = []
    with tqdm(total=len(recipes) ** 2, desc="answers", unit="answer", disable=not progress) as bar:
        for number, recipe in enumerate(recipes):
            place = None if folder is None else Path(folder) / str(number)
            own.append(look(model, processor, inputs, recipe, max_new_tokens=max_new_tokens, folder=place))
            bar.update()
        sides = []
        for trace in own:
            likely = {}
            for recipe, other in zip(recipes, own, strict=True):
                if other.answer == trace.answer:
                    likely[other.recipe] = other.logprobs
                else:
                    likely[other.recipe] = look(model, processor, inputs, recipe, answer=trace.answer).logprobs
                    bar.update()
            sides.append(Side(trace, likely))
    return sides
