"""AMBER (arXiv 2311.07397) on generated scenes, where the truth is known: captions, and yes/no questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlmattn.embedded.scenes import CATEGORIES, SYNONYMS, Scene
from vlmattn.embedded.text import DESCRIBE, existence_question
from vlmattn.evals.suites.amber import AmberCaptions, AmberQuestions, Words
from vlmattn.evals.suites.base import Sample
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


def _traps(scene: Scene) -> tuple[str, ...]:
    """For each thing of a scene the absent category that most often goes with it."""
    return tuple(absent_objects(scene, "adversarial", np.random.default_rng(0)))  # this rule draws nothing


class AmberSceneCaptions(AmberCaptions):
    """Captions against the categories of the scene; traps are the absent categories that most often go with them.

    Nothing is left to word vectors here: the vocabulary has every word of the bundled model for a thing.

    Args:
        worlds: the scenes.
        max_new_tokens: length of captions.
    """

    title = "AMBER, captions of scenes: words that are not in the image"

    def __init__(self, worlds: Sequence[World], max_new_tokens: int = 48) -> None:
        self.max_new_tokens = max_new_tokens
        self.settings = {"scenes": [world.settings() for world in worlds]}
        self._near = {name: list(SYNONYMS.get(name, ())) for name in CATEGORIES}
        self._vocabulary = {*self._near, *(word for words in self._near.values() for word in words)}
        self._skipped = set()
        self._samples = []
        for world in worlds:
            for index in range(world.count):
                scene = world.scene(index)
                truth = Words(scene.categories, _traps(scene))
                self._samples.append(sample_of(world, index, str(index), ("captions",), DESCRIBE, truth))


class AmberSceneQuestions(AmberQuestions):
    """Four splits about scenes of one to five things; *no* is the positive class.

    existence: absent things only, as in AMBER, those that most often go with the present ones. state: the colour of
    each thing, in turn the true one and the usual one (any other where they are the same). number: how many, held
    against a number. relation: the side of the thing that stands farthest from the middle.

    Args:
        worlds: the scenes.
    """

    title = "AMBER, questions about scenes: existence, colour, number, side"

    def __init__(self, worlds: Sequence[World]) -> None:
        worlds = [with_any_count(world) for world in worlds]
        self.settings = {"scenes": [world.settings() for world in worlds]}
        self._numbers: dict[str, int] = {}  # what the answers about numbers are held against
        self._samples = [
            sample for world in worlds for index in range(world.count) for sample in self._of_scene(world, index)
        ]

    def _of_scene(self, world: World, index: int) -> Iterator[Sample]:
        scene, rng = world.scene(index), np.random.default_rng([world.seed, index])
        for name in _traps(scene):
            yield sample_of(world, index, f"{index}/existence/{name}", ("existence",), existence_question(name), False)
        for number, thing in enumerate(scene.things):
            true = (index + number) % 2 == 0
            prompt = is_colour(thing.category, thing.colour if true else wrong_colour(thing, rng))
            yield sample_of(world, index, f"{index}/state/{thing.category}", ("state",), prompt, true)
        true = index % 2 == 0
        sample = sample_of(world, index, f"{index}/number", ("number",), HOW_MANY, true)
        self._numbers[sample.id] = len(scene.things) if true else wrong_count(len(scene.things))
        yield sample
        thing = clearest_side(scene)
        prompt = on_side(thing.category, side_of(thing) if true else OTHER_SIDE[side_of(thing)])
        yield sample_of(world, index, f"{index}/relation", ("relation",), prompt, true)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return super().score(sample, as_yes_or_no(answer, self._numbers.get(sample.id)))

    def expected(self, sample: Sample) -> str:
        number = self._numbers.get(sample.id)
        return super().expected(sample) if number is None else number_in_words(number, sample.truth)
