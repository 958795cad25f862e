"""Which questions a report shows, and where the bare model looks when it answers them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmattn.errors import VlmattnError
from vlmattn.evals.prompts import encode
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.inspection import image_attention

if TYPE_CHECKING:
    from vlmattn.evals.runner import Result

EXAMPLES = 12  # of a suite


def gallery(suite: Suite, result: Result, most: int = EXAMPLES) -> list[Sample]:
    """Samples that a preset answers rightly and ``none`` wrongly, or the other way round; every preset in turn."""
    scored, presets = result.scored[suite.name], list(result.summary["recipes"])[1:]
    differing = {
        preset: [sample for sample in scored.samples if scored.right(preset, sample) != scored.right("none", sample)]
        for preset in presets
    }
    found: dict[str, Sample] = {}
    for turn in range(max(map(len, differing.values()), default=0)):
        for own in differing.values():
            if turn < len(own) and len(found) < most:
                found.setdefault(own[turn].id, own[turn])
    return list(found.values())


def attention_of(model: Any, processor: Any, result: Result) -> dict[tuple[str, str], list[Any]]:
    """By suite and sample id of the gallery: the bare model's attention on each image, as ``image_attention`` says it.

    A model that cannot be measured has none; the report is complete without it.
    """
    found: dict[tuple[str, str], list[Any]] = {}
    for suite in result.suites:
        for sample in gallery(suite, result):
            inputs = encode(model, processor, [sample.prompt], [sample.images()])
            try:
                found[suite.name, sample.id] = image_attention(model, processor, inputs)
            except VlmattnError:
                return found
    return found
