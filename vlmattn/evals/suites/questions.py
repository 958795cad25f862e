"""Questions about generated scenes that the bundled model was taught to answer, and how their answers are read.

It was never asked about numbers by yes and no, so a count is always asked openly. Where a suite needs yes or no, a
number is held against the answer: an answer that says this number counts as yes, another number as no.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from vlmattn.embedded.scenes import COLOURS, IMAGE_SIZE, PREFERRED_COLOUR, Scene, Thing
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.world import USUAL_COUNT, World, settings_of
from vlmattn.evals.suites.yesno import YesNo

HOW_MANY = "How many objects are there?"
OTHER_SIDE = {"left": "right", "right": "left"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def what_colour(category: str) -> str:
    return f"What color is the {category}?"


def is_colour(category: str, colour: str) -> str:
    return f"Is the {category} {colour}?"


def on_side(category: str, side: str) -> str:
    return f"Is the {category} on the {side} side?"


def side_of(thing: Thing) -> str:
    return "left" if thing.x < IMAGE_SIZE / 2 else "right"


def clearest_side(scene: Scene) -> Thing:
    """The thing whose side is beyond doubt: the one farthest from the middle."""
    return max(scene.things, key=lambda thing: abs(thing.x - IMAGE_SIZE / 2))


def wrong_colour(thing: Thing, rng: np.random.Generator) -> str:
    """The colour that things of its kind usually have, or any other where it has that one."""
    usual = PREFERRED_COLOUR[thing.category]
    return usual if usual != thing.colour else str(rng.choice([name for name in COLOURS if name != usual]))


def wrong_count(count: int) -> int:
    """A wrong number of things: the usual one, or the next where that is the truth."""
    return USUAL_COUNT if count != USUAL_COUNT else USUAL_COUNT + 1


def read_colour(answer: str) -> str | None:
    """The first colour of the scenes among the words of an answer."""
    found = re.search(rf"\b(?:{'|'.join(COLOURS)})\b", answer.lower())
    return found.group() if found else None


def read_numbers(answer: str) -> list[int]:
    """Whole numbers of an answer, in digits or words up to ten; "one" is none in "no one", "the one", "one of"."""
    text = re.sub(r"\b(?:no|the|this|that|which|each|every|any|some)[ -]one\b|\bone of\b", "", answer.lower())
    words = re.findall(rf"(?<![\w.,-])\d{{1,9}}(?![\w-]|[.,]\d)|\b(?:{'|'.join(NUMBERS)})\b", text)
    return [NUMBERS.index(word) if word in NUMBERS else int(word) for word in words]


def read_number(answer: str) -> int | None:
    """The first of the numbers that ``read_numbers`` finds."""
    return next(iter(read_numbers(answer)), None)


def with_any_count(world: World) -> World:
    """The same world with one to five things in a scene: where all have three, counting would need no look."""
    return replace(world, things=None)


def sample_of(world: World, index: int, key: str, splits: tuple[str, ...], prompt: str, truth: Any) -> Sample:
    """A question about one scene; ``key`` is its id within the world."""
    return Sample(f"{world.name}/{key}", str(index), world.name, splits, prompt, partial(world.image, index), truth)


class AgainstNumbers(YesNo):
    """Yes/no questions about scenes of one to five things; answers to ``HOW_MANY`` are held against a number."""

    def __init__(self, worlds: Sequence[World]) -> None:
        worlds = [with_any_count(world) for world in worlds]
        pairs = [pair for world in worlds for index in range(world.count) for pair in self.asked(world, index)]
        self._numbers = {sample.id: number for sample, number in pairs}
        super().__init__((sample for sample, _ in pairs), settings_of(worlds))

    @staticmethod
    @abstractmethod
    def asked(world: World, index: int) -> Iterator[tuple[Sample, int | None]]:
        """The questions about a scene, each with the number that its answer is held against, if any."""

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        number = self._numbers[sample.id]
        if number is not None:
            said = read_number(answer)
            answer = "" if said is None else "yes" if said == number else "no"
        return super().score(sample, answer)

    def expected(self, sample: Sample) -> str:
        number = self._numbers[sample.id]
        if number is None:
            return super().expected(sample)
        return NUMBERS[number] if sample.truth else f"not {NUMBERS[number]}"
