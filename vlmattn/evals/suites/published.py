"""Suites on published data that one file or folder (and a folder of images) is enough for, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlmattn.errors import InputError
from vlmattn.evals.judges import Judge
from vlmattn.evals.suites.amber import AmberCaptions, AmberQuestions
from vlmattn.evals.suites.base import Suite
from vlmattn.evals.suites.captions import Captions
from vlmattn.evals.suites.choice import Choice
from vlmattn.evals.suites.hallusion import HallusionBench
from vlmattn.evals.suites.llava_bench import LlavaBench
from vlmattn.evals.suites.mme import MME
from vlmattn.evals.suites.mmhal import MMHal
from vlmattn.evals.suites.pope import Pope
from vlmattn.evals.suites.tables import Table, is_table, load_table
from vlmattn.evals.suites.vqa import VQA
from vlmattn.registry import look_up


@dataclass(frozen=True)
class Given:
    """What a suite is made of.

    Attributes:
        path: its file or folder.
        images: folder of its images.
        limit: questions, images or the like to use; None for all.
        length: of captions and other free text, in tokens.
        judge: who rates free text; None for ``RuleJudge``.
        allow_outside: whether the names of images may lead out of their folder.
    """

    path: Path
    images: Path
    limit: int | None
    length: int
    judge: Judge | None
    allow_outside: bool


@dataclass(frozen=True)
class Published:
    """How to make a suite.

    Attributes:
        make: it, from what is given.
        data: what the path is, in words.
        images: whether it needs a folder of images of its own.
        table: makes it of a table of the hub, given the limit too.
    """

    make: Callable[[Given], Suite]
    data: str
    images: bool = True
    table: Callable[[Table, int | None], Suite] | None = None


PUBLISHED: dict[str, Published] = {
    "pope": Published(
        lambda given: Pope.on_files([given.path], given.images, given.limit, given.allow_outside),
        "a POPE question file, or the table lmms-lab/POPE",
        table=Pope.on_table,
    ),
    "amber": Published(
        lambda given: AmberCaptions(given.path, given.images, given.limit, given.length, given.allow_outside),
        "AMBER's data folder (annotations.json, relation.json, query/query_generative.json or query_generative.json, ...)",
    ),
    "amber_questions": Published(
        lambda given: AmberQuestions(given.path, given.images, given.limit, given.allow_outside),
        "AMBER's data folder (annotations.json, query/query_all.json or query_all.json)",
    ),
    "mme": Published(
        lambda given: MME.on_folder(given.path, given.limit, given.allow_outside),
        "MME's folder of subtasks, or the table lmms-lab/MME",
        images=False,
        table=MME.on_table,
    ),
    "choice": Published(
        lambda given: Choice.on_file(given.path, given.images, given.limit, given.allow_outside),
        "questions in MuirBench's or BLINK's form (JSON), or the tables MUIRBENCH/MUIRBENCH and BLINK-Benchmark/BLINK",
        table=Choice.on_table,
    ),
    "vqa": Published(
        lambda given: VQA.on_folder(given.path, given.images, given.limit, given.allow_outside),
        "VQAv2's folder of questions and annotations, or the table lmms-lab/VQAv2",
        table=VQA.on_table,
    ),
    "hallusion": Published(
        lambda given: HallusionBench.on_file(given.path, given.images, given.limit, given.allow_outside),
        "HallusionBench.json, or the table lmms-lab/HallusionBench",
        table=HallusionBench.on_table,
    ),
    "mmhal": Published(
        lambda given: MMHal(given.path, given.images, given.limit, given.length, given.judge, given.allow_outside),
        "MMHal-Bench's response_template.json",
    ),
    "llava_bench": Published(
        lambda given: LlavaBench(given.path, given.images, given.limit, given.length, given.judge, given.allow_outside),
        "LLaVA-Bench's folder (questions.jsonl, context.jsonl, answers_gpt4.jsonl)",
    ),
    "captions": Published(
        lambda given: Captions(given.path, given.images, given.limit, given.length, given.allow_outside),
        "a COCO captions file (captions_val2014.json)",
    ),
}


def make_published(
    name: str,
    path: Path,
    images: Path | None,
    limit: int | None,
    length: int,
    *,
    judge: Judge | None = None,
    allow_outside: bool = False,
) -> Suite:
    """The suite ``name`` on ``path``; ``judge`` rates the answers of those with free text.

    Names of images in the data stay within ``images`` unless ``allow_outside``.

    A path that is not there but looks like ``owner/name`` is a table of the hub, and a folder of parquet files is one
    too; see ``load_table``.

    Raises:
        UnknownNameError: no such suite.
        InputError: it needs a folder of images, or its data are not there or in another form.
    """
    kind = look_up("suite of published data", name, PUBLISHED)
    if kind.table is not None and is_table(path):
        return kind.table(load_table(name, path, allow_outside), limit)
    if not path.exists():
        hint = "; a table of the hub is owner/name" if kind.table is not None else ""
        raise InputError(f"suite {name}: no such file or folder: {path}{hint}")
    if kind.images and images is None:
        raise InputError(f"suite {name} needs --images DIR, the folder of its images")
    return kind.make(Given(path, images or path, limit, length, judge, allow_outside))
