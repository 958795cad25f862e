"""Calls the attention that a model had with the arguments that it takes, where masks are of another form than ours.

Ours say for each row which keys it sees, bool ``[batch, 1, query, key]``; None is causal for several rows, which see
the first keys, and everything for one row. Flash attention takes which keys are padding, flex attention blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

Output = tuple[Tensor, Tensor | None]


@cache
def base_attention(name: str, function: Callable[..., Output], kind: str | None) -> Callable[..., Output]:
    """An attention implementation for our masks; ``kind`` says whose masks it takes itself."""
    return partial({"flash": _flash, "flex": _flex}.get(str(kind), _other), name, function)


class _Under:
    """A module, or its config, that names the attention implementation which the model had."""

    def __init__(self, of: Any, **other: Any) -> None:
        self.__dict__.update(other, _of=of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"], name)


def _under(name: str, module: nn.Module) -> Any:
    """The module under its old name, by which flash attention chooses its kernel."""
    return _Under(module, config=_Under(module.config, _attn_implementation=name))


def _other(name: str, function: Callable[..., Output], module: nn.Module, *states: Any, **kwargs: Any) -> Output:
    return function(_under(name, module), *states, **kwargs)


def _flash(
    name: str,
    function: Callable[..., Output],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Output:
    """Flash attention: its last rows are the last keys, so those that no row sees are left out."""
    if mask is None:
        padding, keys = None, key.shape[2] if query.shape[2] == 1 else query.shape[2]
    else:
        windowed = kwargs.get("sliding_window") is not None
        padding, keys = _noted(mask, partial(_padding, windowed))
        padding = None if padding is None else padding.expand(len(query), -1)
    return function(_under(name, module), query, key[:, :, :keys], value[:, :, :keys], padding, **kwargs)


def seen_by_flash(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Any:
    """The mask of a layer with what flash attention goes by beside padding: the window, and whether it is causal."""
    given = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if given is None else given)
    window, rows = kwargs.get("sliding_window"), query.shape[2]
    if window is not None and key.shape[2] <= window:
        window = None
    if causal and window is None:
        return mask
    if mask is None:
        last = key.shape[2] if rows == 1 else rows
        mask = torch.arange(key.shape[2], device=query.device).expand(1, 1, rows, -1) < last
    real = mask[:, :, -1:]
    here = torch.arange(rows, device=query.device)[:, None] - rows + real.any(0).flatten().nonzero().max() + 1
    far = here - torch.arange(key.shape[2], device=query.device)
    found = real.expand(-1, -1, rows, -1)
    if causal:
        found = found & (far >= 0)
    return found if window is None else found & (far.abs() < window)


def _padding(windowed: bool, mask: Tensor) -> tuple[Tensor | None, int]:
    """Which keys are real, bool ``[batch, key]``, None = all, and how many there are up to the last of them.

    The last row sees them all, those aside that have left its window; rows of padding may see themselves.
    """
    seen = mask.any(1)
    seen = seen.any(1) if windowed else seen[:, -1]
    keys = int(seen.any(0).nonzero().max()) + 1
    seen = seen[:, :keys]
    return (None if bool(seen.all()) else seen), keys


def _flex(
    name: str,
    function: Callable[..., Output],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Output:
    """Flex attention, which takes a mask that is added as it is."""
    rows = query.shape[2]
    if mask is None and rows > 1:
        key, value = key[:, :, :rows], value[:, :, :rows]
        mask = torch.ones(1, 1, rows, rows, dtype=torch.bool, device=query.device).tril()
    blocks = mask if mask is None or mask.is_floating_point() else _noted(mask, _blocks)
    return function(_under(name, module), query, key, value, blocks, **kwargs)


def _blocks(mask: Tensor) -> Any:
    """The mask as flex attention takes it."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, _, rows, keys = mask.shape
    return create_block_mask(lambda b, h, q, k: mask[b, 0, q, k], batch, None, rows, keys, device=mask.device)


def _noted(mask: Tensor, make: Callable[[Tensor], Any]) -> Any:
    """What is made of a mask, once for all layers that have it."""
    if not hasattr(mask, "_vlmattn_base"):
        mask._vlmattn_base = make(mask)  # type: ignore[attr-defined]
    return mask._vlmattn_base  # type: ignore[attr-defined]
