"""MME (arXiv 2306.13394), its hallucination subtasks, on generated scenes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlmattn.embedded.scenes import PREFERRED_COLOUR, Scene
from vlmattn.embedded.text import existence_question
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.mme import MME
from vlmattn.evals.suites.questions import (
    HOW_MANY,
    OTHER_SIDE,
    as_yes_or_no,
    clearest_side,
    is_colour,
    number_in_words,
    on_side,
    sample_of,
    side_of,
    with_any_count,
    wrong_colour,
    wrong_count,
)
from vlmattn.evals.suites.world import World, absent_objects


class MMEScenes(MME):
    """A pair of questions, yes and no, about every scene (of one to five things) for each of four subtasks.

    existence: a thing, and the absent one that most often goes with it. count: how many, held against the truth and
    against the usual number (another where it is the truth). position: the side of the thing farthest from the middle.
    colour: the true one, and the usual one of such a thing; things that do not have it are preferred.

    Args:
        worlds: the scenes.
    """

    title = "MME on scenes: two questions per image, both must be right"

    def __init__(self, worlds: Sequence[World]) -> None:
        worlds = [with_any_count(world) for world in worlds]
        self.settings = {"scenes": [world.settings() for world in worlds]}
        self._samples = []
        self._numbers: dict[str, int] = {}  # what the answers about numbers are held against
        for world in worlds:
            for index in range(world.count):
                for task, pair in _pairs(world.scene(index), np.random.default_rng([world.seed, index])):
                    for number, prompt in enumerate(pair):
                        key = f"{task}/{index}/{number}"
                        self._samples.append(sample_of(world, index, key, (task,), prompt, number == 0))
                for number, held in enumerate(_counts(world.scene(index))):
                    sample = sample_of(world, index, f"count/{index}/{number}", ("count",), HOW_MANY, number == 0)
                    self._numbers[sample.id] = held
                    self._samples.append(sample)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return super().score(sample, as_yes_or_no(answer, self._numbers.get(sample.id)))

    def expected(self, sample: Sample) -> str:
        number = self._numbers.get(sample.id)
        return super().expected(sample) if number is None else number_in_words(number, sample.truth)


def _counts(scene: Scene) -> tuple[int, int]:
    return len(scene.things), wrong_count(len(scene.things))


def _pairs(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, tuple[str, str]]]:
    """Per subtask the question with the answer yes and the one with no."""
    place = int(rng.integers(len(scene.things)))
    absent = absent_objects(scene, "adversarial", rng)[place]
    yield "existence", (existence_question(scene.categories[place]), existence_question(absent))
    thing = clearest_side(scene)
    side = side_of(thing)
    yield "position", (on_side(thing.category, side), on_side(thing.category, OTHER_SIDE[side]))
    unusual = [thing for thing in scene.things if thing.colour != PREFERRED_COLOUR[thing.category]]
    choice = unusual or scene.things
    thing = choice[int(rng.integers(len(choice)))]
    yield "colour", (is_colour(thing.category, thing.colour), is_colour(thing.category, wrong_colour(thing, rng)))
