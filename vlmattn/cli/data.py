"""Which data a command asks about: the options, and the suites they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmattn.cli.common import errors
from vlmattn.embedded import BUNDLED
from vlmattn.errors import InputError, OptionError

if TYPE_CHECKING:
    from vlmattn.evals.suites import Suite

Visibility = Annotated[str, typer.Option(help="Of generated scenes: clear, dim, faint, tiny; comma-separated.")]
Prior = Annotated[float, typer.Option(help="Share (0..1) of generated scenes that break the co-occurrence prior.")]
Questions = Annotated[list[Path] | None, typer.Option(help="POPE question file; repeat for several splits.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images that --questions or --instances name.")]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Read images outside of --images too, where data files name them.")
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Published data of a suite, NAME=PATH: pope, amber, amber_questions, mme, mmhal, llava_bench, hallusion, choice, vqa, captions; or a table of the hub, NAME=owner/table. Repeat."
    ),
]
Instances = Annotated[Path | None, typer.Option(help="COCO instances file, for CHAIR.")]
Captions = Annotated[Path | None, typer.Option(help="COCO captions file, for CHAIR.")]
Synonyms = Annotated[Path | None, typer.Option(help="Word list in CHAIR's published format (ours otherwise).")]
Judge = Annotated[str, typer.Option(help="Of free text: rule, or a function of yours, package.module:function.")]
PromptImages = Annotated[
    str | None, typer.Option(help="Numbers of images in the prompts of which (2,3,4) and pqa (2,4), as 2,4,8.")
]
Suffix = Annotated[str, typer.Option("--prompt-suffix", help="Words after each question of POPE's files or table.")]
DropCut = Annotated[
    bool,
    typer.Option("--drop-cut-sentence", help="Leave a last sentence that was cut off out of COCO captions (CHAIR)."),
]
Limit = Annotated[int | None, typer.Option(help="Questions per file, or COCO images (500).", min=1)]
CaptionLength = Annotated[int, typer.Option(help="Length of COCO captions.", min=1)]


def counts_of(text: str | None) -> list[int] | None:
    """Numbers of images in a prompt, as typed.

    Raises:
        OptionError: not numbers from 2 on.
    """
    if text is None:
        return None
    found = [int(word) for word in text.split(",") if word.strip().isdecimal() and len(word) < 10]
    if len(found) != len(text.split(",")) or min(found, default=0) < 2:
        raise OptionError(f"--prompt-images takes numbers from 2 on, as 2,4,8; got '{text}'")
    return found


def generated(
    names: list[str],
    scenes: int,
    visibility: list[str],
    prior: float,
    seed: int | None = None,
    counts: list[int] | None = None,
) -> list[Suite]:
    """Suites on generated scenes; without a seed on those of every evaluation."""
    from vlmattn.evals.suites import World
    from vlmattn.evals.suites.generated import make_generated
    from vlmattn.evals.suites.world import EVAL_SEED

    worlds = [World(look, prior, scenes, EVAL_SEED if seed is None else seed) for look in visibility]
    return [make_generated(name, worlds, counts) for name in names]


@dataclass(frozen=True)
class Files:
    """What was given of published data, and how much of it is to be used.

    Attributes:
        data: paths by the names of suites.
        questions, images, instances, captions, synonyms: of POPE and CHAIR.
        limit: questions per file, or images.
        length: of captions and other free text, in tokens.
        judge: who rates free text.
        suffix: words after each question of POPE.
        drop_cut: whether a cut-off last sentence is left out of COCO captions.
        counts: numbers of images in the prompts of pqa.
        allow_outside: whether names of images may lead out of their folder.
    """

    data: Mapping[str, Path]
    questions: list[Path] | None
    images: Path | None
    instances: Path | None
    captions: Path | None
    synonyms: Path | None
    limit: int | None
    length: int
    judge: str
    suffix: str
    drop_cut: bool
    counts: list[int] | None
    allow_outside: bool

    def __bool__(self) -> bool:
        return bool(self.questions or self.instances or self.data)

    def suites(self, names: Sequence[str]) -> list[Suite]:
        """Those of the named suites that there are files for."""
        from vlmattn.evals.judges import load_judge
        from vlmattn.evals.suites import PQA, Chair, Pope
        from vlmattn.evals.suites.pqa import SIZES
        from vlmattn.evals.suites.published import make_published

        if self.images is None and (self.questions or self.instances):
            raise InputError("--questions and --instances need --images DIR, the folder of the images they name")
        judge = load_judge(self.judge)
        chosen: list[Suite] = []
        if self.questions and self.images and "pope" in names:
            chosen.append(Pope.on_files(self.questions, self.images, self.limit, self.allow_outside))
        if self.questions and self.images and "pqa" in names:
            sizes = self.counts or SIZES
            chosen.append(PQA.on_files(self.questions, self.images, sizes, allow_outside=self.allow_outside))
        if self.instances and self.images and "chair" in names:
            some = self.limit or 500
            coco = Chair.on_coco(
                self.instances,
                self.captions,
                self.images,
                self.synonyms,
                some,
                0,
                self.length,
                self.drop_cut,
                self.allow_outside,
            )
            chosen.append(coco)
        chosen += [
            make_published(
                name, path, self.images, self.limit, self.length, judge=judge, allow_outside=self.allow_outside
            )
            for name, path in self.data.items()
            if name in names
        ]
        return [suite.asked_with(self.suffix) if self.suffix and isinstance(suite, Pope) else suite for suite in chosen]


def paths_of(given: list[str] | None) -> dict[str, Path]:
    """Paths by the names of suites."""
    from vlmattn.evals.suites.published import PUBLISHED
    from vlmattn.registry import look_up

    found: dict[str, Path] = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise OptionError(f"--data is NAME=PATH, for example mme=MME_Benchmark; got '{text}'")
        if name in found:
            raise OptionError(f"--data {name} is given twice")
        look_up("suite of published data", name, PUBLISHED)
        found[name] = Path(path)
    return found


def lacking(names: list[str]) -> str:
    return f"no data for suite {', '.join(names)}: pope needs --questions or --data, pqa --questions, chair --instances, others --data NAME=PATH"


def note_scenes(model: str) -> None:
    if model not in BUNDLED:
        errors.print(
            "note: generated scenes were made for the bundled models; give --questions and --images for real data"
        )
