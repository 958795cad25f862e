"""Suites on generated scenes, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlmattn.evals.suites.amber_scenes import AmberSceneCaptions, AmberSceneQuestions
from vlmattn.evals.suites.base import Suite
from vlmattn.evals.suites.chair import Chair
from vlmattn.evals.suites.mme_scenes import MMEScenes
from vlmattn.evals.suites.mmhal_scenes import MMHalScenes
from vlmattn.evals.suites.pope import Pope
from vlmattn.evals.suites.pqa import PQA, SIZES
from vlmattn.evals.suites.which import Which
from vlmattn.evals.suites.world import World
from vlmattn.registry import look_up

GENERATED: dict[str, Callable[[Sequence[World], Sequence[int] | None], Suite]] = {
    "pope": lambda worlds, counts: Pope.on_scenes(worlds),
    "chair": lambda worlds, counts: Chair.on_scenes(worlds),
    "which": lambda worlds, counts: Which(worlds[-1], counts or (2, 3, 4)),
    "pqa": lambda worlds, counts: PQA.on_scenes(worlds[-1], counts or SIZES),
    "amber": lambda worlds, counts: AmberSceneCaptions(worlds),
    "amber_questions": lambda worlds, counts: AmberSceneQuestions(worlds),
    "mme": lambda worlds, counts: MMEScenes(worlds),
    "mmhal": lambda worlds, counts: MMHalScenes(worlds),
}


def make_generated(name: str, worlds: Sequence[World], counts: Sequence[int] | None = None) -> Suite:
    """The suite ``name`` on some worlds; ``which`` and ``pqa`` take the last one only.

    Args:
        counts: numbers of images in the prompts of ``which`` and ``pqa``; None for their own.

    Raises:
        UnknownNameError: no such suite.
        OptionError: more images than scenes, or a number below 2.
    """
    return look_up("suite", name, GENERATED)(worlds, counts)
