"""The decoder before a prompt is read: what methods may have it run on, at once or beside the prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmattn.request.callbacks import Compare, Watch, Weights
from vlmattn.request.request import Request


@dataclass(eq=False)
class SideStream:
    """Other inputs that go through the decoder beside a prompt while it is read, up to the last layer in ``layers``.

    In each layer the prompt's attention is computed first, up to the head gains; then the stream's layer runs; then
    ``method`` is asked for its edit of the prompt. The stream knows no cache, no gradient and no other method.

    Attributes:
        method: who compares; layers: where.
        compare: sees both, see ``Compare``.
        hidden: ``[batch, tokens, hidden]``, the residual stream that enters its next layer.
        calls: the decoder's layers, each with what the decoder gives it for these inputs. skipped: layers that do
            not run, as they read images that the stream does not have; what their heads say counts as zero.
        silent: layers without attention, which run on the way to the next that has some.
        layer: index of the next layer.
    """

    method: Any
    layers: frozenset[int]
    compare: Compare
    hidden: Tensor
    calls: tuple[Callable[[Tensor], Tensor], ...] = ()
    skipped: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()
    layer: int = 0
    _prompt: Tensor | None = None

    def waits_at(self, layer: int) -> bool:
        """The stream's next layer is this one (not so when a checkpointed layer is computed again for gradients)."""
        return layer <= max(self.layers) and self.layer <= layer and self.silent.issuperset(range(self.layer, layer))

    def follow(self, out: Tensor) -> None:
        """Run the stream's next layer; ``out`` ``[batch, query, heads, dim]`` are the prompt's head outputs there."""
        while self.layer in self.silent:
            self._run()
        self._prompt = out
        if self.layer in self.skipped and self.layer in self.layers:
            self.compare(self.layer, out, torch.zeros_like(out[:, -1:]))
        self._run()
        self._prompt = None

    def _run(self) -> None:
        with torch.no_grad():
            # In an empty context: who collects the outputs of layers for the prompt hears nothing of it.
            self.hidden = Context().run(self.calls[self.layer], self.hidden)
        self.layer += 1

    def watch(self, layer: int, out: Tensor, weights: Weights) -> Tensor | None:
        """What the stream's own attention does (``Watch``)."""
        if layer not in self.layers or self._prompt is None:
            return None
        return self.compare(layer, self._prompt, out)


@dataclass(frozen=True, eq=False)
class Prefill:
    """The decoder's inputs before a prompt is read, and two ways to have the decoder run on others.

    Attributes:
        embeds: ``[batch, prompt, hidden]``, image features in place.
        real: bool ``[batch, prompt]``.
        visual: bool ``[batch, prompt]``.
        positions: position ids ``[batch, prompt]``, ``[3 or 4, batch, prompt]`` (M-RoPE) or None.
        run: ``run(embeds, positions, watch)`` runs the decoder at once, without cache, on embeddings of the same
            tokens, which see what they see in the prompt; ``watch`` as in ``Part``.
        states: ``states(keep)`` and ``states(keep, hidden)`` run it so on the prompt, and on what is left of it without
            the tokens ``hidden``, bool ``[batch, prompt]``; ``keep`` as ``states`` in ``Part``.
        beside: ``beside(method, slots, real, positions, layers, compare)`` lets a ``SideStream`` of the prompt's tokens
            at ``slots`` ``[batch, tokens]`` go beside the prompt.
    """

    request: Request
    layers: int
    embeds: Tensor
    real: Tensor
    visual: Tensor
    positions: Tensor | None
    run: Callable[[Tensor, Tensor | None, Watch], None]
    states: Callable[..., None]
    beside: Callable[[Any, Tensor, Tensor, Tensor | None, frozenset[int], Compare], None]
