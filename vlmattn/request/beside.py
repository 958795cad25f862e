"""Other inputs that go through the decoder beside a prompt, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.request.plan import Compare, Method, Weights


@dataclass(eq=False)
class SideStream:
    """Other inputs that go through the decoder beside a prompt while it is read, up to the last layer in ``layers``.

    In each layer the prompt's attention is computed first, up to the head gains; then the stream's layer runs; then
    ``method`` is asked for its edit of the prompt. The stream knows no cache, no gradient and no other method.

    Attributes:
        method: who compares; layers: where.
        compare: sees both, see ``Compare``.
        hidden: ``[batch, tokens, hidden]``, the residual stream that enters its next layer.
        calls: the decoder's layers, each with what the decoder gives it for these inputs.
        layer: index of the next layer.
    """

    method: Method
    layers: frozenset[int]
    compare: Compare
    hidden: Tensor
    calls: tuple[Callable[[Tensor], Tensor], ...] = ()
    layer: int = 0
    _prompt: Tensor | None = None

    def waits_at(self, layer: int) -> bool:
        """The stream's next layer is this one (not so when a checkpointed layer is computed again for gradients)."""
        return self.layer == layer <= max(self.layers)

    def follow(self, out: Tensor) -> None:
        """Run the stream's next layer; ``out`` ``[batch, query, heads, dim]`` are the prompt's head outputs there."""
        self._prompt = out
        with torch.no_grad():
            # In an empty context: who collects the outputs of layers for the prompt hears nothing of it.
            self.hidden = Context().run(self.calls[self.layer], self.hidden)
        self.layer, self._prompt = self.layer + 1, None

    def watch(self, layer: int, out: Tensor, weights: Weights) -> Tensor | None:
        """What the stream's own attention does (``Watch``)."""
        if layer not in self.layers or self._prompt is None:
            return None
        return self.compare(layer, self._prompt, out)
