"""Open questions about generated scenes, after MMHal-Bench (arXiv 2309.14525), with a key in place of a judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlmattn.embedded.scenes import PREFERRED_COLOUR
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.questions import (
    HOW_MANY,
    NUMBERS,
    read_colour,
    read_number,
    sample_of,
    what_colour,
    with_any_count,
)
from vlmattn.evals.suites.registry import suite
from vlmattn.evals.suites.world import USUAL_COUNT, World, settings_of


@suite("mmhal")
class MMHalScenes(Suite):
    """The colour of every thing, and how many there are, in scenes of one to five things.

    prior = answers that are what is usual / questions where that is wrong. What is usual is the preferred colour of
    such a thing and three things. Splits tell apart where the prior agrees with the truth and where it disagrees. An
    answer is the first colour, or number, among its words.

    Args:
        worlds: the scenes.
    """

    title = "Open questions about scenes: colour, count (after MMHal-Bench, no judge)"
    fields = ("right", "asked", "prior", "prior_asked", "unread")
    metrics = (
        Metric("accuracy", {"right": 1}, {"asked": 1}, "share of right answers"),
        Metric("prior", {"prior": 1}, {"prior_asked": 1}, "answers by the prior where it is wrong", better="lower"),
        Metric("unread", {"unread": 1}, {"asked": 1}, "answers with no colour or number", better="lower"),
    )
    max_new_tokens = 16

    def __init__(self, worlds: Sequence[World]) -> None:
        worlds = [with_any_count(world) for world in worlds]
        samples = (one for world in worlds for index in range(world.count) for one in _of_scene(world, index))
        super().__init__(samples, settings_of(worlds))

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        truth, usual = sample.truth
        said = _read(sample, answer)
        return {
            "right": float(said == truth),
            "asked": 1.0,
            "prior": float(said == usual != truth),
            "prior_asked": float(usual != truth),
            "unread": float(said is None),
        }

    def expected(self, sample: Sample) -> str:
        return str(sample.truth[0])


def _read(sample: Sample, answer: str) -> str | None:
    if sample.prompt != HOW_MANY:
        return read_colour(answer)
    number = read_number(answer)
    return NUMBERS[number] if number is not None and number < len(NUMBERS) else None


def _of_scene(world: World, index: int) -> Iterator[Sample]:
    scene = world.scene(index)
    for thing in scene.things:
        prompt, truth = what_colour(thing.category), (thing.colour, PREFERRED_COLOUR[thing.category])
        yield sample_of(world, index, f"colour/{index}/{thing.category}", _splits("colour", truth), prompt, truth)
    truth = (NUMBERS[len(scene.things)], NUMBERS[USUAL_COUNT])
    yield sample_of(world, index, f"count/{index}", _splits("count", truth), HOW_MANY, truth)


def _splits(kind: str, truth: tuple[str, str]) -> tuple[str, str]:
    """``truth``: what is true and what is usual."""
    return kind, f"{kind}, prior {'agrees' if truth[0] == truth[1] else 'disagrees'}"
