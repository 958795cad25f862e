"""Which suites there are: each file says of itself what it is; the command line and the docs' table ask here.

A file of another package does the same, and is known once it is imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from vlmattn.errors import OptionError
from vlmattn.evals.suites.base import Suite
from vlmattn.registry import load_plugins, look_up

_S = TypeVar("_S", bound=type[Suite])
#: What a suite can be made of, and the class method that makes it.
DOORS = ("scenes", "files", "table")


@dataclass(frozen=True)
class Form:
    """The columns of a published table.

    Attributes:
        name: what it is called in errors.
        needs: columns it has to have, without pictures.
        pictures: columns of pictures, in the order of the prompt; the first one has to be there.
        more: columns that are read where there are such.
    """

    name: str
    needs: tuple[str, ...]
    pictures: tuple[str, ...] = ("image",)
    more: tuple[str, ...] = ()

    def missing(self, columns: Sequence[str]) -> list[str]:
        """What a table with these columns lacks."""
        return [name for name in (*self.needs, self.pictures[0]) if name not in columns]


@dataclass(frozen=True)
class SuiteInfo:
    """What is known of a suite.

    Attributes:
        name: of ``--suite`` and ``--data NAME=PATH``.
        about: what it asks, in a few words.
        data: what its files are, and the tables of the hub that have them; "" for generated scenes alone.
        source: where it is published: a paper, an address.
        forms: the columns of the tables it reads.
        doors: what makes it, by what it is made of: "scenes", "files", "table". Their further arguments are its
            options.
        all_configs: whether a table of several configurations is read as a whole.
        own_data, own_images: files that belong to the suite itself, used where no others are given.
    """

    name: str
    about: str
    data: str = ""
    source: str = ""
    forms: tuple[Form, ...] = ()
    doors: Mapping[str, Callable[..., Suite]] = field(default_factory=dict)
    all_configs: bool = False
    own_data: tuple[Path, ...] = ()
    own_images: Path | None = None

    @property
    def where(self) -> str:
        """Where its data come from, in words."""
        return "; ".join(filter(None, ("generated scenes" if "scenes" in self.doors else "", self.data)))


_SUITES: dict[str, SuiteInfo] = {}


def suite(
    name: str, about: str = "", data: str = "", source: str = "", forms: Sequence[Form] = ()
) -> Callable[[_S], _S]:
    """Make a class known as the suite ``name``.

    It is made by those of its own class methods ``on_scenes(worlds, ...)``, ``on_files(data, images, ...)`` and
    ``on_table(table, ...)`` that it has; where it has none, its constructor takes the scenes. A second class of the
    same name may add what the first one lacks: scenes for a suite on files.

    Arguments of these names mean the same everywhere: ``data``, its file or folder; ``images``, the folder of the
    images that it names; ``allow_outside``, whether the names may lead out of that folder; ``limit``, use the first so
    many questions; ``max_new_tokens``, length of the answers.

    Raises:
        OptionError: both classes have the same.
    """

    def known(cls: _S) -> _S:
        cls.name = name
        own = {door: getattr(cls, f"on_{door}") for door in DOORS if f"on_{door}" in vars(cls)}
        register(SuiteInfo(name, about, data, source, tuple(forms), own or {"scenes": cls}))
        return cls

    return known


def register(info: SuiteInfo) -> None:
    """Make a suite known, or add to one what makes it of something else.

    Raises:
        OptionError: there is a suite of that name which is made of the same.
    """
    before = _SUITES.get(info.name)
    if before is None:
        _SUITES[info.name] = info
        return
    twice = sorted(
        door for door in before.doors.keys() & info.doors.keys() if not _same(before.doors[door], info.doors[door])
    )
    if twice:
        raise OptionError(f"there are two suites '{info.name}' on {', '.join(twice)}; give one another name")
    texts = {what: getattr(before, what) or getattr(info, what) for what in ("about", "data", "source", "forms")}
    _SUITES[info.name] = replace(before, **texts, doors={**before.doors, **info.doors})


def _same(one: Callable[..., Suite], other: Callable[..., Suite]) -> bool:
    """Whether they are the same function, maybe of a module or a notebook's cell that was run again."""
    names = ("__module__", "__qualname__")
    return all(getattr(one, name, one) == getattr(other, name, other) for name in names)


@cache
def _load() -> None:
    """Import every module of this folder: each makes its suite known."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{package}.{module.name}")


def all_suites() -> dict[str, SuiteInfo]:
    """Every suite by name, in alphabetical order, plugins' included."""
    _load()
    load_plugins()
    return dict(sorted(_SUITES.items()))


def find_suite(name: str) -> SuiteInfo:
    """The suite of this name.

    Raises:
        UnknownNameError: there is none; names the nearest.
    """
    _load()
    return look_up("suite", name, _SUITES)


def markdown() -> str:
    """The table of suites for the docs: what each asks, and where its data come from."""
    lines = ["| suite | asks | data |", "|---|---|---|"]
    for info in all_suites().values():
        lines.append(f"| `{info.name}` | {info.about} | {info.where} |")
    return "\n".join(lines) + "\n"
