"""Makes a suite by its name, on scenes, files or a table of the hub; reads its options as they are typed."""

from __future__ import annotations

import collections.abc
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from vlmattn.errors import InputError, OptionError, UnknownNameError, quoted
from vlmattn.evals.suites.base import Suite
from vlmattn.evals.suites.described import read_suite
from vlmattn.evals.suites.registry import SuiteInfo, find_suite
from vlmattn.evals.suites.tables import is_table, load_table
from vlmattn.evals.suites.world import World

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "a text"}


def suite_info(name: str | SuiteInfo) -> SuiteInfo:
    """A suite by its name, or by a file (YAML) that describes it.

    Raises:
        UnknownNameError: no such suite.
        InputError: a file that does not describe one.
    """
    if isinstance(name, SuiteInfo):
        return name
    return read_suite(Path(name)) if Path(name).suffix in (".yaml", ".yml") else find_suite(name)


def make_suite(
    name: str | SuiteInfo,
    worlds: Sequence[World] = (),
    data: Path | Sequence[Path] = (),
    usual: Mapping[str, Any] | None = None,
    **options: Any,
) -> Suite:
    """A suite on its data, or on generated scenes where none are given.

    A path that is not there but looks like ``owner/name`` is a table of the hub, and a folder of parquet files is one
    too; see ``load_table``.

    Args:
        name: of the suite, or a file that describes one.
        worlds: generated scenes; suites of several images take the last.
        data: its file or folder, or several where it takes several; by default those that a described suite names
            itself.
        usual: options for every suite that has them, as ``images`` and ``limit``; None in it means not given.
        options: of this suite.

    Raises:
        UnknownNameError: no such suite or option; names the nearest.
        InputError: it lacks data or a folder of images, or its data are not there or in another form.
        OptionError: an option out of range.
    """
    info = suite_info(name)
    for option in ("limit", "max_new_tokens"):
        if (value := options.get(option)) is not None and value < 1:
            raise OptionError(f"{info.name}.{option} must be at least 1, got {value}")
    paths = [data] if isinstance(data, Path) else list(data) or list(info.own_data)
    if paths:
        return _on_data(info, paths, {key: value for key, value in (usual or {}).items() if value is not None}, options)
    if "scenes" not in info.doors or not worlds:
        raise InputError(lacking([info]))
    return info.doors["scenes"](_one_or_all(info, "scenes", list(worlds)), **_own(info, "scenes", options))


def _on_data(info: SuiteInfo, paths: Sequence[Path], usual: Mapping[str, Any], options: Mapping[str, Any]) -> Suite:
    door = door_of(info, paths)
    known, given = parameters(info, door), _own(info, door, options)
    given = {key: value for key, value in usual.items() if key in known} | given
    if door == "table":
        return info.doors[door](load_table(info, paths[0], bool(usual.get("allow_outside"))), **given)
    for path in paths:
        if not path.exists():
            hint = "; a table of the hub is owner/name" if "table" in info.doors else ""
            raise InputError(f"suite {info.name}: no such file or folder: {path}{hint}")
    if "images" in known:
        given.setdefault("images", info.own_images)
        if given["images"] is None:
            raise InputError(f"suite {info.name} needs --images DIR, the folder of its images")
    return info.doors[door](_one_or_all(info, door, paths), **given)


def lacking(infos: Sequence[SuiteInfo]) -> str:
    """What suites without data need."""
    needs = "; ".join(f"{info.name} needs --data {info.name}=PATH, {info.data}" for info in infos if info.data)
    return f"no data for suite {', '.join(info.name for info in infos)}: {needs or 'it is made of generated scenes'}"


def door_of(info: SuiteInfo, data: Sequence[Path]) -> str:
    """What a suite is made of where these data are given."""
    if not data:
        return "scenes"
    if not {"files", "table"} & info.doors.keys():
        raise InputError(f"suite {info.name} is made of generated scenes; leave out --data {info.name}")
    return "table" if "table" in info.doors and len(data) == 1 and is_table(data[0]) else "files"


def parameters(info: SuiteInfo, door: str) -> dict[str, Any]:
    """What a suite can be given where it is made of this: types by name, the data themselves included."""
    make = info.doors[door]
    function = getattr(make, "func", make)  # of a partial
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    return {name: hints.get(name, str) for name in inspect.signature(make).parameters}


def options_of(info: SuiteInfo, door: str) -> dict[str, tuple[str, Any]]:
    """The options of a suite where it is made of this: what each takes, in words, and its default (None for none)."""
    defaults = inspect.signature(info.doors[door]).parameters
    found = {}
    for name, kind in _options(info, door).items():
        default = defaults[name].default
        found[name] = _words(kind), None if default is inspect.Parameter.empty else default
    return found


def _options(info: SuiteInfo, door: str) -> dict[str, Any]:
    """The options of a suite where it is made of this: types by name, without what makes it."""
    return dict(list(parameters(info, door).items())[1:])


def _own(info: SuiteInfo, door: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are the suite's own, once they are known to be.

    Raises:
        UnknownNameError: it has no such option.
        OptionError: it has none at all.
    """
    known = _options(info, door)
    for name in options:
        if not known:
            raise OptionError(f"suite {info.name} has no options on {door}; leave out {info.name}.{name}")
        if name not in known:
            raise UnknownNameError(f"option of suite '{info.name}' on {door}", name, known)
    return dict(options)


def _one_or_all(info: SuiteInfo, door: str, given: Sequence[Any]) -> Any:
    """All that is given where the suite takes a sequence; else the only file, or the last of the scenes.

    Raises:
        InputError: several files for a suite that takes one.
    """
    kind = next(iter(parameters(info, door).values()))
    if get_origin(kind) is collections.abc.Sequence:
        return given
    if door != "scenes" and len(given) > 1:
        raise InputError(f"suite {info.name} takes one --data {info.name}=PATH, there are {len(given)}")
    return given[-1]


def parse_option(info: SuiteInfo, door: str, name: str, text: str) -> Any:
    """An option as it is typed (``--set NAME.option=value``): lists with commas, true and false, numbers, paths, texts.

    Raises:
        UnknownNameError: no such option.
        OptionError: a value of another kind.
    """
    kind = _plain(_options(info, door)[name]) if _own(info, door, {name: text}) else str
    try:
        if get_origin(kind) is collections.abc.Sequence:
            return [_value(get_args(kind)[0], word.strip()) for word in text.split(",")]
        return _value(kind, text)
    except ValueError:
        raise OptionError(f"--set {info.name}.{name} takes {_words(kind)}, got {quoted(text)}") from None


def _plain(kind: Any) -> Any:
    """The type of an option that may also be None, or a judge: the one that can be typed."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return next((each for each in get_args(kind) if each in _WORDS or get_origin(each) is not None), str)


def _words(kind: Any) -> str:
    kind = _plain(kind)
    if get_origin(kind) is collections.abc.Sequence:
        return f"{_WORDS.get(get_args(kind)[0], 'a text')}, or several with commas"
    return _WORDS.get(kind, "a text")


def _value(kind: Any, text: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    make: Callable[[str], Any] = kind if kind in (int, float, Path) else str
    return make(text)
