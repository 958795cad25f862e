"""Recipe: which methods act on a model, as data that can be named, composed, saved and read back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vlmattn.decoding import ContrastiveDecoding, Decoding, Search
from vlmattn.errors import InputError, OptionError, VlmattnError, one_line, quoted
from vlmattn.files import copy_whole, make_folder, path_text, write_whole
from vlmattn.interventions import Intervention
from vlmattn.interventions.pruning import Pruning
from vlmattn.options import Options
from vlmattn.registry import all_presets, find_method, find_preset, make_method, origin
from vlmattn.texts import parse_data, read_text

FILE_NAME = "vlmattn_config.json"
_SCHEMA = 1
_MOST = 2**20  # bytes of a recipe's file


@dataclass(frozen=True)
class Recipe:
    """Attention methods in the order in which they act, methods that drop tokens, and at most one decoding method.

    ``Recipe.of`` takes what people write: a preset (``"var"``), several joined by ``+`` (``"vhr+vcd"``), one that drops
    tokens with its budget (``"fastv@0.25"``: a quarter of the image tokens stays), ``"none"``, a
    YAML or JSON file, a folder with ``vlmattn_config.json``, a method, a ``ContrastiveDecoding``, a list of methods and
    presets (``["pai", "vhr"]`` is ``"pai+vhr"``).
    """

    name: str
    interventions: tuple[Intervention, ...] = ()
    decoding: Decoding | Search | ContrastiveDecoding | None = None
    pruning: tuple[Pruning, ...] = ()

    @property
    def methods(self) -> tuple[Options, ...]:
        """All methods that are data."""
        return tuple(part for part in self._parts if isinstance(part, Options))

    @property
    def names(self) -> tuple[str, ...]:
        """What the report calls the methods."""
        return tuple(map(method_name, self._parts))

    @property
    def _parts(self) -> tuple[Any, ...]:
        """All methods, also a rule made by hand."""
        edits = (*self.interventions, *self.pruning)
        return edits if self.decoding is None else (*edits, self.decoding)

    @property
    def is_none(self) -> bool:
        """The bare model answers."""
        return not self.interventions and not self.pruning and self.decoding is None

    @classmethod
    def _with(cls, name: str, methods: Iterable[Any]) -> Recipe:
        """From methods of all kinds.

        Raises:
            OptionError: two decoding methods.
        """
        methods = tuple(methods)
        rules = [method for method in methods if not isinstance(method, (Intervention, Pruning))]
        if len(rules) > 1:
            names = " and ".join(method_name(rule) for rule in rules)
            raise OptionError(f"decoding rules {names} conflict: a recipe has at most one; use one of them")
        edits = tuple(method for method in methods if isinstance(method, Intervention))
        pruning = tuple(method for method in methods if isinstance(method, Pruning))
        return cls(name, edits, rules[0] if rules else None, pruning)

    @classmethod
    def of(cls, spec: Any, **options: Any) -> Recipe:
        """A recipe from any of its forms; ``options`` change fields of the method, if it has exactly one.

        Raises:
            UnknownNameError: no such preset or option (names the nearest).
            OptionError: a value out of range; options for a recipe of several methods.
        """
        recipe = cls._parse(spec)
        if not options:
            return recipe
        if len(recipe.methods) != 1:
            raise OptionError(
                f"options {sorted(options)} need a recipe of one method; '{recipe.name}' has {len(recipe.methods)}"
                + ("; a ContrastiveDecoding has no options" if isinstance(recipe.decoding, ContrastiveDecoding) else "")
            )
        (method,) = recipe.methods
        changed = make_method(method.info.name, method.options() | options)
        text = ",".join(f"{key}={value}" for key, value in sorted(options.items()))
        return cls._with(f"{recipe.name}[{text}]", [changed])

    @classmethod
    def _parse(cls, spec: Any) -> Recipe:
        if isinstance(spec, Recipe):
            return spec
        if isinstance(spec, _METHODS):
            return cls._with(method_name(spec), [spec])
        if isinstance(spec, str) and not any(mark in spec for mark in (os.sep, ".yaml", ".yml", ".json")):
            return cls._from_names(spec)
        if isinstance(spec, (str, os.PathLike)):
            return cls.from_pretrained(spec) if os.path.isdir(spec) else cls.from_file(spec)
        if isinstance(spec, Iterable) and not isinstance(spec, (bytes, Mapping)):
            return cls._from_parts(tuple(spec))
        raise OptionError(f"{_FORMS}; got {type(spec).__name__}")

    @classmethod
    def _from_parts(cls, parts: tuple[Any, ...]) -> Recipe:
        """One after the other."""
        for part in parts:
            if not isinstance(part, (*_METHODS, Recipe, str, os.PathLike)):
                raise OptionError(f"{_FORMS}; got {type(part).__name__} in a list")
        recipes = [cls._parse(part) for part in parts]
        methods = [method for recipe in recipes for method in recipe._parts]
        return cls._with("+".join(recipe.name for recipe in recipes) or "none", methods)

    @classmethod
    def _from_names(cls, text: str) -> Recipe:
        """Presets joined by ``+``; or a folder of this name, if there is no such preset."""
        if not text.strip():
            raise OptionError("a recipe needs a name, and this one is empty; 'none' is the bare model")
        if "+" not in text and os.path.isdir(text) and text not in all_presets():
            return cls.from_pretrained(text)
        methods = []
        for name in (part.strip() for part in text.split("+")):
            if name == "none":
                continue
            name, mark, share = name.partition("@")
            preset = find_preset(name)
            method = make_method(preset.method, preset.options)
            methods.append(method.at(_share(share)) if mark else method)
        return cls._with(text, methods)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data.

        Raises:
            OptionError: a ``ContrastiveDecoding`` made by hand, which may hold functions.
        """
        if isinstance(self.decoding, ContrastiveDecoding):
            raise OptionError(
                "a ContrastiveDecoding made by hand cannot be written down; register a decoding method"
                " (docs/extend/rule.md)"
            )
        return self.record()

    def record(self) -> dict[str, Any]:
        """As ``to_dict``, for people: what cannot be read back is shown as it prints."""
        methods = [{"method": method.info.name, **method.options()} for method in self.interventions]
        found = {"schema": _SCHEMA, "name": self.name, "interventions": methods}
        if self.pruning:
            found["pruning"] = [{"method": method.info.name, **method.options()} for method in self.pruning]
        if isinstance(self.decoding, ContrastiveDecoding):
            found["decoding"] = repr(self.decoding)
        elif self.decoding is not None:
            found["decoding"] = {"method": self.decoding.info.name, **self.decoding.options()}
        origins = {method.info.name: origin(type(method)) for method in self.methods}
        if plugins := {name: found for name, found in origins.items() if found}:
            found["plugins"] = plugins
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that ``to_dict`` wrote.

        Raises:
            InputError: not a recipe.
            UnknownNameError: no such method or option; says which package registered it, if the recipe does.
        """
        name, plugins = _checked(data)
        methods: list[Options] = []
        for kind in _PLACES:
            given = data.get(kind)
            items = [] if given is None else [given] if kind == "decoding" else given
            methods += [_method(kind, item, plugins) for item in (items if isinstance(items, list) else [items])]
        return cls._with(name, methods)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_yaml(self) -> str:
        return str(yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False))

    @classmethod
    def from_text(cls, text: str) -> Recipe:
        """A recipe from JSON or YAML (``texts.parse_data`` says of which size and depth).

        Raises:
            InputError: neither, a key twice, or not a recipe.
            OptionError: a value out of range. UnknownNameError: no such method or option.
        """
        return cls.from_dict(parse_data(text, "recipe"))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Recipe:
        """A recipe from a JSON or YAML file of at most a megabyte.

        Raises:
            InputError: it cannot be read, or as ``from_text``; names the file.
        """
        text, name = read_text(path, _MOST, "the recipe"), path_text(path)
        data = parse_data(text, name)
        try:
            return cls.from_dict(data)._at(Path(path).parent)
        except VlmattnError as error:
            raise InputError(f"{name}: {error}") from None

    def _at(self, folder: Path) -> Recipe:
        """With the files that lie in ``folder`` named by their whole path."""
        placed = []
        for method in self.interventions:
            names = {key: str(folder / getattr(method, key)) for key in method.files if getattr(method, key)}
            placed.append(replace(method, **{key: path for key, path in names.items() if Path(path).is_file()}))
        return replace(self, interventions=tuple(placed))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``vlmattn_config.json`` and the files it names into a model folder, for ``wrap(model)`` to find."""
        self.to_dict()  # what cannot be written is an error before anything is
        target = make_folder(folder) / FILE_NAME
        moved = []
        for method in self.interventions:
            named = {key: name for key, name in method.files.items() if getattr(method, key)}
            for key, name in named.items():
                copy_whole(getattr(method, key), target.parent / name)
            moved.append(replace(method, **named))
        write_whole(target, replace(self, interventions=tuple(moved)).to_json())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Recipe:
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise InputError(f"{path_text(folder)} has no {FILE_NAME}; save one with recipe.save_pretrained(folder)")
        return cls.from_file(path)


class _Dumper(yaml.SafeDumper):
    """YAML without aliases, which are not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_PLACES = ("interventions", "pruning", "decoding")
_METHODS = (Intervention, Pruning, Decoding, Search, ContrastiveDecoding)


_FORMS = "a recipe is a preset name, a file, a method or a list of methods"


def _checked(data: Any) -> tuple[str, Mapping[str, Mapping[str, Any]]]:
    """Name and plugins of a saved recipe, if it has the form of one."""
    whole = isinstance(data, Mapping) and data.get("schema") == _SCHEMA and isinstance(data.get("interventions"), list)
    if not whole:
        raise InputError(f"not a recipe: needs schema {_SCHEMA}, a name and a list of interventions")
    if unknown := set(data) - {"schema", "name", "plugins", *_PLACES}:
        raise InputError(f"not a recipe: unknown key {', '.join(sorted(map(quoted, unknown))[:6])}")
    name, plugins = data.get("name", "unnamed"), data.get("plugins") or {}
    if not isinstance(name, (str, int, float)):
        raise InputError(f"not a recipe: its name must be text, got {quoted(name)}")
    if not isinstance(plugins, Mapping) or not all(isinstance(facts, Mapping) for facts in plugins.values()):
        raise InputError(f"not a recipe: 'plugins' must name module and package by method, got {quoted(plugins)}")
    return str(name), plugins


def _method(kind: str, item: Any, plugins: Mapping[str, Mapping[str, Any]]) -> Options:
    """The method of an item under ``kind`` in a saved recipe."""
    if not isinstance(item, Mapping) or not isinstance(item.get("method"), str):
        raise InputError("not a recipe: every intervention, pruning method and decoding needs a 'method'")
    name = item["method"]
    find_method(name, _remedy(plugins[name]) if name in plugins else "")
    method = make_method(name, {str(key): value for key, value in item.items() if key != "method"})
    if method.place != kind:
        raise InputError(f"not a recipe: '{name}' is in the wrong place; it goes to '{method.place}'")
    return method


def _remedy(plugin: Mapping[str, Any]) -> str:
    """How to get a method that is not the library's own."""
    module, package = (str(plugin[key]) if plugin.get(key) else "" for key in ("module", "package"))
    if module in ("", "__main__"):
        return "a script or notebook registered it: run that code first"
    where = (
        f"package {quoted(package)} registered it: install that"
        if package
        else "a module registered it: have it on PYTHONPATH"
    )
    return f"{where}, or import {quoted(module)} first (vlmattn --import {one_line(module, 80)} ...)"


def method_name(method: Any) -> str:
    """What reports and errors call a method of any kind."""
    return str(method.info.name) if isinstance(method, Options) else "contrast"


def _share(text: str) -> float:
    """The budget after ``@``."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise OptionError(f"'@{text}' must name a share of the image tokens within 0..1, as in fastv@0.5")
    return share
