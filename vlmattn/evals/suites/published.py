"""Suites on published data that one file or folder (and a folder of images) is enough for, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmattn.errors import InputError, UnknownNameError
from vlmattn.evals.suites.amber import AmberCaptions, AmberQuestions
from vlmattn.evals.suites.base import Suite
from vlmattn.evals.suites.choice import Choice
from vlmattn.evals.suites.hallusion import HallusionBench
from vlmattn.evals.suites.mme import MME
from vlmattn.evals.suites.vqa import VQA


@dataclass(frozen=True)
class Published:
    """How to make a suite of ``path``.

    Attributes:
        make: from path, folder of images, limit and length of captions.
        data: what the path is, in words.
        images: whether it needs a folder of images of its own.
    """

    make: Callable[[Path, Path, int | None, int], Suite]
    data: str
    images: bool = True


PUBLISHED: Mapping[str, Published] = {
    "amber": Published(
        AmberCaptions, "AMBER's data folder (annotations.json, query_generative.json, relation.json, ...)"
    ),
    "amber_questions": Published(
        lambda path, images, limit, length: AmberQuestions(path, images, limit),
        "AMBER's data folder (annotations.json, query_all.json)",
    ),
    "mme": Published(lambda path, images, limit, length: MME(path, limit), "MME's folder of subtasks", images=False),
    "choice": Published(
        lambda path, images, limit, length: Choice(path, images, limit),
        "questions in MuirBench's or BLINK's form (JSON)",
    ),
    "vqa": Published(
        lambda path, images, limit, length: VQA(path, images, limit), "VQAv2's folder of questions and annotations"
    ),
    "hallusion": Published(
        lambda path, images, limit, length: HallusionBench(path, images, limit), "HallusionBench.json"
    ),
}


def make_published(name: str, path: Path, images: Path | None, limit: int | None, length: int) -> Suite:
    """The suite ``name`` on ``path``.

    Raises:
        UnknownNameError: no such suite.
        InputError: it needs a folder of images, or its data are not there or in another form.
    """
    if name not in PUBLISHED:
        raise UnknownNameError("suite of published data", name, PUBLISHED)
    kind = PUBLISHED[name]
    if kind.images and images is None:
        raise InputError(f"suite {name} needs --images DIR, the folder of its images")
    return kind.make(path, images or path, limit, length)
