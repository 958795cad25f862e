"""Fitting focus directions: what to add to queries and keys so that chosen heads look at the relevant context."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from vlmattn.attention import STEP
from vlmattn.errors import OptionError
from vlmattn.inspection.measuring import only
from vlmattn.inspection.spans import Span, prepared_spans
from vlmattn.interventions.focus import save_directions
from vlmattn.models import Anatomy, Family, find_family
from vlmattn.request import Plan, Request, Step, Weights

_BATCH = 8  # examples in one step (ours)
_TINY = 1e-30  # least attention mass whose logarithm is taken


def fit_directions(
    model: PreTrainedModel,
    examples: Sequence[Span],
    heads: Sequence[tuple[int, int]],
    *,
    steps: int = 100,
    lr: float = 1e-2,
    seed: int = 0,
    progress: bool = True,
    path: str | os.PathLike[str] | None = None,
) -> dict[str, Tensor]:
    """Learn vectors that make heads attend to labelled spans (experimental, after arXiv 2503.23306).

    With a the attention of the last prompt row after u_h is added to the queries of head h and w_g to the keys of its
    key head g, both as they leave their projections (before any norm and rotation; on which side the paper's code adds
    them is not verified):

        minimise over u, w    -mean over examples and heads of log sum_{j in span} a_j

    by Adam from zero. Each layer is fitted by itself, on inputs that no direction has changed. The model's weights are
    only read; edits of a wrapped model do not act meanwhile.

    Args:
        examples: prompts and their spans; at most 8 of them, drawn anew, make a step.
        heads: (layer, head) of the heads to steer, as ``HeadProfile.top`` gives them.
        steps: of Adam.
        lr: of Adam, in units of the projections' outputs.
        seed: of the draw.
        progress: show a bar with the loss.
        path: file or folder to save them to, where ``wrap(model, "focus", file=...)`` reads them; None = nowhere.

    Returns:
        ``"query.{layer}"``: float32 ``[heads, dim]`` and ``"key.{layer}"``: float32 ``[kv_heads, dim]`` of each layer
        with a chosen head, on the cpu, zero for heads that are not chosen.

    Raises:
        OptionError: no heads, heads that the model does not have, steps below 1, lr not above 0.
        InputError: no examples, one that is not a single prompt, a span outside of it.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    family = find_family(model)
    anatomy = family.anatomy(model)
    if steps < 1 or not lr > 0:
        raise OptionError(f"steps must be at least 1 and lr above 0, got {steps} and {lr:g}")
    if not heads or any(not (0 <= n < anatomy.layers and 0 <= h < anatomy.heads) for n, h in heads):
        raise OptionError(
            f"heads must be (layer, head) pairs, at least one, within {anatomy.layers} layers and {anatomy.heads} heads"
        )
    prompts = prepared_spans(model, examples)
    spans = [(example.start, example.stop) for example in examples]
    chosen: dict[int, list[int]] = defaultdict(list)
    for number, head in sorted(set(heads)):
        chosen[number].append(head)
    layers = [_Layer(family, family.layers(model)[number], anatomy, chosen[number]) for number in chosen]
    # Also in the user's inference_mode: what the layers get here is differentiated through.
    with torch.inference_mode(False), torch.enable_grad(), only(model), ExitStack() as stack:
        _capture(model, layers, prompts)
        for layer in layers:
            layer.add_directions(stack)
        adam = torch.optim.Adam([p for layer in layers for p in (layer.query, layer.key)], lr=lr)
        draw = torch.Generator().manual_seed(seed)
        with tqdm(total=steps, desc="directions", disable=not progress) as bar:
            for _ in range(steps):
                batch = torch.randperm(len(spans), generator=draw)[:_BATCH].tolist()
                adam.zero_grad()
                total = 0.0
                for layer in layers:
                    for example in batch:
                        loss = layer.loss(example, *spans[example]) / (len(set(heads)) * len(batch))
                        loss.backward(inputs=[layer.query, layer.key])  # type: ignore[no-untyped-call]
                        total += float(loss.detach())
                adam.step()
                bar.set_postfix(loss=f"{total:.3f}")
                bar.update()
    query = {number: layer.query.detach().cpu() for number, layer in zip(chosen, layers, strict=True)}
    key = {number: layer.key.detach().cpu() for number, layer in zip(chosen, layers, strict=True)}
    if path is not None:
        save_directions(query, key, path, anatomy)
    return {f"query.{n}": query[n] for n in query} | {f"key.{n}": key[n] for n in key}


class _Layer:
    """One attention module, what it gets in every example, and the directions that are fitted for it."""

    def __init__(self, family: Family, layer: nn.Module, anatomy: Anatomy, heads: list[int]) -> None:
        self._attention, *self._projections = family.projections(layer)
        self._heads = heads
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        device = next(self._attention.parameters()).device
        with torch.inference_mode(False):
            self.query, self.key = (
                torch.zeros(count, anatomy.head_dim, device=device, requires_grad=True)
                for count in (anatomy.heads, anatomy.kv_heads)
            )

    def listen(self, stack: ExitStack) -> None:
        """Keep what the module gets, until the stack closes."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append((args, kwargs))

        stack.callback(self._attention.register_forward_pre_hook(keep, with_kwargs=True).remove)

    def add_directions(self, stack: ExitStack) -> None:
        """Add the directions to what the projections give, until the stack closes."""
        for projection, direction in zip(self._projections, (self.query, self.key), strict=True):

            def add(module: nn.Module, args: tuple[Any, ...], out: Tensor, direction: Tensor = direction) -> Tensor:
                return out + direction.flatten().to(out)

            stack.callback(projection.register_forward_hook(add).remove)

    def loss(self, example: int, start: int, stop: int) -> Tensor:
        """- sum over heads of log sum_{start <= j < stop} a_j of the last row of one example."""
        found = []

        def watch(layer: int, out: Tensor, weights: Weights) -> None:
            rows = out.shape[1]
            mass = weights(rows - 1, rows)[0, self._heads, 0, start:stop].sum(-1)
            found.append(-mass.clamp_min(_TINY).log().sum())

        args, kwargs = self._calls[example]
        self._attention(*args, **{**kwargs, STEP: Step(Request(Plan("directions")), "", 0, watch=watch)})
        return found[0]


@torch.no_grad()
def _capture(model: PreTrainedModel, layers: list[_Layer], prompts: list[dict[str, Any]]) -> None:
    with ExitStack() as stack:
        for layer in layers:
            layer.listen(stack)
        for prompt in prompts:
            model(**prompt, use_cache=False, logits_to_keep=1)
