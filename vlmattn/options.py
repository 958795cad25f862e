"""Options of methods, which check themselves, and ranges of layers and heads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vlmattn.errors import OptionError, quoted


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows about a method."""

    name: str
    paper: str
    code: str
    faithful: str
    parts: str
    cost: str


@dataclass(frozen=True)
class PresetInfo:
    """A named setting of one method."""

    name: str
    method: str
    about: str
    options: Mapping[str, Any]


def option(
    default: Any,
    low: float | None = None,
    high: float | None = None,
    about: str = "",
    source: str = "",
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its range (both ends included) or choices, meaning and the source of its default."""
    facts = {"low": low, "high": high, "about": about, "source": source, "choices": choices}
    return field(default=default, metadata=facts)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all methods: a frozen dataclass whose fields are options that check themselves."""

    info: ClassVar[MethodInfo]
    #: The part of a recipe that the method belongs to.
    place: ClassVar[str] = "decoding"
    #: Options that name a file, and the usual name of that file beside a model.
    files: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            if isinstance(getattr(self, spec.name), list):  # as JSON and YAML have it
                object.__setattr__(self, spec.name, tuple(getattr(self, spec.name)))
            self._check(spec)

    def _check(self, spec: dataclasses.Field[Any]) -> None:
        value = getattr(self, spec.name)
        wrong = next((check(value, spec) for kinds, check in _CHECKS if isinstance(spec.default, kinds)), None)
        if wrong is not None:
            raise OptionError(f"{self.info.name}.{spec.name} must be {wrong}")

    def at(self, share: float) -> Options:
        """This method with a budget: the share of the image tokens that it keeps, in its first stage.

        Raises:
            OptionError: the method has no such budget.
        """
        raise OptionError(f"'{self.info.name}' keeps no share of the image tokens; leave @{share:g} out")

    def options(self) -> dict[str, Any]:
        """All fields with their values, as plain data."""
        values = ((spec.name, getattr(self, spec.name)) for spec in dataclasses.fields(self))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}


def _wrong_choice(value: Any, spec: dataclasses.Field[Any]) -> str | None:
    """What the value of a switch or a text must be, and is not."""
    if not isinstance(value, type(spec.default)):
        return f"of type {type(spec.default).__name__}, got {quoted(value)}"
    if spec.metadata["choices"] and value not in spec.metadata["choices"]:
        return f"one of {', '.join(spec.metadata['choices'])}; got {quoted(value)}"
    return None


def _wrong_list(value: Any, spec: dataclasses.Field[Any]) -> str | None:
    """What a list of numbers must be, and is not."""
    default: Any = spec.default
    fractions = any(isinstance(item, float) for item in default)
    kinds, what = ((int, float), "positive numbers") if fractions else ((int,), "whole numbers from 0 on")
    fitting = isinstance(value, tuple) and all(
        type(item) in kinds and not item < 0 and not (type(item) is int and item >= 2**31) for item in value
    )
    return None if fitting else f"a list of {what}, got {quoted(value)}"


def _wrong_number(value: Any, spec: dataclasses.Field[Any]) -> str | None:
    """What a number must be, and is not."""
    low, high = spec.metadata["low"], spec.metadata["high"]
    if type(spec.default) is int and type(value) is not int:
        return f"a whole number, got {quoted(value)}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # no comparison with nan holds
        return f"a number within {low}..{high}, got {quoted(value)}"
    return None


_CHECKS = (
    ((bool, str), _wrong_choice),
    (tuple, _wrong_list),
    ((int, float), _wrong_number),
)  # by the kind of the default

MANY = 10**4  # more layers than any decoder has: checks the form of a layer range before there is a model


def parse_layers(spec: str, count: int, name: str) -> tuple[int, ...]:
    """Layer indices of a range in a decoder of ``count`` layers.

    ``"2:-1"``, ``"1,-14:"`` and ``"0:-1:2"`` are Python slices (clipped) and indices. A fraction is a share of the
    depth, rounded down: ``"9/32:15/32"`` is 9:15 in 32 layers and 2:3 in 8; ``"1/2+2"`` adds two layers. ``name`` is
    the option's, for errors.
    """
    found: set[int] = set()
    for part in spec.split(","):
        ends = part.strip().split(":")
        try:
            numbers = [_layer_number(end.strip(), count) for end in ends]
            if len(ends) == 1 and numbers[0] is not None:
                found.add(range(count)[numbers[0]])
            elif 2 <= len(ends) <= 3:
                found.update(range(count)[slice(*numbers)])
            else:
                raise ValueError(part)
        except (ValueError, ZeroDivisionError):
            raise OptionError(
                f"{name} must look like '2:-1', '1,-14:', '0:-1:2' or '9/32:15/32', got '{spec}'"
            ) from None
        except IndexError:
            raise OptionError(f"{name} names layer {part.strip()}, but the decoder has layers 0..{count - 1}") from None
    return tuple(sorted(found))


def some_layers(spec: str, count: int, name: str) -> tuple[int, ...]:
    """As ``parse_layers``; a range that selects no layer is an ``OptionError`` too."""
    found = parse_layers(spec, count, name)
    if not found:
        raise OptionError(f"{name} '{spec}' selects none of the layers 0..{count - 1}")
    return found


def _layer_number(text: str, count: int) -> int | None:
    if not text:
        return None
    if (share := re.fullmatch(r"(\d+)/(\d+)([+-]\d+)?", text)) is not None:
        return int(share[1]) * count // int(share[2]) + int(share[3] or 0)
    return int(text)


def parse_heads(spec: str, name: str, what: str = "layer.head") -> tuple[tuple[int, int], ...]:
    """``"12.3,14.7"`` as (layer, head) pairs; for errors ``name`` is the option's, ``what`` the form."""
    if spec and not re.fullmatch(r"\s*\d{1,9}\.\d{1,9}\s*(,\s*\d{1,9}\.\d{1,9}\s*)*", spec):
        raise OptionError(f"{name} must look like '12.3,14.7' ({what}), got {quoted(spec)}")
    return tuple(
        (int(layer), int(head)) for layer, head in (pair.split(".") for pair in spec.split(",") if pair.strip())
    )


def checked_against(about: str, faithful: str) -> str:
    """What a preset was checked against, in short: golden, paper text, ..., or experimental where nothing vouches."""
    return "experimental" if "experimental" in (about + faithful).lower() else re.split(r"[(,;]", faithful)[0].strip()


def paper_id(paper: str) -> str:
    """The arXiv number of a citation, or the citation."""
    found = re.search(r"\d{4}\.\d{4,5}", paper)
    return found[0] if found else paper
