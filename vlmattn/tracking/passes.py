"""What attention across frames does during one forward of a multi-view network: store keys and values, or read them.

``running(a_pass, modules)`` acts for this thread and this call only: while one of the modules runs, calls of
``F.scaled_dot_product_attention`` go to the pass. The queries and keys that arrive there are final (normalised and
rotated), so nothing of the network needs to be known or replaced, and nothing stays on it afterwards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmattn.errors import UnsupportedError
from vlmattn.kernels.segments import attend

Cache = tuple[tuple[Tensor, Tensor], ...]  # keys and values [1, heads, tokens of all keyframes, dim], by call

_running: ContextVar[Pass | None] = ContextVar("vlmattn_tracking_pass", default=None)


def current() -> Pass | None:
    """The pass that runs in this thread."""
    return _running.get()


class Pass(ABC):
    """One forward; ``attention`` sees the calls of the watched modules in their order."""

    def __init__(self) -> None:
        self.calls = 0

    @abstractmethod
    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """What the module gets in place of stock attention. All ``[batch, heads, tokens, dim]``."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or is_causal or dropout_p or query.shape[1] != key.shape[1]:
            raise UnsupportedError(
                "attention across frames must be plain: no mask, no dropout, as many key as query heads; "
                "call model.eval(), or track with another network"
            )
        self.calls += 1
        return self.attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)


class Store(Pass):
    """Run as ever and keep keys and values.

    Args:
        dtype: of what is kept; None: as it comes.
        keep: bool ``[tokens]``, which tokens of calls of that many to keep; None: all.
    """

    def __init__(self, dtype: torch.dtype | None = None, keep: Tensor | None = None) -> None:
        super().__init__()
        self._dtype, self._keep = dtype, keep
        self._kept: list[tuple[Tensor, Tensor]] = []

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self._kept.append((self._copy(key), self._copy(value)))
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    def _copy(self, x: Tensor) -> Tensor:
        """A copy of its own: values are often a view of a joint projection, which would stay in memory whole."""
        if self._keep is not None and x.shape[2] == len(self._keep):
            x = x[:, :, self._keep]
        return x.detach().to(self._dtype or x.dtype, memory_format=torch.contiguous_format, copy=True)

    @property
    def cache(self) -> Cache:
        return tuple(self._kept)


class Read(Pass):
    """The frame sees the map and itself: softmax over the keys of both, merged from two calls."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self._cache = cache

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if self.calls > len(self._cache):
            raise UnsupportedError("the network attends across frames more often than when the map was made")
        return attend(query, (self._cache[self.calls - 1], (key, value)), scale)


class _Shim(TorchFunctionMode):
    """Sends one module's attention to the pass."""

    def __init__(self, to: Pass, name: str) -> None:
        super().__init__()
        self._to, self.name, self.seen = to, name, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen += 1
            return self._to(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def close(self, done: bool) -> None:
        """The module returned, or (not ``done``) raised."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if done and self.seen != 1:
            raise UnsupportedError(
                f"{self.name} called F.scaled_dot_product_attention {self.seen} times where once is expected; other"
                " kernels (xformers, flash-attn) must be switched off, and an adapter names the modules that call it"
            )


@contextmanager
def running(this: Pass, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Send the attention of ``modules`` to ``this`` pass, in this thread, until the block ends.

    Raises:
        UnsupportedError: a module did not call ``F.scaled_dot_product_attention`` exactly once when it ran.
    """

    inside: list[_Shim] = []

    def enter(module: nn.Module, args: Any) -> None:
        if _running.get() is this:
            inside.append(_Shim(this, type(module).__name__))
            inside[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if _running.get() is this:
            inside.pop().close(done=output is not None)

    handles = [module.register_forward_pre_hook(enter) for module in modules]
    handles += [module.register_forward_hook(leave, always_call=True) for module in modules]
    token = _running.set(this)
    try:
        yield
    finally:
        _running.reset(token)
        for handle in handles:
            handle.remove()
