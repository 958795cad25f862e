"""MME (arXiv 2306.13394), its hallucination subtasks, on generated scenes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlmattn.embedded.scenes import PREFERRED_COLOUR, Scene
from vlmattn.embedded.text import existence_question
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.mme import MME
from vlmattn.evals.suites.questions import (
    HOW_MANY,
    OTHER_SIDE,
    AgainstNumbers,
    clearest_side,
    is_colour,
    on_side,
    sample_of,
    side_of,
    wrong_colour,
    wrong_count,
)
from vlmattn.evals.suites.registry import suite
from vlmattn.evals.suites.world import World, absent_objects


@suite("mme")
class MMEScenes(AgainstNumbers, MME):
    """A pair of questions, yes and no, about every scene (of one to five things) for each of four subtasks.

    existence: a thing, and the absent one that most often goes with it. count: how many, held against the truth and
    against the usual number (another where it is the truth). position: the side of the thing farthest from the middle.
    colour: the true one, and the usual one of such a thing; things that do not have it are preferred.
    """

    title = "MME on scenes: two questions per image, both must be right"

    @staticmethod
    def asked(world: World, index: int) -> Iterator[tuple[Sample, int | None]]:
        scene = world.scene(index)

        def about(task: str, number: int, prompt: str) -> Sample:
            return sample_of(world, index, f"{task}/{index}/{number}", (task,), prompt, number == 0)

        for task, pair in _pairs(scene, np.random.default_rng([world.seed, index])):
            for number, prompt in enumerate(pair):
                yield about(task, number, prompt), None
        for number, held in enumerate((len(scene.things), wrong_count(len(scene.things)))):
            yield about("count", number, HOW_MANY), held


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
