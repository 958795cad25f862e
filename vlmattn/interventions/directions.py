"""Directions in hidden states: what was measured on a model, as a safetensors file beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import InputError, OptionError
from vlmattn.files import beside, make_folder, path_text, reading, written_whole

FILE_NAME = "vlmattn_steering.safetensors"
_FACTS = ("fingerprint", "source", "method", "examples")


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions ``[k, hidden]`` of layers, float32, and where they come from.

    Attributes:
        by_layer: the number of a layer -> its directions, the most important first.
        fingerprint: of the language model (``Anatomy.fingerprint``); source: its folder or hub name.
        method: how they were measured; examples: on what.
    """

    by_layer: Mapping[int, Tensor]
    fingerprint: str
    source: str = ""
    method: str = ""
    examples: str = ""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write them to a file, or under the usual name to a folder, where methods look for it."""
        tensors = {f"direction.{layer}": value for layer, value in self.by_layer.items()}
        target = write_tensors(path, FILE_NAME, tensors, {name: getattr(self, name) for name in _FACTS})
        load_directions.cache_clear()
        return target

    def check(self, anatomy: Anatomy, where: str) -> None:
        """Raise ``OptionError`` if they were measured on another model, or a layer or width is none of this one's."""
        if self.fingerprint != anatomy.fingerprint:
            raise OptionError(
                f"{where}: these directions belong to another language model (measured on"
                f" '{self.source or 'unknown'}', config hash {self.fingerprint or 'missing'}; the model's is"
                f" {anatomy.fingerprint}); measure them again on this one: vlmattn fit"
            )
        for layer, found in self.by_layer.items():
            if layer >= anatomy.layers or found.ndim != 2 or found.shape[1] != anatomy.hidden_size or not len(found):
                raise OptionError(
                    f"{where}: 'direction.{layer}' is of shape {list(found.shape)}; the model has layers"
                    f" 0..{anatomy.layers - 1} and needs [k, {anatomy.hidden_size}]"
                )


def write_tensors(
    path: str | os.PathLike[str], usual: str, tensors: Mapping[str, Tensor], facts: dict[str, str]
) -> Path:
    """Write float32 tensors and facts about them to a safetensors file, or under the ``usual`` name to a folder."""
    target = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / usual
    make_folder(target.parent)
    found = {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    with written_whole(target) as partial:
        save_file(found, partial, facts)
    return target


def read_tensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file of directions, float32, and its facts.

    Raises:
        FileError: it cannot be read. InputError: it is no safetensors file.
    """
    with reading(path, "the directions"), safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


@lru_cache(maxsize=8)
def load_directions(path: str) -> Directions:
    """Read a file of directions.

    Raises:
        FileError: it cannot be read. InputError: it holds something else, or numbers that are not finite.
    """
    tensors, facts = read_tensors(path)
    if not tensors or not all(re.fullmatch(r"direction\.[0-9]{1,6}", name) for name in tensors):
        raise InputError(f"{path_text(path)}: not a file of directions (needs direction.LAYER)")
    if bad := [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]:
        raise InputError(f"{path_text(path)}: {bad[0]} has numbers that are not finite; measure the directions again")
    by_layer = {int(name.split(".")[1]): value for name, value in sorted(tensors.items())}
    return Directions(by_layer, *(facts.get(name, "") for name in _FACTS))


def directions_for(name: str, path: str, anatomy: Anatomy) -> tuple[str, Directions]:
    """The directions of a method of that name, and their file: what was given, or what is beside the model.

    Raises:
        OptionError: there are none, or they belong to another model.
    """
    path = path or str(beside(anatomy.source, FILE_NAME) or "")
    if not path:
        raise OptionError(
            f"{name}: which directions? Measure them with vlmattn fit (docs/howto-steering.md) and name the file with"
            " file=..."
        )
    found = load_directions(path)
    found.check(anatomy, f"{name}: {path_text(path)}")
    return path, found
