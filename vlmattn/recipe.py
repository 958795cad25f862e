"""Recipe: which methods act on a model, as data that can be named, composed, saved and read back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from vlmattn.anatomy import Anatomy
from vlmattn.decoding import Branch, ContrastiveDecoding, Decoding, Gaze, Instead
from vlmattn.decoding.search import LastLook, Search
from vlmattn.errors import InputError, OptionError, UnknownNameError, UnsupportedError, VlmattnError, quoted
from vlmattn.files import copy_whole, make_folder, path_text, write_whole
from vlmattn.interventions import Intervention
from vlmattn.interventions.pruning import KVPolicy, Pruning
from vlmattn.options import Options
from vlmattn.registry import all_presets, make_method
from vlmattn.request import Plan
from vlmattn.texts import parse_data, read_text

FILE_NAME = "vlmattn_config.json"
_SCHEMA = 1
_MOST = 2**20  # bytes of a recipe's file


@dataclass(frozen=True)
class Recipe:
    """Attention methods in the order in which they act, methods that drop tokens, and at most one decoding method.

    ``Recipe.of`` takes what people write: a preset (``"var"``), several joined by ``+`` (``"vhr+vcd"``), one that drops tokens
    with its budget (``"fastv@0.25"``: a quarter of the image tokens stays), ``"none"``, a
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
        return tuple(map(_name, self._parts))

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
            names = " and ".join(_name(rule) for rule in rules)
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
            return cls._with(_name(spec), [spec])
        if isinstance(spec, str) and not any(mark in spec for mark in (os.sep, ".yaml", ".yml", ".json")):
            if not spec.strip():
                raise OptionError("a recipe needs a name, and this one is empty; 'none' is the bare model")
            if "+" not in spec and spec not in all_presets() and os.path.isdir(spec):
                return cls.from_pretrained(spec)
            return cls._from_names(spec)
        if isinstance(spec, (str, os.PathLike)):
            return cls.from_pretrained(spec) if os.path.isdir(spec) else cls.from_file(spec)
        got = type(spec).__name__
        if isinstance(spec, Iterable) and not isinstance(spec, (bytes, Mapping)):
            parts = tuple(spec)
            others = [part for part in parts if not isinstance(part, (*_METHODS, Recipe, str, os.PathLike))]
            if not others:
                recipes = [cls._parse(part) for part in parts]
                methods = [method for recipe in recipes for method in recipe._parts]
                return cls._with("+".join(recipe.name for recipe in recipes) or "none", methods)
            got = f"{type(others[0]).__name__} in a list"
        raise OptionError(f"a recipe is a preset name, a file, a method or a list of methods; got {got}")

    @classmethod
    def _from_names(cls, text: str) -> Recipe:
        presets, methods = all_presets(), []
        for name in (part.strip() for part in text.split("+")):
            if name == "none":
                continue
            name, mark, share = name.partition("@")
            if name not in presets:
                raise UnknownNameError("preset", name, [*presets, "none"])
            method = make_method(presets[name].method, presets[name].options)
            methods.append(method.at(_share(share)) if mark else method)
        return cls._with(text, methods)

    def bind(self, anatomy: Anatomy) -> Plan:
        """The recipe for one model: which method acts in which layer.

        Raises:
            OptionError: what does not fit the model; methods that conflict in some layer (named, with the reason).
            UnsupportedError: a method that the model's family cannot have.
        """
        contrast = self._contrast(anatomy)
        search = self.decoding if isinstance(self.decoding, Search) else None
        looks = frozenset({anatomy.layers - 1}) if search else _watched(contrast, anatomy)
        self._refuse(anatomy, search is not None or contrast is not None, bool(looks), contrast)
        if search is not None and anatomy.window:
            raise UnsupportedError(
                f"a search needs full attention in every layer, and {anatomy.family} has a sliding window of {anatomy.window} tokens in"
                f" some; use another decoding rule than '{_name(search)}', or num_beams=5"
            )
        bound = [method.bind(anatomy) for method in self.interventions]
        pruning = self._pruning(anatomy, contrast)
        pruners = [found for found in dict.fromkeys(pruning) if found is not None]
        active = [frozenset(method.active_layers(anatomy)) for method in bound]
        for (one, first), (other, second) in combinations(zip(bound, active, strict=True), 2):
            if first & second:
                _refuse_conflict(one, other)

        def at(step: str | None, places: Sequence[Iterable[int]]) -> tuple[tuple[Intervention, ...], ...]:
            """For each layer the methods that are there and implement the step."""
            return tuple(
                tuple(
                    m
                    for m, layers in zip(bound, places, strict=True)
                    if layer in layers and (not step or _has(m, step))
                )
                for layer in range(anatomy.layers)
            )

        extending = [layers for m, layers in zip(bound, active, strict=True) if m.follows_hidden_states]
        policies = [m for m in bound if isinstance(m, KVPolicy)]
        preparing, observing = tuple(m for m in bound if _has(m, "before_prefill")), at("on_hidden_states", active)
        evicting = self._evicting(policies, anatomy)
        if policies and (search or (contrast is not None and (contrast.branches or evicting))):
            raise OptionError(
                f"'{_name(policies[0])}' and '{_name(self.decoding)}' conflict: the decoding rule needs whole caches; use one of them"
            )
        seeing: list[Intervention | Pruning] = [m for m in bound if _has(m, "on_image_features")]
        seeing += [m for m in pruners if _has(m, "on_image_features")]
        measured = at("on_attention", [m.attention_layers(anatomy) for m in bound])
        return Plan(
            self.name,
            by_layer=at(None, active),
            before_prefill=preparing,
            on_hidden_states=observing,
            on_attention=tuple(
                (
                    *methods,
                    *(pruner for pruner in pruners if layer in pruner.attention_layers(anatomy)),
                    *((LastLook() if search else Gaze(),) if layer in looks else ()),
                )
                for layer, methods in enumerate(measured)
            ),
            pruning=pruning,
            evicting=evicting,
            policies=tuple(policies),
            on_queries_keys=tuple(
                tuple(m for m in policies if _has(m, "on_queries_keys") and layer in m.active_layers(anatomy))
                for layer in range(anatomy.layers)
            )
            if any(_has(m, "on_queries_keys") for m in policies)
            else (),
            on_image_features=tuple(seeing),
            extending=frozenset().union(*extending),
            tower_layers=frozenset(layer for m in seeing for layer in m.tower_layers(anatomy)),
            turns=(*(m.info.name for m in bound if m.turns == "needed"), *self._instead(contrast)),
            uses_turns=any(m.turns != "unused" for m in bound) or any(self._instead(contrast)),
            text_first=not preparing and not policies and not any(m.opens_text for m in bound),
            edits_text=bool(
                preparing or policies or any(observing) or any(measured) or any(m.edits_text for m in bound)
            ),
            texts=not any(m.needs_images for m in bound) and not pruners and not self.is_none,
            decoding=contrast,
            search=search,
            rule=_name(self.decoding) if self.decoding is not None else "",
            branch_names=self._branch_names(anatomy),
            branches=tuple(self._of_branch(branch).bind(anatomy) for branch in contrast.branches) if contrast else (),
        )

    def _refuse(self, anatomy: Anatomy, deciding: bool, looking: bool, contrast: ContrastiveDecoding | None) -> None:
        """Raise ``UnsupportedError`` if the model's family cannot have one of the methods."""
        reasons = dict(anatomy.refused)
        for method in (*self.interventions, *self.pruning):
            opening = isinstance(method, Intervention) and bool(method.opens())
            asking = isinstance(method, Intervention) and method.turns == "needed"
            reason = (
                reasons.get(kind_of(method))
                or (reasons.get("opening") if opening else None)
                or (reasons.get("turns") if asking else None)
            )
            if reason is not None:
                raise UnsupportedError(f"'{method.info.name}' does not run on {anatomy.family}: {reason}")
        branches = contrast.branches if contrast is not None else ()
        asked = {
            "decoding": deciding,
            "looking": looking,
            "rotating": any(branch.rope != 1 for branch in branches),
            "dropping": any(branch.image == "drop" for branch in branches),
        }
        reason = next((reasons[kind] for kind, wanted in asked.items() if wanted and kind in reasons), None)
        if reason is not None:
            raise UnsupportedError(f"'{_name(self.decoding)}' does not run on {anatomy.family}: {reason}")

    def _pruning(self, anatomy: Anatomy, contrast: ContrastiveDecoding | None) -> tuple[Pruning | None, ...]:
        """For each layer the method that chooses which rows reach it; empty if no method does.

        Raises:
            OptionError: two methods that choose before the same layer; a decoding rule that must see all tokens.
        """
        if not self.pruning:
            return ()
        if isinstance(self.decoding, Search) or (contrast is not None and contrast.branches):
            raise OptionError(
                f"'{_name(self.pruning[0])}' and '{_name(self.decoding)}' conflict: the decoding rule needs all image tokens in"
                " every layer; use one of them"
            )
        found: list[Pruning | None] = [None] * anatomy.layers
        for method in (method.bind(anatomy) for method in self.pruning):
            for layer in method.stages(anatomy):
                if (other := found[layer]) is not None:
                    raise OptionError(
                        f"'{other.info.name}' and '{method.info.name}' conflict: both choose tokens before layer {layer}; use one of them"
                    )
                found[layer] = method
        return tuple(found)

    def _evicting(self, policies: Sequence[KVPolicy], anatomy: Anatomy) -> tuple[KVPolicy | None, ...]:
        """For each layer the policy that takes slots out of its cache; empty if none does.

        Raises:
            OptionError: two policies evict in the same layer.
        """
        found: list[KVPolicy | None] = [None] * anatomy.layers
        for policy in (policy for policy in policies if _has(policy, "evict") or _has(policy, "split")):
            for layer in policy.active_layers(anatomy):
                if (other := found[layer]) is not None:
                    raise OptionError(
                        f"'{_name(other)}' and '{_name(policy)}' conflict: both evict in layer {layer}; use one of them, or layer"
                        " ranges that do not meet"
                    )
                found[layer] = policy
        return tuple(found) if any(found) else ()

    def _contrast(self, anatomy: Anatomy) -> ContrastiveDecoding | None:
        """Branches and rule for a model; None if there are none or they change nothing."""
        if self.decoding is None or isinstance(self.decoding, Search):
            return None
        rule = self.decoding if isinstance(self.decoding, ContrastiveDecoding) else self.decoding.contrast(anatomy)
        rule = rule.without_idle()
        for layer in rule.layers:
            if not 0 <= layer < anatomy.layers:
                raise OptionError(f"the decoding rule names layer {layer}, but the decoder has 0..{anatomy.layers - 1}")
        return None if rule.is_identity else rule

    def _branch_names(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Branches that calls may bring inputs for, also those that weigh nothing."""
        if self.decoding is None or isinstance(self.decoding, Search):
            return ()
        rule = self.decoding if isinstance(self.decoding, ContrastiveDecoding) else self.decoding.contrast(anatomy)
        return tuple(branch.name for branch in rule.branches)

    def _of_branch(self, branch: Branch) -> Recipe:
        """The edits that act in a branch."""
        name = f"{self.name}/{branch.name}"
        edits = self.interventions if branch.edits == "inherit" else branch.edits
        if edits == "off":
            return Recipe(name)
        return Recipe(name, tuple(edit for edit in edits if branch.image != "drop" or not edit.needs_images))

    def _instead(self, contrast: ContrastiveDecoding | None) -> tuple[str, ...]:
        """Who needs the chat template to write another prompt."""
        prompts = [branch.prompt for branch in contrast.branches] if contrast else []
        return (_name(self.decoding),) if any(isinstance(prompt, Instead) for prompt in prompts) else ()

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data.

        Raises:
            OptionError: a ``ContrastiveDecoding`` made by hand, which may hold functions.
        """
        if isinstance(self.decoding, ContrastiveDecoding):
            raise OptionError(
                "a ContrastiveDecoding made by hand cannot be written down; register a decoding method (docs/howto-decoding.md)"
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
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        if (
            not isinstance(data, Mapping)
            or data.get("schema") != _SCHEMA
            or not isinstance(data.get("interventions"), list)
        ):
            raise InputError(f"not a recipe: needs schema {_SCHEMA}, a name and a list of interventions")
        if unknown := set(data) - {"schema", "name", *_KINDS}:
            raise InputError(f"not a recipe: unknown key {', '.join(sorted(map(quoted, unknown))[:6])}")
        methods: list[Options] = []
        for kind, classes in _KINDS.items():
            given = data.get(kind)
            items = [] if given is None else [given] if kind == "decoding" else given
            for item in items if isinstance(items, list) else [items]:
                if not isinstance(item, Mapping) or not isinstance(item.get("method"), str):
                    raise InputError("not a recipe: every intervention, pruning method and decoding needs a 'method'")
                method = make_method(
                    item["method"], {str(key): value for key, value in item.items() if key != "method"}
                )
                if not isinstance(method, classes):
                    place = next(name for name, fitting in _KINDS.items() if isinstance(method, fitting))
                    raise InputError(f"not a recipe: '{method.info.name}' is in the wrong place; it goes to '{place}'")
                methods.append(method)
        name = data.get("name", "unnamed")
        if not isinstance(name, (str, int, float)):
            raise InputError(f"not a recipe: its name must be text, got {quoted(name)}")
        return cls._with(str(name), methods)

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
        """Write ``vlmattn_config.json`` into a model folder, where ``wrap(model)`` finds it again, and the files it names."""
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


_KINDS: dict[str, tuple[type, ...]] = {
    "interventions": (Intervention,),
    "pruning": (Pruning,),
    "decoding": (Decoding, Search),
}
_METHODS = (Intervention, Pruning, Decoding, Search, ContrastiveDecoding)


def kind_of(method: Options) -> str:
    """Which kind of method this is, as families support or refuse them (``models.KINDS``)."""
    if isinstance(method, (Pruning, KVPolicy)):
        return "pruning"
    return "masks" if isinstance(method, Intervention) and method.opens() | method.hides() else "edits"


def _name(method: Any) -> str:
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


def _watched(contrast: ContrastiveDecoding | None, anatomy: Anatomy) -> frozenset[int]:
    """Layers whose attention chooses the image tokens of branches."""
    watched: set[int] = set()
    for branch in contrast.branches if contrast else ():
        if branch.tokens is not None:
            layers = tuple(branch.tokens.layers(anatomy))
            if not layers or not set(layers) <= set(range(anatomy.layers)):
                raise OptionError(
                    f"branch '{branch.name}': its tokens look at the layers {layers}, but the decoder has 0..{anatomy.layers - 1}"
                )
            watched |= set(layers)
    return frozenset(watched)


def _has(method: Intervention | Pruning, step: str) -> bool:
    """Whether a method implements an optional step."""
    base = next(base for base in (Pruning, KVPolicy, Intervention) if isinstance(method, base))
    return getattr(type(method), step) is not getattr(base, step)


def _refuse_conflict(one: Intervention, other: Intervention) -> None:
    """Raise if two methods that act in the same layer undo each other."""
    names = f"'{one.info.name}' and '{other.info.name}' conflict"
    if type(one) is type(other):
        raise OptionError(
            f"'{one.info.name}' is in the recipe twice for the same layers; use one of them, or layer ranges that do not meet"
        )
    for policy, other_one in ((one, other), (other, one)):
        if isinstance(policy, KVPolicy) and _has(policy, "split"):
            raise OptionError(
                f"{names}: '{policy.info.name}' keeps the heads of a layer apart, where '{other_one.info.name}' cannot act; use"
                " one of them, or layer ranges that do not meet"
            )
    for opening, hiding in ((one, other), (other, one)):
        if shared := sorted(opening.opens() & hiding.hides()):
            raise OptionError(
                f"{names}: '{opening.info.name}' opens edges that '{hiding.info.name}' hides ({', '.join(shared)}); use one of"
                " them, or layer ranges that do not meet"
            )
