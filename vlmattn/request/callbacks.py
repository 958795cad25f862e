"""Functions that methods get from the engine or give to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from vlmattn.kernels import AttentionEdit


class Weights(Protocol):
    """``weights(start, stop)``: unedited attention ``[batch, heads, stop - start, key]``, float32, of a few rows."""

    def __call__(self, start: int, stop: int, /, edit: AttentionEdit = ...) -> Tensor:
        """With ``edit``: as it would be under that edit (head gains aside)."""


Watch = Callable[[int, Tensor, Weights], Tensor | None]
"""``watch(layer, out, weights)`` sees head outputs ``[batch, query, heads, dim]`` and may return head gains ``[batch,
heads]``."""

Compare = Callable[[int, Tensor, Tensor], Tensor | None]
"""``compare(layer, prompt, beside)`` sees head outputs ``[batch, query, heads, dim]`` of the prompt and of a stream
beside it, both before any head gain, and may return head gains ``[batch, heads]`` for the stream."""

States = Callable[[int, Tensor], None]
"""``states(layer, hidden)`` sees what a layer puts out, ``[batch, query, hidden]``."""
