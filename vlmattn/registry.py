"""The registry of methods and presets."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from vlmattn.errors import OptionError, UnknownNameError
from vlmattn.options import MethodInfo, Options, PresetInfo

_METHODS: dict[str, type[Options]] = {}


_PRESETS: dict[str, PresetInfo] = {}


_M = TypeVar("_M", bound=type[Options])


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
    """
    presets = presets or {name: ("its defaults", {})}

    def add(cls: _M) -> _M:
        if name in _METHODS:
            raise OptionError(f"method '{name}' is registered twice: {_METHODS[name].__module__} and {cls.__module__}")
        cls.info = MethodInfo(name, paper, code, faithful, parts, cost)
        _METHODS[name] = cls
        for preset, (about, options) in presets.items():
            _PRESETS[preset] = PresetInfo(preset, name, about, options)
        return cls

    return add


def _load() -> None:
    """Import the packages whose modules register the library's own methods."""
    for name in ("vlmattn.interventions", "vlmattn.decoding"):
        importlib.import_module(name)


def find_method(name: str) -> type[Options]:
    """The class of a method."""
    _load()
    if name not in _METHODS:
        raise UnknownNameError("method", name, _METHODS)
    return _METHODS[name]


def all_presets() -> dict[str, PresetInfo]:
    """Presets by name, in the order of names."""
    _load()
    return dict(sorted(_PRESETS.items()))


def make_method(name: str, options: Mapping[str, Any]) -> Options:
    """An instance from plain data; unknown options are an error that names the known ones."""
    cls = find_method(name)
    known = [spec.name for spec in dataclasses.fields(cls)]
    for key in options:
        if key not in known:
            raise UnknownNameError(f"option of '{name}'", key, known)
    return cls(**options)
