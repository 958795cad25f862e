"""What was measured about one language model: its sinks and its heads, as JSON files beside the model."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from vlmattn.anatomy import Anatomy
from vlmattn.errors import InputError, OptionError
from vlmattn.files import make_folder, path_text, write_whole
from vlmattn.texts import parse_json, read_text

_P = TypeVar("_P", bound="_Profile")


@dataclass(frozen=True, kw_only=True)
class _Profile:
    """Facts that hold for one language model.

    Attributes:
        fingerprint: hash of the sizes of the model (``Anatomy.fingerprint``).
        source: folder or hub name of the model.
        prompts: what was asked to measure this; images by name.
        seed: of everything random in it.
    """

    FILE_NAME: ClassVar[str]
    fingerprint: str
    source: str = ""
    prompts: tuple[str, ...] = ()
    seed: int = 0

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the profile to a file, or under its usual name into a folder, where methods look for it."""
        target = Path(path)
        if target.suffix != ".json":
            target = target / self.FILE_NAME
        make_folder(target.parent)
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in dataclasses.asdict(self).items())
        write_whole(target, "{\n" + rows + "\n}\n")  # a fact per line: with indents, a line per number
        return target

    @classmethod
    def load(cls: type[_P], path: str | os.PathLike[str]) -> _P:
        """Read a profile from a file or a folder.

        Raises:
            InputError: no such file, or not a profile of this kind.
        """
        source = Path(path)
        if os.path.isdir(source):
            source = source / cls.FILE_NAME
        return cls._made(_read(source, cls.__name__), source)

    @classmethod
    def _made(cls: type[_P], data: Any, source: Path) -> _P:
        names = {spec.name for spec in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or not isinstance(data.get("fingerprint"), str) or set(data) - names:
            raise InputError(f"{path_text(source)}: not a {cls.__name__}")
        try:
            made = cls(**{key: _frozen(value) for key, value in data.items()})
            if not isinstance(made.source, str) or not all(isinstance(text, str) for text in made.prompts):
                raise ValueError("source and prompts must be text")
            if type(made.seed) is not int:
                raise ValueError("seed must be a whole number")
            return made
        except (TypeError, ValueError) as error:
            raise InputError(f"{path_text(source)}: not a {cls.__name__}: {error}") from None

    def check(self, anatomy: Anatomy, where: str) -> None:
        """Raise ``OptionError`` if this was measured on a model of other sizes."""
        if self.fingerprint != anatomy.fingerprint:
            raise OptionError(
                f"{where}: this {type(self).__name__} belongs to another language model (measured on"
                f" '{self.source or 'unknown'}', config hash {self.fingerprint}; the model's is {anatomy.fingerprint});"
                " measure it again on this one"
            )


@dataclass(frozen=True, kw_only=True)
class SinkProfile(_Profile):
    """Sinks of a language model.

    Attributes:
        dims: hidden dimensions in which sinks are massive.
        tau: threshold of phi = max_{d in dims} |x_d| / RMS(x) that separates sinks from other tokens.
        layers: first layer that sinks enter, and the layer after the last one; (0, 0) if there are none.
        levels: for each layer the mean number of (primary, secondary) sinks in a prompt.
    """

    FILE_NAME: ClassVar[str] = "vlmattn_sinks.json"
    dims: tuple[int, ...]
    tau: float
    layers: tuple[int, int] = (0, 0)
    levels: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not all(type(d) is int and 0 <= d < 2**31 for d in self.dims) or not (_is_number(self.tau) and self.tau > 0):
            raise ValueError("dims must be whole numbers and tau positive")
        if len(self.layers) != 2 or not all(type(n) is int and _is_number(n) for n in self.layers):
            raise ValueError("layers must be two whole numbers")
        if any(len(level) != 2 or not all(map(_is_number, level)) for level in self.levels):
            raise ValueError("levels must be two numbers for each layer")


@dataclass(frozen=True, kw_only=True)
class HeadProfile(_Profile):
    """Scores of every attention head of a language model.

    Attributes:
        scores: name of a score -> ``[layers][heads]``; larger means more.
        means: mean output of each head at the last prompt row, ``[layers][heads][dim]``, for mean ablation.
    """

    FILE_NAME: ClassVar[str] = "vlmattn_heads.json"
    scores: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    means: tuple[tuple[tuple[float, ...], ...], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.scores, Mapping):
            raise ValueError("scores must have names")
        tables = tuple(self.scores.values())
        rows = [row for table in tables for row in table]
        if not rows or not (_even(tables) and _even(rows)):
            raise ValueError("scores must be one number for each layer and head")
        if not _numbers(rows):
            raise ValueError("scores must be numbers")
        heads = [head for layer in self.means for head in layer]
        if not (_even(self.means) and _even(heads) and _numbers(heads)):
            raise ValueError("means must be numbers, by layer, head and dimension")

    def check(self, anatomy: Anatomy, where: str) -> None:
        super().check(anatomy, where)
        shapes = {(len(table), len(table[0])) for table in (*self.scores.values(), self.means) if table}
        if shapes - {(anatomy.layers, anatomy.heads)}:
            raise OptionError(
                f"{where}: this HeadProfile is damaged (not {anatomy.layers} layers of {anatomy.heads} heads); measure"
                " it again"
            )

    def merged(self, other: HeadProfile) -> HeadProfile:
        """This profile and another of the same model as one; of scores and means that both have, those of ``other``.

        Raises:
            OptionError: they belong to different models.
        """
        if other.fingerprint != self.fingerprint:
            raise OptionError("profiles of two language models cannot be merged")
        prompts = tuple(dict.fromkeys((*self.prompts, *other.prompts)))
        scores, means = {**self.scores, **other.scores}, other.means or self.means
        return dataclasses.replace(other, prompts=prompts, scores=scores, means=means)

    def top(self, score: str, share: float) -> tuple[tuple[int, int], ...]:
        """The ``share`` of all (layer, head) pairs with the largest score, at least one; best first."""
        if score not in self.scores:
            raise OptionError(f"the profile has no score '{score}'; it has {', '.join(sorted(self.scores))}")
        table = self.scores[score]
        ranked = sorted(
            ((layer, head) for layer, row in enumerate(table) for head in range(len(row))),
            key=lambda place: -table[place[0]][place[1]],
        )
        return tuple(ranked[: max(1, round(share * len(ranked)))])


def load_profile(path: str | os.PathLike[str]) -> HeadProfile | SinkProfile:
    """Read a profile of either kind, recognised by what is in it, from a file or a folder.

    Raises:
        InputError: no such file, not a profile, a folder with no profile or with one of each kind.
    """
    source = Path(path)
    if os.path.isdir(source):
        kinds = (HeadProfile, SinkProfile)
        found = [source / kind.FILE_NAME for kind in kinds if (source / kind.FILE_NAME).is_file()]
        if len(found) > 1:
            one, other = (kind.FILE_NAME for kind in kinds)
            raise InputError(f"{path_text(source)} holds two profiles; name one of them: {one} or {other} in it")
        source = found[0] if found else source / HeadProfile.FILE_NAME
    data = _read(source, "profile")
    kind = SinkProfile if isinstance(data, Mapping) and "dims" in data else HeadProfile
    return kind._made(data, source)


def _read(source: Path, what: str) -> Any:
    """The JSON in a file."""
    text = read_text(source, what="the profile")
    try:
        return parse_json(text, "JSON")
    except InputError as error:
        raise InputError(f"{path_text(source)}: not a {what} ({error})") from None


def check_heads(heads: Iterable[tuple[int, int]], anatomy: Anatomy, count: int, where: str, what: str) -> None:
    """Raise ``OptionError`` if the model, whose layers have ``count`` heads, lacks one of the (layer, head) pairs."""
    for layer, head in heads:
        if layer >= anatomy.layers or head >= count:
            raise OptionError(
                f"{where} names {what} {head} of layer {layer}, but the model has {anatomy.layers} layers of {count}"
                f" {what}s"
            )


def _even(rows: Collection[Collection[Any]]) -> bool:
    """All of one length."""
    return len({len(row) for row in rows}) <= 1


def _numbers(rows: Collection[Collection[Any]]) -> bool:
    return all(_is_number(value) for row in rows for value in row)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, dict) else value
