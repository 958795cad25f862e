"""Focus directions: vectors added to keys and queries of chosen heads (arXiv 2503.23306)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmattn.errors import InputError, OptionError
from vlmattn.files import beside, make_folder, written_whole
from vlmattn.interventions.base import Intervention
from vlmattn.interventions.registry import Sizes, option, parse_layers, register
from vlmattn.kernels import AttentionEdit
from vlmattn.request import Directions, Scope

FILE_NAME = "vlmattn_directions.safetensors"


@register(
    "focus",
    paper="arXiv:2503.23306",
    code="not available",
    faithful="experimental",
    parts="directions",
    cost="one addition to the queries and keys of the listed heads",
    presets={"focus": ("directions that were fitted for the model, strength 1", {})},
)
@dataclass(frozen=True, kw_only=True)
class FocusDirections(Intervention):
    """Add saved directions to the query and key projections of chosen heads, so that they attend more to what matters.

        q_h <- q_h + alpha d^q_h,   k_h <- k_h + alpha d^k_h     before the rotation, all tokens

    The cache holds the shifted keys. ``vlmattn.inspection.fit_directions`` learns directions from labelled spans; the
    file has ``query.LAYER`` ``[heads, dim]`` and ``key.LAYER`` ``[kv_heads, dim]``, zero for other heads. Whether the
    paper adds them before or after the rotation is not verified: experimental. Counts attention calls.

    Raises:
        OptionError: no file given and none beside the model; a file for another model.
    """

    needs_images = False
    files: ClassVar[Mapping[str, str]] = {"file": FILE_NAME}
    alpha: float = option(1.0, -100, 100, "strength", source="paper: tuned per model")
    file: str = option("", about=f"safetensors file of directions; empty: {FILE_NAME} beside the model")

    def bind(self, sizes: Sizes) -> FocusDirections:
        path = self.file or str(beside(sizes.source, FILE_NAME) or "")
        if not path:
            raise OptionError(
                "focus: which directions? Learn them with vlmattn.inspection.fit_directions(model, examples, heads), save them"
                " and name the file with file=..."
            )
        tensors, facts = _load(path)
        if facts.get("fingerprint") != sizes.fingerprint:
            raise OptionError(
                f"focus: {path} belongs to another language model (fitted on '{facts.get('source', 'unknown')}', config hash"
                f" {facts.get('fingerprint', 'missing')}; the model's is {sizes.fingerprint}); fit them again on this one"
            )
        for name, tensor in tensors.items():
            side, layer = name.split(".")
            shape = (sizes.heads if side == "query" else sizes.kv_heads, sizes.head_dim)
            if tuple(tensor.shape) != shape or int(layer) >= sizes.layers:
                raise OptionError(f"focus: {path} has '{name}' of shape {tuple(tensor.shape)}; the model needs {shape}")
        bound = replace(self, file=path)
        bound.active_layers(sizes)
        return bound

    def active_layers(self, sizes: Sizes) -> tuple[int, ...]:
        inside = set(parse_layers(self.layers, sizes.layers, "focus.layers"))
        found = tuple(sorted({int(name.split(".")[1]) for name in _load(self.file)[0]} & inside))
        if not found:
            raise OptionError(f"focus.layers '{self.layers}' has none of the layers in {self.file}")
        return found

    def directions(self, layer: int) -> Directions | None:
        tensors = _load(self.file)[0]
        query, key = tensors.get(f"query.{layer}"), tensors.get(f"key.{layer}")
        return Directions(None if query is None else self.alpha * query, None if key is None else self.alpha * key)

    def edit(self, scope: Scope) -> AttentionEdit:
        scope.count("focus", 1)
        return AttentionEdit()


def save_directions(
    query: Mapping[int, Tensor], key: Mapping[int, Tensor], path: str | os.PathLike[str], sizes: Sizes
) -> Path:
    """Write directions by layer, ``[heads, dim]`` and ``[kv_heads, dim]``, to a file or under the usual name to a folder."""
    target = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / FILE_NAME
    make_folder(target.parent)
    tensors = {f"query.{layer}": value.detach().float().cpu().contiguous() for layer, value in query.items()}
    tensors |= {f"key.{layer}": value.detach().float().cpu().contiguous() for layer, value in key.items()}
    with written_whole(target) as partial:
        save_file(tensors, partial, {"fingerprint": sizes.fingerprint, "source": sizes.source})
    _load.cache_clear()
    return target


@lru_cache(maxsize=8)
def _load(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of directions."""
    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the directions {path}: {error}") from None
    named = all(name.split(".")[0] in ("query", "key") and name.split(".")[-1].isdigit() for name in tensors)
    if not tensors or not named:
        raise InputError(f"{path}: not a file of directions (needs query.LAYER and key.LAYER)")
    return tensors, facts
