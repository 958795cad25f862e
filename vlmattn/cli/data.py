"""Which data a command asks about: the options, and the suites they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmattn.cli.common import errors
from vlmattn.embedded import BUNDLED
from vlmattn.errors import InputError, OptionError

if TYPE_CHECKING:
    from vlmattn.evals.suites import Suite
    from vlmattn.evals.suites.registry import SuiteInfo
    from vlmattn.evals.suites.world import World

DEFAULT_SUITES = "pope,chair"
_NOTE = "generated scenes were made for the bundled models; give --data and --images for real data"


@dataclass(frozen=True)
class SuiteOptions:
    """What suites are made of, and their options."""

    scenes: Annotated[int, typer.Option(help="Generated scenes per condition.")] = 200
    visibility: Annotated[str, typer.Option(help="Of generated scenes: clear, dim, faint, tiny; comma-separated.")] = (
        "faint,clear"
    )
    prior: Annotated[
        float, typer.Option(help="Share (0..1) of generated scenes that break the co-occurrence prior.")
    ] = 0.0
    data: Annotated[
        list[str] | None,
        typer.Option(help="Published data of a suite, NAME=PATH, or a table of the hub, NAME=owner/table. Repeat."),
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="An option of a suite, NAME.option=value, as chair.synonyms=FILE (vlmattn suites NAME). Repeat.",
        ),
    ] = None
    images: Annotated[Path | None, typer.Option(help="Folder of the images that data files name.")] = None
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Read images outside of --images too, where data files name them.")
    ] = False
    limit: Annotated[int | None, typer.Option(help="Questions per file, or images (of COCO 500).", min=1)] = None
    max_new_tokens: Annotated[
        int, typer.Option(help="Length of captions and free text about published data.", min=1)
    ] = 512

    def make(self, names: Sequence[str], model: str, seed: int | None = None) -> list[Suite]:
        """The named suites: on their data where any are given, else on generated scenes.

        Raises:
            UnknownNameError: no such suite or option.
            InputError: a suite has no data, or they cannot be read.
            OptionError: an option that cannot be read or is out of range; data for a suite that is not asked.
        """
        from vlmattn.evals.suites import make_suite
        from vlmattn.evals.suites.making import suite_info

        infos = [suite_info(name.strip()) for name in names]
        paths = self.paths(infos)
        options = self.options(infos, paths)
        without = self._without(infos, ",".join(names) == DEFAULT_SUITES, model)
        worlds = [] if paths else self._worlds(seed)
        usual = {name: getattr(self, name) for name in ("images", "limit", "max_new_tokens", "allow_outside")}
        return [
            make_suite(info, worlds, paths.get(info.name, ()), usual, **options[info.name])
            for info in infos
            if worlds or info not in without
        ]

    def _without(self, infos: Sequence[SuiteInfo], by_default: bool, model: str) -> list[SuiteInfo]:
        """Suites that no data are given for, and a note where that may be a slip.

        Raises:
            InputError: other suites have data, and these were asked for by name.
        """
        from vlmattn.evals.suites.making import lacking

        paths = self.paths(infos)
        without = [info for info in infos if not (paths.get(info.name) or info.own_data)]
        if paths and without and not by_default:
            raise InputError(lacking(without))
        if without and (paths or model not in BUNDLED):
            errors.print(f"note: {lacking(without) if paths else _NOTE}", highlight=False, soft_wrap=True, markup=False)
        return without

    def _worlds(self, seed: int | None) -> list[World]:
        """Generated scenes of each visibility; without a seed those of every evaluation."""
        from vlmattn.evals.suites.world import EVAL_SEED, World

        looks = [look.strip() for look in self.visibility.split(",")]
        return [World(look, self.prior, self.scenes, EVAL_SEED if seed is None else seed) for look in looks]

    def paths(self, infos: Sequence[SuiteInfo]) -> dict[str, list[Path]]:
        """By suite the data that ``--data`` gives it."""
        return {name: [Path(path) for path in of] for name, of in self._pairs("--data", self.data, infos).items()}

    def options(self, infos: Sequence[SuiteInfo], paths: dict[str, list[Path]]) -> dict[str, dict[str, Any]]:
        """By suite the options that ``--set`` gives it."""
        from vlmattn.evals.suites.making import door_of, parse_option

        found: dict[str, dict[str, Any]] = {info.name: {} for info in infos}
        known = {info.name: info for info in infos}
        for key, texts in self._pairs("--set", self.set_, infos).items():
            name, _, option = key.partition(".")
            if len(texts) > 1:
                raise OptionError(f"--set {key} is given twice")
            door = door_of(known[name], paths.get(name) or known[name].own_data)
            found[name][option] = parse_option(known[name], door, option, texts[0])
        return found

    def _pairs(self, flag: str, given: list[str] | None, infos: Sequence[SuiteInfo]) -> dict[str, list[str]]:
        """What stands behind the first ``=`` of each text, by what stands before it: a suite, or its option."""
        from vlmattn.evals.suites.registry import find_suite

        form = (
            "NAME=PATH, for example mme=MME_Benchmark" if flag == "--data" else "NAME.option=value, as chair.limit=100"
        )
        asked, found = [info.name for info in infos], dict[str, list[str]]()
        for text in given or ():
            key, equals, value = text.partition("=")
            name, dot, option = key.partition(".")
            if not equals or not value or (flag == "--set") != bool(dot and option):
                raise OptionError(f"{flag} is {form}; got '{text}'")
            if name not in asked:
                find_suite(name)
                raise OptionError(f"{flag} {key}: --suite does not name {name}; it names {', '.join(asked)}")
            found.setdefault(key, []).append(value)
        return found
