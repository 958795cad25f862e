"""Changes of hidden states: what a decoder layer, or its MLP, puts out under methods that steer."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.attention import FORWARD
from vlmattn.kernels import steered
from vlmattn.models.sizes import mlp_of
from vlmattn.request import Forward, LayerContext, Part, Step

_Layer = tuple[int, Forward, torch.Size, Any]  # number, passing, shape of the residual stream; the layer around it
_NOW = threading.local()  # an MLP gets no arguments of ours: which layer this thread is in


def hook_mlp(layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Put the hook on the MLP of a layer, if it has one."""
    mlp = mlp_of(layer)
    return [] if mlp is None else [mlp.register_forward_hook(_after_mlp)]


def enter_layer(index: int, passing: Forward | None, hidden: Tensor) -> None:
    """Note the layer that this thread runs now on ``hidden`` ``[batch, query, hidden]``, for its MLP.

    A stream beside the prompt runs its layer within the attention of the prompt's.
    """
    steers = passing is not None and any(part.plan.steering for part in passing.parts)
    _NOW.layer = (index, passing, hidden.shape, getattr(_NOW, "layer", None)) if steers else None


def leave_model() -> None:
    """Forget layers that raised."""
    _NOW.layer = None


def _after_mlp(mlp: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    found: _Layer | None = getattr(_NOW, "layer", None)
    return None if found is None else _changed("mlp", found[0], found[1], output, found[2])


def steer_layer(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a decoder layer."""
    passing: Forward | None = kwargs.get(FORWARD)
    if passing is None:
        return None
    if passing.main.states is not None:
        passing.main.states(index, output[0] if isinstance(output, tuple) else output)
    if not any(part.plan.steering for part in passing.parts):
        return None
    _NOW.layer = _NOW.layer[3]
    return _changed("layer", index, passing, output)


def _changed(site: str, index: int, passing: Forward, output: Any, shape: torch.Size | None = None) -> Any:
    """An output, or the first of several, with the changes of one site; None = it stays.

    ``shape``: of the residual stream, as some mixtures of experts put out their rows side by side.
    """
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    found = given = hidden if shape is None else hidden.view(shape)
    for part in passing.parts:
        if part.acting is not None and part.plan.steering:
            found = _of_part(site, index, part, part.acting, found)
    if found is given:
        return None
    found = found.view(hidden.shape)
    return (found, *output[1:]) if isinstance(output, tuple) else found


def _of_part(site: str, index: int, part: Part, step: Step, hidden: Tensor) -> Tensor:
    queries = hidden.shape[1]
    keys = step.capacity if step.start is None else step.start + queries
    context = LayerContext(step, index, queries, keys, hidden.device)
    parts = tuple(
        change for method in part.plan.steering[index] if method.site == site for change in method.residual(context)
    )
    if not parts:
        return hidden
    if len(hidden[part.rows]) == len(hidden):
        return steered(hidden, parts)
    changed = hidden.clone()
    changed[part.rows] = steered(hidden[part.rows], parts)
    return changed
