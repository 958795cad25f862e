"""The shape of a policy about cached keys and values: it evicts slots, or chooses which ones a step reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vlmattn.anatomy import Anatomy
from vlmattn.errors import StateError, UnsupportedError
from vlmattn.interventions.base import Intervention, optional
from vlmattn.kernels import AttentionEdit
from vlmattn.options import option
from vlmattn.request import TEXT, Eviction, HeadSplit, LayerContext, Request, Weights

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class KVPolicy(Intervention):
    """Base of policies: they score slots (``on_attention``, ``on_queries_keys``), and evict some or read a part.

    Evicted slots are gone, and their memory with them; what a step does not read stays where it is. ``mode`` "mask"
    hides what "drop" evicts: the same choice, to compare with.
    """

    shrinks: ClassVar[bool] = True  # its layers hold less after the prompt
    by_head: ClassVar[bool] = False  # every KV head holds other tokens: nobody else can say which slot is what
    mode: str = option("drop", about="evict slots, or only hide them (to compare)", choices=("drop", "mask"))

    @property
    def kind(self) -> str:
        return "pruning"

    @property
    def drops(self) -> bool:
        return self.mode == "drop"

    def bind(self, anatomy: Anatomy) -> KVPolicy:
        if anatomy.window:
            raise UnsupportedError(
                f"'{self.info.name}' chooses cache slots, and this language model has sliding windows, which count"
                " them; use a model with full attention in every layer"
            )
        self.active_layers(anatomy)
        return self

    def cached(self, layer: int, images: int, text: int, kv_heads: int) -> tuple[float, float] | None:
        """Slots of a sequence that an active layer holds after the prompt, and that a step reads, mean over KV heads.

        For ``vlmattn.cost`` (what is read: mean over steps too); None = known only once the prompt has been read. Args:
        real image tokens that reach the layer, other real tokens.
        """
        return None

    @optional
    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None:
        """Queries ``[batch, heads, query, dim]`` and keys ``[batch, kv_heads, key, dim]`` of an active layer."""

    @optional
    def evict(self, context: LayerContext) -> Eviction | None:
        """Which slots of the layer's cache stay, once the layer has run; None = all."""
        return None

    @optional
    def split(self, context: LayerContext) -> HeadSplit | None:
        """Which KV heads of the layer keep everything from now on, once a prompt has run through it; None = all."""
        return None

    def edit(self, context: LayerContext) -> AttentionEdit:
        return AttentionEdit()

    def generated(self, context: LayerContext) -> int:
        """Generated tokens that the layer has read, with this one; 0 while a prompt is read."""
        return 0 if context.step.is_prompt else context.keys - context.request.prompt_length

    def advance(self, context: LayerContext) -> None:
        """Note that what the policy keeps depends on the tokens up to this one.

        Raises:
            StateError: some of these were taken back.
        """
        shared, count = context.store(self).shared, self.generated(context)
        self.refuse_cropped(context)
        shared["advanced"] = count

    def refuse_cropped(self, context: LayerContext) -> None:
        """Raise ``StateError`` if tokens were taken back that what the policy keeps depends on (``advance``)."""
        before, count = context.store(self).shared.get("advanced", 0), self.generated(context)
        if 0 < count <= before:
            raise StateError(
                f"this cache was cropped to {count - 1} generated tokens, and what '{self.info.name}' keeps comes from"
                f" {before}; start a new generate()"
            )


@dataclass(frozen=True, kw_only=True)
class ScorerPolicy(KVPolicy):
    """Base of policies that evict image tokens once a prompt is read: only ``score`` is theirs. Text stays."""

    keep_ratio: float = option(0.5, 0, 1, "share of the image tokens that is held")

    def score(self, context: LayerContext, query: Tensor, key: Tensor, weights: Weights) -> Tensor:
        """How much each slot of the layer matters, ``[batch, keys]``; the image tokens with the highest ones are held.

        Queries and keys as in ``on_queries_keys``; ``weights`` gives unedited attention of the prompt's rows.
        """
        raise NotImplementedError

    def at(self, share: float) -> Self:
        return replace(self, keep_ratio=share)

    def cached(self, layer: int, images: int, text: int, kv_heads: int) -> tuple[float, float]:
        held = round(self.keep_ratio * images) + text
        return held, held

    def attention_layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        return self.active_layers(anatomy)

    def on_queries_keys(self, context: LayerContext, query: Tensor, key: Tensor) -> None:
        if context.step.is_prompt:
            context.store(self).shared["states"] = (query, key)

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        kept = context.store(self)
        query, key = kept.shared.pop("states")
        kept.by_slot("scores", 0, torch.float32).write(0, self.score(context, query, key, weights))

    def evict(self, context: LayerContext) -> Eviction | None:
        if not context.step.is_prompt:
            return None
        kept, (images, text) = context.store(self), host_counts(context.request, context.keys)
        gone = kept.rows.get("gone", [0] * len(images))  # after earlier turns
        held = [min(round(self.keep_ratio * (n + lost)), n) for n, lost in zip(images, gone, strict=True)]
        kept.rows["gone"] = [n + lost - stay for n, lost, stay in zip(images, gone, held, strict=True)]
        scores = kept.slots["scores"].read(context.keys, context.device)
        return hold_images(context, scores, held, text)


def image_tokens(context: LayerContext) -> Tensor:
    """bool ``[batch, keys]``: real image tokens among the slots of a layer."""
    real = context.real
    return context.visual if real is None else context.visual & real


def best(scores: Tensor, among: Tensor, counts: list[int]) -> Tensor:
    """The ``counts`` slots of each sequence with the highest scores, all bool ``[batch, keys]``, ``among`` some."""
    order = scores.float().masked_fill(~among, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < torch.tensor(counts, device=scores.device)[:, None]) & among


def hold_images(context: LayerContext, scores: Tensor, held: list[int], text: list[int]) -> Eviction:
    """Text, and the ``held`` image tokens of each sequence with the highest scores ``[batch, keys]``, stay."""
    visual = image_tokens(context)
    counts = tuple(images + words for images, words in zip(held, text, strict=True))
    return Eviction(~visual | best(scores, visual, held), counts)


def slots_of(flags: Tensor, count: int) -> Tensor:
    """Up to ``count`` slots ``[batch, 1, count]`` where ``flags`` ``[batch, keys]`` is set, -1 for none."""
    order = flags.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.where(flags.gather(1, order), order, -1)[:, None]


def host_counts(request: Request, keys: int) -> tuple[list[int], list[int]]:
    """Real image tokens and other real tokens of each sequence in its first ``keys`` slots; one look from the host."""
    host = torch.device("cpu")
    visual, real = request.types(keys, host) != TEXT, request.real(keys, host)
    real = torch.ones_like(visual) if real is None else real
    return (visual & real).sum(1).tolist(), (~visual & real).sum(1).tolist()
