"""Prompts in which the place of what matters is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from vlmattn.errors import InputError
from vlmattn.inspection.measuring import Inputs, prepared_one


@dataclass(frozen=True, eq=False)
class Span:
    """A prompt and where its relevant context is.

    Attributes:
        inputs: what the processor returns for this one prompt, without padding.
        start: first relevant slot of ``input_ids``.
        stop: the slot after the last one.
        answer: first slot of an answer that ends the prompt, for ``fit_directions``: its rows should look at the span.
            None = there is none, and the last row stands for it.
    """

    inputs: Inputs
    start: int
    stop: int
    answer: int | None = None


def prepared_spans(model: PreTrainedModel, spans: Sequence[Span]) -> list[dict[str, Any]]:
    """The prompts of the spans on the model's device.

    Raises:
        InputError: no spans, one whose inputs are not a single prompt, one that is not within its prompt.
    """
    if not spans:
        raise InputError("there is nothing to measure; give at least one Span")
    prompts = [prepared_one(model, span.inputs) for span in spans]
    for span, prompt in zip(spans, prompts, strict=True):
        length = prompt["input_ids"].shape[1]
        if not 0 <= span.start < span.stop <= length:
            raise InputError(f"the span {span.start}..{span.stop} is not within the {length} tokens of its prompt")
        if span.answer is not None and not 0 <= span.answer < length:
            raise InputError(f"the answer cannot begin at {span.answer} in the {length} tokens of its prompt")
    return prompts
