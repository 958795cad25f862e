"""Focus directions: vectors added to the queries of chosen heads (arXiv 2503.23306)."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import InputError, OptionError
from vlmattn.files import beside, path_text
from vlmattn.interventions.base import Intervention
from vlmattn.interventions.directions import read_tensors, write_tensors
from vlmattn.kernels import AttentionEdit
from vlmattn.options import option
from vlmattn.registry import register
from vlmattn.request import LayerContext

FILE_NAME = "vlmattn_directions.safetensors"


@register(
    "focus",
    paper="arXiv:2503.23306",
    code="github.com/billzyx/focus_direction",
    faithful="golden",
    parts="query shift",
    cost="one addition to the queries of the listed heads",
    presets={"focus": ("released strength .2; directions that were fitted for the model", {})},
)
@dataclass(frozen=True, kw_only=True)
class FocusDirections(Intervention):
    """Add saved directions to the queries of chosen heads, so that they attend more to what matters.

        q_h <- q_h + alpha d_h     after the rotation, all tokens;  each key's score rises by alpha scale d_h . k_j

    The cache stays as it is. ``vlmattn.inspection.fit_directions`` learns directions from labelled spans; the file has
    ``query.LAYER`` ``[heads, dim]``, zero for other heads. The released code adds directions to keys as well, the same
    for every key of a head, which changes no softmax: ``key.LAYER`` in a file is left out, with a warning. Counts
    attention calls.

    Raises:
        OptionError: no file given and none beside the model; a file for another model.
        InputError: a file without query directions.
    """

    acts_on = "tokens"
    needs_images = False
    files: ClassVar[Mapping[str, str]] = {"file": FILE_NAME}
    alpha: float = option(0.2, -100, 100, "strength", source="released script")
    file: str = option("", about=f"safetensors file of directions; empty: {FILE_NAME} beside the model")

    def bind(self, anatomy: Anatomy) -> FocusDirections:
        path = self.file or str(beside(anatomy.source, FILE_NAME) or "")
        if not path:
            raise OptionError(
                "focus: which directions? Learn them with vlmattn.inspection.fit_directions(model, examples, heads),"
                " save them and name the file with file=..."
            )
        tensors, facts = _load(path)
        if facts.get("fingerprint") != anatomy.fingerprint:
            raise OptionError(
                f"focus: {path} belongs to another language model (fitted on '{facts.get('source', 'unknown')}', config"
                f" hash {facts.get('fingerprint', 'missing')}; the model's is {anatomy.fingerprint}); fit them again on"
                " this one"
            )
        for layer, tensor in tensors.items():
            shape = (anatomy.heads, anatomy.query_size(min(layer, anatomy.layers - 1)))
            if tuple(tensor.shape) != shape or layer >= anatomy.layers:
                raise OptionError(
                    f"focus: {path} has 'query.{layer}' of shape {tuple(tensor.shape)}; the model needs {shape}"
                )
        bound = replace(self, file=path)
        bound.active_layers(anatomy)
        return bound

    def active_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        found = tuple(sorted({*super().active_layers(anatomy)} & {*_load(self.file)[0]}))
        if not found:
            raise OptionError(f"focus.layers '{self.layers}' has none of the layers in {self.file}")
        return found

    def edit(self, context: LayerContext) -> AttentionEdit:
        if not self.alpha:
            return AttentionEdit()
        context.count("focus", 1)

        def shift() -> Tensor:
            return self.alpha * _load(self.file)[0][context.layer].to(context.device)

        return AttentionEdit(shift=context.store(self).once("shift", shift))


def save_directions(query: Mapping[int, Tensor], path: str | os.PathLike[str], anatomy: Anatomy) -> Path:
    """Write directions ``[heads, dim]`` by layer to a file, or under the usual name to a folder."""
    tensors = {f"query.{layer}": value for layer, value in query.items()}
    facts = {"fingerprint": anatomy.fingerprint, "source": anatomy.source}
    target = write_tensors(path, FILE_NAME, tensors, facts)
    _load.cache_clear()
    return target


@lru_cache(maxsize=8)
def _load(path: str) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Query directions of a file by layer, and its metadata."""
    tensors, facts = read_tensors(path)
    named = all(re.fullmatch(r"(query|key)\.[0-9]{1,6}", name) for name in tensors)
    found = {int(name.split(".")[1]): value for name, value in tensors.items() if name.startswith("query")}
    if not named or not found:
        raise InputError(f"{path_text(path)}: not a file of directions (needs query.LAYER)")
    if len(found) < len(tensors):
        warnings.warn(
            f"focus: the key directions in {path_text(path)} are left out, as they change no attention; if an earlier"
            " version of vlmattn fitted this file, fit it again: directions now act after the rotation",
            stacklevel=2,
        )
    return found, facts
