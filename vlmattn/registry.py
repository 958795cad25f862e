"""The registry of methods and presets, and the plugins of other packages that add to it and to the other registries."""

from __future__ import annotations

import dataclasses
import importlib
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any, TypeVar

from vlmattn.errors import InputError, OptionError, UnknownNameError, one_line
from vlmattn.options import MethodInfo, Options, PresetInfo

#: Entry-point group of packages with methods, decoding rules, families, suites or tracking adapters: modules to import.
GROUP = "vlmattn.plugins"
_OWN = ("vlmattn.interventions", "vlmattn.decoding")  # modules that register the library's own methods

_METHODS: dict[str, type[Options]] = {}
_PRESETS: dict[str, PresetInfo] = {}
_LOCK = threading.RLock()
_LOADED: set[str] = set()  # GROUP, once its modules were imported
_BROKEN: dict[str, str] = {}  # module -> why it could not be imported, and whose it is

_M = TypeVar("_M", bound=type[Options])
_V = TypeVar("_V")


def register(
    name: str,
    *,
    paper: str = "",
    code: str = "",
    faithful: str = "experimental",
    parts: str = "",
    cost: str = "",
    presets: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType({}),
) -> Callable[[_M], _M]:
    """Class decorator: make a method known under ``name``, with presets given as name -> (about, options).

    Without presets ``name`` is one, of all defaults.

    Raises:
        OptionError: the name, or that of a preset, is taken.
    """
    presets = presets or {name: ("its defaults", {})}

    def add(cls: _M) -> _M:
        if name in _METHODS:
            raise OptionError(f"method '{name}' is registered twice: {_METHODS[name].__module__} and {cls.__module__}")
        for preset in presets:
            if preset in _PRESETS:
                other = _METHODS[_PRESETS[preset].method].__module__
                raise OptionError(f"preset '{preset}' is registered twice: {other} and {cls.__module__}")
        cls.info = MethodInfo(name, paper, code, faithful, parts, cost)
        _METHODS[name] = cls
        for preset, (about, options) in presets.items():
            _PRESETS[preset] = PresetInfo(preset, name, about, options)
        return cls

    return add


def look_up(kind: str, name: str, known: Mapping[str, _V], also: Iterable[str] = (), note: str = "") -> _V:
    """What a registry has under a name; plugins are loaded if it is not there yet.

    Args:
        kind: of the name, for errors; also: names that are allowed besides; note: what to say if there is no such name.

    Raises:
        UnknownNameError: no such name, also in plugins. Plugins that could not be imported are named.
    """
    if name not in known:
        load_plugins()
    if name not in known:
        raise UnknownNameError(kind, name, [*known, *also], "; ".join([*filter(None, [note]), *broken_plugins()]))
    return known[name]


def load_plugins() -> None:
    """Import the plugins of installed packages (entry points of the group ``vlmattn.plugins``), once per process.

    One that cannot be imported is a warning.
    """
    with _LOCK:
        if GROUP in _LOADED:
            return
        _LOADED.add(GROUP)
        for package, module in _entries():
            try:
                importlib.import_module(module)
            except (Exception, SystemExit) as error:  # a module of somebody else may raise anything
                _BROKEN[module] = f"plugin {module} of package '{package}' cannot be imported: {_reason(error)}"
                warnings.warn(_BROKEN[module], stacklevel=3)


def broken_plugins() -> tuple[str, ...]:
    """A line for each plugin that could not be imported."""
    return tuple(_BROKEN.values())


def import_plugin(module: str) -> None:
    """Import a module that registers something, by its name.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"--import {module}: {_reason(error)}; name a module of the current folder, of PYTHONPATH or of an"
            " installed package"
        ) from error


def _reason(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}", 300)


def _entries() -> list[tuple[str, str]]:
    """(package, module) of every plugin, in the order of names."""
    found = metadata.entry_points(group=GROUP)
    return sorted({(entry.dist.name if entry.dist else entry.name, entry.module) for entry in found})


def origin(cls: type[Options]) -> dict[str, str]:
    """Where a method of somebody else comes from: ``module``, and ``package`` if one is installed."""
    module, *_ = cls.__module__.split(".")
    if module == "vlmattn":
        return {}
    packages = [package for package, plugin in _entries() if plugin.split(".")[0] == module]
    packages += metadata.packages_distributions().get(module, ())
    return {"module": module, **({"package": packages[0]} if packages else {})}


def _load_own() -> None:
    for name in _OWN:
        importlib.import_module(name)


def find_method(name: str, note: str = "") -> type[Options]:
    """The class of a method; ``note``: what an error says besides."""
    _load_own()
    return look_up("method", name, _METHODS, note=note)


def find_preset(name: str) -> PresetInfo:
    """A preset by its name."""
    _load_own()
    return look_up("preset", name, _PRESETS, also=("none",))


def all_presets() -> dict[str, PresetInfo]:
    """Presets by name, in the order of names, plugins' included."""
    _load_own()
    load_plugins()
    return dict(sorted(_PRESETS.items()))


def make_method(name: str, options: Mapping[str, Any]) -> Options:
    """An instance from plain data; unknown options are an error that names the known ones."""
    cls = find_method(name)
    known = [spec.name for spec in dataclasses.fields(cls)]
    for key in options:
        if key not in known:
            raise UnknownNameError(f"option of '{name}'", key, known)
    return cls(**options)
