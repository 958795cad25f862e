"""What policies share that hold a part of all tokens, of text and images alike: the budget, and how it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmattn.anatomy import Anatomy
from vlmattn.errors import UnsupportedError
from vlmattn.interventions.pruning.policy import KVPolicy, best, host_counts
from vlmattn.kernels import NO_EDIT, AttentionEdit
from vlmattn.options import option
from vlmattn.request import Eviction, LayerContext, Store, Weights

if TYPE_CHECKING:
    from typing_extensions import Self

_ROWS = 256  # whose attention is looked at in one go


@dataclass(frozen=True, kw_only=True)
class BudgetPolicy(KVPolicy):
    """Base of policies that hold ``keep_ratio`` of a prompt's tokens: only ``scores`` is theirs.

    Slots are chosen when the prompt ends; with ``stepwise`` again after each step, so that no more are ever held. With
    ``by_head`` each KV head has slots of its own; then mode "mask" has each head read them, and one prompt is all.
    """

    needs_images: ClassVar[bool] = False
    stepwise: ClassVar[bool] = False
    keep_ratio: float = option(0.5, 0, 1, "share of the prompt's tokens that is held")

    def scores(self, context: LayerContext, held: list[int]) -> Tensor:
        """How much each slot matters, ``[batch, kv_heads or 1, keys]``; the ``held`` highest of each sequence stay."""
        raise NotImplementedError

    def bind(self, anatomy: Anatomy) -> KVPolicy:
        if self.by_head and anatomy.latent:
            raise UnsupportedError(
                f"'{self.info.name}' holds other slots for each KV head, and {anatomy.family} has latent attention,"
                " whose cache all heads share; use a policy for all heads, like tova"
            )
        return KVPolicy.bind(self, anatomy)

    def budget(self, layer: int, tokens: int) -> int:
        """Tokens that a layer holds of so many."""
        return min(max(round(self.keep_ratio * tokens), 1), tokens)

    def at(self, share: float) -> Self:
        return replace(self, keep_ratio=share)

    def cached(self, layer: int, images: int, text: int, kv_heads: int) -> tuple[float, float] | None:
        held = self.budget(layer, images + text)
        return held, held

    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None:
        if self.stepwise:
            self.advance(context)
        kept = context.store(self)
        kept.shared["kv_heads"] = key.shape[1]
        if context.step.is_prompt and "stays" in kept.rows:
            raise UnsupportedError(
                f"'{self.info.name}' in mode 'mask' hides slots from steps only; give the whole conversation as one"
                " prompt, or use mode 'drop'"
            )

    def evict(self, context: LayerContext) -> Eviction | None:
        kept = context.store(self)
        if context.step.is_prompt:
            there = [sum(pair) for pair in zip(*host_counts(context.request, context.keys), strict=True)]
            gone = kept.rows.get("gone", [0] * len(there))  # after earlier turns
            held = [min(self.budget(context.layer, n + lost), n) for n, lost in zip(there, gone, strict=True)]
            kept.rows["gone"] = [n + lost - stay for n, lost, stay in zip(there, gone, held, strict=True)]
        elif not self.stepwise or context.queries > 1:
            return None
        else:
            there = [context.keys - others for others in kept.rows["others"]]
            held = [min(n, most) for n, most in zip(there, kept.rows["held"], strict=True)]
            kept.rows["gone"] = [lost + n - stay for lost, n, stay in zip(kept.rows["gone"], there, held, strict=True)]
        kept.rows["held"] = held
        return self._hold(context, held)

    def _hold(self, context: LayerContext, held: list[int]) -> Eviction | None:
        """The ``held`` slots of each sequence with the highest scores stay."""
        kept, scores, real = context.store(self), self.scores(context, held), self._there(context)
        batch, heads, keys = scores.shape
        hidden = not self.drops and self.by_head
        width = max(held) if self.drops else keys
        kept.rows["others"] = [width - n for n in held]
        counts = [n for n in held for _ in range(heads)]
        stays = best(scores.flatten(0, 1), real.expand(-1, heads, -1).flatten(0, 1), counts).view(batch, heads, keys)
        joined = self.joined(context, stays)
        if hidden:
            kept.rows["stays"] = stays
            context.count(self.info.name, sum(keys - n for n in held))
            whole = tuple(sum(pair) for pair in zip(*host_counts(context.request, keys), strict=True))
            return None if joined is None else Eviction(real_slots(context), whole, joined)
        found = Eviction(stays if self.by_head else stays[:, 0], tuple(held), joined)
        self.moved(kept, found, context)
        return found

    def joined(self, context: LayerContext, stays: Tensor) -> tuple[Tensor, float] | None:
        """What slots that go are merged into (``Eviction.joined``); None = they are lost."""
        return None

    def moved(self, kept: Store, found: Eviction, context: LayerContext) -> None:
        """Let what the policy keeps for each KV head and slot follow what stays."""

    def _there(self, context: LayerContext) -> Tensor:
        """bool ``[batch, 1 or kv_heads, keys]``: slots that may be held."""
        real = context.real
        if real is None:
            real = torch.ones(len(context.visual), context.keys, dtype=torch.bool, device=context.device)
        there = real[:, None]
        if (stays := context.store(self).rows.get("stays")) is not None:
            there = there & pad(stays, (0, context.keys - stays.shape[-1]), value=True)
        return there

    def edit(self, context: LayerContext) -> AttentionEdit:
        if "stays" not in context.store(self).rows:
            return AttentionEdit()
        there = self._there(context)
        read = there.byte().argsort(dim=-1, descending=True, stable=True)
        return AttentionEdit(read=torch.where(there.gather(-1, read), read, -1))


@dataclass(frozen=True, kw_only=True)
class AttentionBudget(BudgetPolicy):
    """Base of those whose scores come from attention: ``look`` at it, in the prompt, with ``stepwise`` in steps too."""

    def look(self, context: LayerContext, weights: Weights, edit: AttentionEdit) -> Tensor:
        """``[batch, kv_heads or 1, keys]`` from attention under ``edit``, which hides what mode "mask" does."""
        raise NotImplementedError

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return self.active_layers(anatomy)

    @property
    def follows_attention(self) -> bool:
        return self.stepwise

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        context.store(self).rows["seen"] = self.look(context, weights, self.edit(context))

    def scores(self, context: LayerContext, held: list[int]) -> Tensor:
        found: Tensor = context.store(self).rows.pop("seen")
        return found

    def by_kv_head(self, context: LayerContext, values: Tensor) -> Tensor:
        """``[batch, heads, keys]`` as the mean over the query heads of each KV head."""
        batch, _, keys = values.shape
        return values.view(batch, context.store(self).shared["kv_heads"], -1, keys).mean(2)


def rows_seen(
    context: LayerContext,
    weights: Weights,
    edit: AttentionEdit = NO_EDIT,
    most: int | None = None,
    asking: Tensor | None = None,
) -> Tensor:
    """Attention of the last ``most`` real rows (None = all), summed over them: float32 ``[batch, heads, keys]``.

    ``asking`` bool ``[batch, keys]``: of the rows of these slots only.
    """
    total = None
    for part, rows, _ in few_rows(context, weights, edit, most, asking):
        found = part.masked_fill(~rows[:, None, :, None], 0).sum(2)
        total = found if total is None else total + found
    assert total is not None
    return total


def few_rows(
    context: LayerContext,
    weights: Weights,
    edit: AttentionEdit = NO_EDIT,
    most: int | None = None,
    asking: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """The same, a few rows at a time, so that no matrix of all is made.

    Yields:
        Attention ``[batch, heads, rows, keys]``, which of the rows count, bool ``[batch, rows]``, and their slots.
    """
    begin = context.keys - context.queries if context.step.start is None else context.step.start
    stop = context.request.prompt_length - begin if context.step.is_prompt else context.queries
    wanted = real_slots(context) if asking is None else asking & real_slots(context)
    for first in range(0 if most is None else max(stop - most, 0), stop, _ROWS):
        last = min(first + _ROWS, stop)
        slots = slice(begin + first, begin + last)
        yield weights(first, last, edit)[..., : context.keys], wanted[:, slots], slots


def newest(context: LayerContext, counts: int | Tensor) -> Tensor:
    """bool ``[batch, keys]``: the last ``counts`` (one for all, or int64 ``[batch, 1]``) real tokens."""
    from_last = numbers(context)
    return (from_last > from_last[:, -1:] - counts) & real_slots(context)


def real_slots(context: LayerContext) -> Tensor:
    """bool ``[batch, keys]``: slots that hold a token."""
    real = context.real
    return torch.ones_like(context.visual) if real is None else real


def numbers(context: LayerContext) -> Tensor:
    """int64 ``[batch, keys]``: number of each real token among those that the layer has, from 1."""
    return real_slots(context).cumsum(1)


def above(scores: Tensor, flags: Tensor) -> Tensor:
    """Scores ``[batch, heads, keys]``; those at ``flags`` ``[batch, keys]`` above all others, the later the higher."""
    slots = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    return torch.where(flags[:, None], scores.amax(-1, keepdim=True) + slots, scores)
