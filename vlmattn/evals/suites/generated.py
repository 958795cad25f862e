"""Suites on generated scenes, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vlmattn.errors import UnknownNameError
from vlmattn.evals.suites.amber_scenes import AmberSceneCaptions, AmberSceneQuestions
from vlmattn.evals.suites.base import Suite
from vlmattn.evals.suites.chair import Chair
from vlmattn.evals.suites.mme_scenes import MMEScenes
from vlmattn.evals.suites.mmhal_scenes import MMHalScenes
from vlmattn.evals.suites.pope import Pope
from vlmattn.evals.suites.pqa import PQA
from vlmattn.evals.suites.which import Which
from vlmattn.evals.suites.world import World

GENERATED: Mapping[str, Callable[[Sequence[World]], Suite]] = {
    "pope": Pope.on_scenes,
    "chair": Chair.on_scenes,
    "which": lambda worlds: Which(worlds[-1]),
    "pqa": lambda worlds: PQA.on_scenes(worlds[-1]),
    "amber": AmberSceneCaptions,
    "amber_questions": AmberSceneQuestions,
    "mme": MMEScenes,
    "mmhal": MMHalScenes,
}


def make_generated(name: str, worlds: Sequence[World]) -> Suite:
    """The suite ``name`` on some worlds; ``which`` and ``pqa`` take the last one only.

    Raises:
        UnknownNameError: no such suite.
    """
    if name not in GENERATED:
        raise UnknownNameError("suite", name, GENERATED)
    return GENERATED[name](worlds)
