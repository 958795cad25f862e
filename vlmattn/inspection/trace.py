"""What a model looked at while it answered: attention of the rows that predict it, and what entered the layers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmattn.errors import InputError
from vlmattn.files import file_errors, path_text, reading, written_whole
from vlmattn.inspection.named import Named
from vlmattn.models import Piece
from vlmattn.texts import read_json

GROUPS = ("system", "image", "question", "answer")
"""Kinds of tokens: of the chat template (and text before the user's), the images, the user's text, the answer."""

_FACTS, _STATES = "trace.json", "trace.safetensors"


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace:
    """One prompt and its answer under one recipe. Tokens are counted by slot, from the first of the prompt.

    Attributes:
        recipe, source: what acted, and the folder or hub name of the model.
        tokens: each token as text, prompt first; the last answer token is there too, though no layer ran on it.
        groups: index into ``GROUPS`` of each token. images: number of the image of each token, -1 for text.
        pieces: for each image where its tokens lie in the picture; empty where that is not known.
        prompt: tokens of the prompt. answer: token ids of the answer. said: the answer as text, without special tokens.
        layers: decoder layers with attention; the axis "layer" of everything counts within these.
        rows: for each row that was kept its attention, float32 ``[layer, head, key]``, after masks, changed scores and
            group gains; 0 for tokens that the layer no longer has. Keys are the prompt, and the answer up to the row.
        gains: for each such row what each head's output was multiplied with, ``[layer, head]``.
        phi: sink value max_d abs(x_d) / RMS(x) of each token that entered a layer, float32 ``[layer, token]``; nan
            where it did not. dims: the d of it. norms: of x. likeness: abs(cos(x, x_first)) with the first token of the
            prompt.
        logprobs: of each answer token, ``[token]``; rivals: the most likely tokens there and their log-probabilities,
            as text.
        notes: what else should be said beside the figures.
    """

    recipe: str
    source: str
    tokens: tuple[str, ...]
    groups: tuple[int, ...]
    images: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    prompt: int
    answer: tuple[int, ...]
    said: str
    layers: tuple[int, ...]
    rows: Mapping[int, Tensor] = field(repr=False)
    gains: Mapping[int, Tensor] = field(repr=False)
    phi: Tensor = field(repr=False)
    dims: Tensor = field(repr=False)
    norms: Tensor = field(repr=False)
    likeness: Tensor = field(repr=False)
    logprobs: Tensor = field(repr=False)
    rivals: tuple[tuple[tuple[str, float], ...], ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def heads(self) -> int:
        return int(next(iter(self.gains.values())).shape[1])

    @property
    def answer_rows(self) -> tuple[int, ...]:
        """Rows that predict the answer, in order: the last of the prompt, then each answer token but the last."""
        return tuple(range(self.prompt - 1, self.prompt - 1 + len(self.answer)))

    def row_of(self, step: int) -> int:
        """The row that predicts answer token ``step`` (from 0; from the end below 0).

        Raises:
            InputError: the answer has no such token.
        """
        if not -len(self.answer) <= step < len(self.answer):
            count = len(self.answer)
            raise InputError(f"answer token {step} is out of range: the answer has {count} tokens (0 to {count - 1})")
        return self.answer_rows[step]

    def attention(self, row: int) -> Named:
        """Attention of a row that was kept: float32 ``[layer, head, key]``, 0 for tokens that it does not see.

        Raises:
            InputError: a row that was not kept.
        """
        if row not in self.rows:
            kept = ", ".join(map(str, sorted(self.rows)))
            raise InputError(f"attention of row {row} was not kept; look(..., rows=[{row}]) keeps it; kept are {kept}")
        found = self.rows[row]
        return Named(torch.nn.functional.pad(found, (0, len(self.tokens) - found.shape[-1])), ("layer", "head", "key"))

    def keys_of(self, group: str, image: int | None = None) -> Tensor:
        """bool ``[token]``: tokens of a group of ``GROUPS``, or of one image."""
        if image is not None:
            return torch.tensor(self.images) == image
        return torch.tensor(self.groups) == GROUPS.index(group)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the trace into a new folder, as JSON and safetensors.

        Raises:
            InputError: the folder exists.
        """
        with new_trace(folder) as place:
            for row, attention in self.rows.items():
                write_row(place, row, attention)
            self.write_facts(place)
        return Path(folder)

    def write_facts(self, place: Path) -> None:
        """Write all but the rows."""
        facts = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name not in _TENSORS}
        facts["pieces"] = [[piece.to_dict() for piece in pieces] for pieces in self.pieces]
        states = {name: getattr(self, name).contiguous() for name in _STREAM}
        (place / _FACTS).write_text(json.dumps(facts))
        save_file(states | {f"gains.{row}": gain for row, gain in self.gains.items()}, place / _STATES)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Trace:
        """Read a saved trace; the rows are read when they are asked for.

        Raises:
            InputError: no trace there.
        """
        source = Path(folder)
        try:
            facts = read_json(source / _FACTS)
            with reading(source / _STATES):
                states = load_file(source / _STATES)
            pieces = tuple(tuple(Piece.from_dict(piece) for piece in of_image) for of_image in facts.pop("pieces"))
            gains = {int(name.split(".")[1]): states.pop(name) for name in list(states) if name.startswith("gains.")}
            return cls(
                **{name: _frozen(value) for name, value in facts.items()},
                pieces=pieces,
                rows=Rows(source),
                gains=gains,
                **states,
            )
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise InputError(
                f"{path_text(source)} holds no trace ({error}); look(..., folder=...) and Trace.save write one"
            ) from None


_STREAM = ("phi", "dims", "norms", "likeness", "logprobs")
_TENSORS = ("rows", "gains", "pieces", *_STREAM)


class Rows(Mapping[int, Tensor]):
    """Rows on disk, one file each; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._files = {int(path.stem.split("-")[1]): path for path in sorted(folder.glob("row-*.safetensors"))}

    def __getitem__(self, row: int) -> Tensor:
        with reading(self._files[row]):
            found: Tensor = load_file(self._files[row])["attention"]
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@contextmanager
def new_trace(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a trace; it gets the name of the folder at the end, and nothing is left if anything goes wrong.

    Raises:
        InputError: the folder exists.
    """
    target = Path(folder)
    with file_errors("make the folder", target):
        if target.exists():
            raise InputError(f"{path_text(target)} exists; give a new folder for the trace")
    with written_whole(target) as partial:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial


def write_row(place: Path, row: int, attention: Tensor) -> None:
    """Write the attention of one row."""
    save_file({"attention": attention.contiguous()}, place / f"row-{row:06}.safetensors")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
