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
from vlmattn.evals.suites.world import World, absent_objects, settings_of


def _traps(scene: Scene) -> tuple[str, ...]:
    """For each thing of a scene the absent category that most often goes with it."""
    return tuple(absent_objects(scene, "adversarial", np.random.default_rng(0)))  # this rule draws nothing


@suite("amber")
class AmberSceneCaptions(AmberCaptions):
    """Captions against the categories of the scene; traps are the absent categories that most often go with them.

    Nothing is left to word vectors here: the vocabulary has every word of the bundled model for a thing.

    Args:
        worlds: the scenes.
    """

    title = "AMBER, captions of scenes: words that are not in the image"

    def __init__(self, worlds: Sequence[World], max_new_tokens: int = 48) -> None:
        samples = []
        for world in worlds:
            for index in range(world.count):
                scene = world.scene(index)
                truth = Words(scene.categories, _traps(scene))
                samples.append(sample_of(world, index, str(index), ("captions",), DESCRIBE, truth))
        near = {name: SYNONYMS.get(name, ()) for name in CATEGORIES}
        super().__init__(samples, settings_of(worlds), near, (), max_new_tokens)


@suite("amber_questions")
class AmberSceneQuestions(AgainstNumbers, AmberQuestions):
    """Four splits about scenes of one to five things; *no* is the positive class.

    existence: absent things only, as in AMBER, those that most often go with the present ones. state: the colour of
    each thing, in turn the true one and the usual one (any other where they are the same). number: how many, held
    against a number. relation: the side of the thing that stands farthest from the middle.
    """

    title = "AMBER, questions about scenes: existence, colour, number, side"

    @staticmethod
    def asked(world: World, index: int) -> Iterator[tuple[Sample, int | None]]:
        scene, rng = world.scene(index), np.random.default_rng([world.seed, index])

        def about(key: str, split: str, prompt: str, truth: bool) -> Sample:
            return sample_of(world, index, f"{index}/{key}", (split,), prompt, truth)

        for name in _traps(scene):
            yield about(f"existence/{name}", "existence", existence_question(name), False), None
        for number, thing in enumerate(scene.things):
            true = (index + number) % 2 == 0
            prompt = is_colour(thing.category, thing.colour if true else wrong_colour(thing, rng))
            yield about(f"state/{thing.category}", "state", prompt, true), None
        true, count = index % 2 == 0, len(scene.things)
        yield about("number", "number", HOW_MANY, true), count if true else wrong_count(count)
        thing = clearest_side(scene)
        prompt = on_side(thing.category, side_of(thing) if true else OTHER_SIDE[side_of(thing)])
        yield about("relation", "relation", prompt, true), None
