"""Fitting focus directions: what to add to queries so that chosen heads look at the relevant context."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vlmattn.anatomy import Anatomy
from vlmattn.errors import OptionError
from vlmattn.inspection.measuring import Keep, attention_of
from vlmattn.inspection.prompt_spans import Span, prepared_spans
from vlmattn.interventions.focus import save_directions
from vlmattn.kernels import AttentionEdit
from vlmattn.models import find_family
from vlmattn.request import Weights

_SMALL = 0.01  # standard deviation of the directions before the first step, as released


def fit_directions(
    model: PreTrainedModel,
    examples: Sequence[Span],
    heads: int | Sequence[tuple[int, int]] = 20,
    *,
    epochs: int = 10,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
    path: str | os.PathLike[str] | None = None,
) -> dict[str, Tensor]:
    """Learn vectors that make heads attend to labelled spans (arXiv 2503.23306, as its released code does).

    With a the attention of a row after u_h was added to its queries of head h (after the rotation):

        minimise over u    -mean over heads and rows of the answer of sum_{j in span} a_j

    by AdamW, one example a step, from normal numbers of standard deviation .01. Each layer is fitted by itself, on
    inputs that no direction has changed. The weights are only read; edits of a wrapped model do not act meanwhile.

    Each step changes a number by about ``lr`` at most, and the released directions have a length of 24 to 30: with few
    examples take more epochs.

    Args:
        examples: prompts, each with its span and maybe an answer.
        heads: (layer, head) of the heads to steer, as ``HeadProfile.top`` gives them; or how many: those whose answer
            rows attend most to the spans, in the mean over the examples, as released.
        epochs: how often each example is seen, in an order drawn anew.
        lr: of AdamW.
        seed: of the start and the order.
        progress: show a bar with the loss.
        path: file or folder to save them to, where ``wrap(model, "focus", file=...)`` reads them; None = nowhere.

    Returns:
        ``"query.{layer}"``: float32 ``[heads, dim]`` of each layer with a chosen head, on the cpu, zero for heads that
        are not chosen.

    Raises:
        OptionError: no heads, heads that the model does not have, epochs below 1, lr not above 0.
        InputError: no examples, one that is not a single prompt, a span or an answer outside of it.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    anatomy = find_family(model).anatomy(model)
    _check(heads, epochs, lr, anatomy)
    spans = [_Rows.of(span, prompt) for span, prompt in zip(examples, prepared_spans(model, examples), strict=True)]
    generator = torch.Generator().manual_seed(seed)
    # Also in the user's inference_mode: what is looked at here is differentiated through.
    with torch.inference_mode(False), torch.enable_grad():
        places = _most(model, spans, heads) if isinstance(heads, int) else sorted(set(heads))
        loss = _Loss(model, spans, places, anatomy.heads)
        found = {
            layer: (_SMALL * torch.randn(len(mine), anatomy.query_size(layer), generator=generator)).requires_grad_()
            for layer, mine in loss.chosen.items()
        }
        orders = [torch.randperm(len(spans), generator=generator).tolist() for _ in range(epochs)]
        _descend(found, loss, [number for order in orders for number in order], lr, progress)
    query = {layer: _placed(part.detach(), loss.chosen[layer], anatomy.heads) for layer, part in found.items()}
    if path is not None:
        save_directions(query, path, anatomy)
    return {f"query.{layer}": value for layer, value in query.items()}


@dataclass(frozen=True, eq=False)
class _Rows:
    """A prompt on the model's device, its span, and the rows of its answer, both from and to."""

    inputs: dict[str, Any]
    span: tuple[int, int]
    answer: tuple[int, int]

    @classmethod
    def of(cls, span: Span, inputs: dict[str, Any]) -> _Rows:
        length = inputs["input_ids"].shape[1]
        return cls(inputs, (span.start, span.stop), (length - 1 if span.answer is None else span.answer, length))

    def mass(self, weights: Weights, shift: Tensor | None = None) -> Tensor:
        """Attention of the answer on the span ``[heads]``, mean over its rows."""
        start, stop = self.span
        return weights(*self.answer, AttentionEdit(shift=shift))[0, :, :, start:stop].sum(-1).mean(-1)


class _Loss:
    """What is minimised for one example: less attention of the chosen heads ``places`` on its span."""

    def __init__(
        self, model: PreTrainedModel, spans: Sequence[_Rows], places: Sequence[tuple[int, int]], heads: int
    ) -> None:
        self.chosen: dict[int, list[int]] = defaultdict(list)
        for layer, head in places:
            self.chosen[layer].append(head)
        self._spans, self._heads, self._count = spans, heads, len(places)
        with torch.no_grad():
            keep: Keep = lambda context, weights: weights if context.layer in self.chosen else None  # noqa: E731
            self._weights = [attention_of(model, span.inputs, keep) for span in spans]

    def __call__(self, number: int, directions: Mapping[int, Tensor]) -> Tensor:
        total = torch.zeros(())
        for layer, weights in self._weights[number].items():
            shift = _placed(directions[layer], self.chosen[layer], self._heads)
            mass = self._spans[number].mass(weights, shift)[self.chosen[layer]]
            total = total - mass.sum().cpu() / self._count
        return total


def _descend(
    found: Mapping[int, Tensor], loss: Callable[[int, Mapping[int, Tensor]], Tensor], order: Sequence[int], lr: float,
    progress: bool,
) -> None:  # fmt: skip
    """Steps of AdamW down the loss of one example after another."""
    adam = torch.optim.AdamW(found.values(), lr=lr)
    with tqdm(order, desc="directions", disable=not progress) as bar:
        for number in bar:
            adam.zero_grad()
            value = loss(number, found)
            value.backward()  # type: ignore[no-untyped-call]
            adam.step()
            bar.set_postfix(loss=f"{float(value.detach()):.3f}")


def _check(heads: int | Sequence[tuple[int, int]], epochs: int, lr: float, anatomy: Anatomy) -> None:
    if epochs < 1 or not lr > 0:
        raise OptionError(f"epochs must be at least 1 and lr above 0, got {epochs} and {lr:g}")
    layers = range(anatomy.layers) if anatomy.attending is None else anatomy.attending
    if isinstance(heads, int):
        exist = 1 <= heads <= len(layers) * anatomy.heads
    else:
        exist = len(heads) > 0 and all(n in layers and 0 <= h < anatomy.heads for n, h in heads)
    if not exist:
        raise OptionError(
            f"heads must be (layer, head) pairs, at least one, within {anatomy.layers} layers and {anatomy.heads}"
            f" heads, or how many of these; got {heads}"
        )


def _placed(part: Tensor, heads: list[int], count: int) -> Tensor:
    """Vectors ``[chosen, dim]`` among those of all heads ``[count, dim]``, 0 for the others."""
    return part.new_zeros(count, part.shape[1]).index_copy(0, torch.tensor(heads), part)


def _most(model: PreTrainedModel, spans: Sequence[_Rows], count: int) -> list[tuple[int, int]]:
    """The ``count`` heads whose answer rows attend most to the spans."""
    total: dict[int, Tensor] = {}
    for span in spans:

        def mass(_: Any, weights: Weights, span: _Rows = span) -> Tensor:
            return span.mass(weights).cpu()

        with torch.no_grad():
            found = attention_of(model, span.inputs, mass)
        total = {layer: mass + total.get(layer, 0.0) for layer, mass in found.items()}
    ranked = sorted(
        ((float(mass), layer, head) for layer, of in total.items() for head, mass in enumerate(of)), reverse=True
    )
    return sorted((layer, head) for _, layer, head in ranked[:count])
