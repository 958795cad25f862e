"""AttentionEdit: what a method wants done to attention, as data.

For query row i, head h and keys j with scaled scores s and group ids g(j), an edit means

    s    = scale (q_i + shift_h) . k_j
    s'   = logit parts in order, applied to s
    see  = (causal and not padding and keep and read) + opened edges - hidden edges, mask parts in order
    a    = softmax over see of s' (+ log weight on softly opened edges);  a row that sees nothing gives zeros
    a'_j = (gamma_g + delta_g w_j) a_j      for every gain part in order, g = g(j), decided by the group masses
                                            M_g = sum_{j in g} a_j and W_g = sum_{j in g} w_j a_j
    out  = eta_h sum_j a'_j v_j + c_h       for every head-gain part

All tensors are indexed ``[batch, query]``, ``[batch, key]`` or ``[batch, heads]``; nothing of size query x key is part
of an edit. ``then`` composes; ``AttentionEdit()`` is the identity.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from vlmattn.errors import OptionError
from vlmattn.kernels.plans import Plan

Relation = Literal["any", "same", "different"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Query rows that a part applies to, ``mask`` bool ``[batch, query]``; none before ``first``, as the host knows."""

    mask: Tensor
    first: int = 0

    def slice(self, start: int, stop: int) -> Rows:
        return Rows(self.mask[:, start:stop], max(self.first - start, 0))

    def where(self, changed: Tensor, otherwise: Tensor | float) -> Tensor:
        """``changed`` (``[batch, heads, query, ...]``) on these rows, ``otherwise`` elsewhere."""
        return torch.where(self.mask[:, None, :, None], changed, otherwise)


@dataclass(frozen=True, eq=False)
class MaskPart:
    """Edges from query rows to keys that are opened or hidden.

    Row i and key j form an edge when both ids are >= 0 and stand in ``relation`` (their ids are the same, different,
    or any). ``weight`` 0 hides the edges; ``weight`` in (0, 1] opens those that were not visible, as if each such key
    counted ``weight`` times (a bias log(weight) before the softmax). Padding is never opened.

    ``mix`` weighs two softmaxes instead: (1 - weight) softmax over what was visible + weight softmax over that and the
    opened keys. With Z and Z_E the sums of exp(s) over both sets this is one softmax in which an opened key counts
    weight Z / (Z + (1 - weight) Z_E) times; in a row that saw nothing it opens nothing.

    Attributes:
        rows: int ``[batch, query]``, -1 = row not concerned.
        keys: int ``[batch, key]``, -1 = key not concerned.
        heads: bool ``[batch or 1, heads]``, the heads it acts on; None = all.
    """

    rows: Tensor
    keys: Tensor
    weight: float = 1.0
    relation: Relation = "any"
    mix: bool = False
    heads: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise OptionError(f"MaskPart.weight must be within 0..1, got {self.weight}")

    def edges(self) -> Tensor:
        """bool ``[batch, heads or 1, query, key]``."""
        row, key = self.rows[:, :, None], self.keys[:, None, :]
        edges = (row >= 0) & (key >= 0)
        if self.relation != "any":
            edges = edges & ((row == key) == (self.relation == "same"))
        return edges[:, None] if self.heads is None else edges[:, None] & self.heads[:, :, None, None]


@dataclass(frozen=True, eq=False)
class LogitPart:
    """Change of the scaled score before the softmax: ``s' = scale_j s + lift_j |s| + guide_j mean_h |s_h| + bias_j``.

    Attributes:
        scale, lift, guide, bias: float ``[batch, key]`` or ``[batch, heads, key]``; None means 1, 0, 0 and 0. The mean
            that ``guide`` weighs is over all heads.
        rows: the query rows it applies to; None means all.
    """

    scale: Tensor | None = None
    lift: Tensor | None = None
    guide: Tensor | None = None
    bias: Tensor | None = None
    rows: Rows | None = None


@dataclass(frozen=True, eq=False)
class GainPart:
    """Gains per key group after the softmax, decided by the group masses of each row and head.

    Attributes:
        groups: uint8 ``[batch, key]``, values 0 .. plan.groups - 1; every key is in exactly one group.
        plan: the rule from masses to gains.
        rows: the query rows it applies to; None means all.
        present: for each contiguous run of keys ``(start, stop, groups)`` which groups may occur there. A hint for the
            prefill backend, known on the host; None means that any group may occur anywhere.
        weight: float ``[batch, key]``, the key weights w_j, for plans that use them.
    """

    groups: Tensor
    plan: Plan
    rows: Rows | None = None
    present: tuple[tuple[int, int, tuple[int, ...]], ...] | None = None
    weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HeadPart:
    """Each head's output before ``o_proj`` becomes ``gain_h out_h + offset_h``.

    Attributes:
        gain: float ``[batch or 1, heads]``.
        rows: the query rows it applies to; None means all.
        offset: float ``[batch or 1, heads, dim]``; None means 0.
    """

    gain: Tensor
    rows: Rows | None = None
    offset: Tensor | None = None


Part = TypeVar("Part", LogitPart, GainPart, HeadPart)


@dataclass(frozen=True, eq=False)
class AttentionEdit:
    """The parts of an edit (module docstring); mask, logit, gain and head gain are tuples applied in order.

    ``keep`` (bool ``[batch, key]``) names the cache slots that go on from this layer: others are invisible here and no
    mask part opens them. ``read`` (int ``[batch, kv_heads, n]``, each slot at most once, -1 = none) does the same for
    each KV head, for few slots of a long cache: the others are not even loaded by the decode kernel. ``shift`` (float
    ``[heads, dim]``) is added to the queries of all rows as they come, that is after the rotation.
    """

    mask: tuple[MaskPart, ...] = ()
    logit: tuple[LogitPart, ...] = ()
    gain: tuple[GainPart, ...] = ()
    head_gain: tuple[HeadPart, ...] = ()
    keep: Tensor | None = None
    read: Tensor | None = None
    shift: Tensor | None = None

    @property
    def is_identity(self) -> bool:
        return self._count == 0 and len(self.head_gain) == 0

    @property
    def only_head_gain(self) -> bool:
        return self._count == 0 and len(self.head_gain) > 0

    @property
    def only_read(self) -> bool:
        """Heads read some slots, and that is all (head gains aside)."""
        return self.read is not None and self._count == 1

    @property
    def _count(self) -> int:
        """Parts other than head gains; lengths, because a tuple as a condition would break compiled graphs."""
        tensors = (self.keep is not None) + (self.read is not None) + (self.shift is not None)
        return len(self.mask) + len(self.logit) + len(self.gain) + tensors

    def then(self, other: AttentionEdit) -> AttentionEdit:
        """This edit, and ``other`` after it (within each part; the parts keep their order of the module docstring).

        Raises:
            OptionError: both choose the slots that KV heads read.
        """
        if self.read is not None and other.read is not None:
            raise OptionError("two methods of the recipe choose the cache slots that heads read; use one of them")
        return AttentionEdit(
            self.mask + other.mask,
            self.logit + other.logit,
            self.gain + other.gain,
            self.head_gain + other.head_gain,
            _both(self.keep, other.keep, torch.logical_and),
            other.read if self.read is None else self.read,
            _both(self.shift, other.shift, torch.add),
        )

    def shifted(self, query: Tensor) -> tuple[Tensor, AttentionEdit]:
        """Queries ``[batch, heads, query, dim]`` with ``shift`` added, and what is left of the edit."""
        if self.shift is None:
            return query, self
        return query + self.shift[:, None].to(query), replace(self, shift=None)

    @property
    def first_row(self) -> int:
        """No query row before this one attends differently (head gains aside); known on the host."""
        if len(self.mask) or self.keep is not None or self.read is not None or self.shift is not None:
            return 0
        rows = [part.rows for part in self.logit] + [part.rows for part in self.gain]
        return min((0 if part is None else part.first for part in rows), default=sys.maxsize)

    def slice_rows(self, start: int, stop: int) -> AttentionEdit:
        """The same edit for the query rows ``start:stop`` only."""
        return replace(
            self,
            mask=tuple(replace(part, rows=part.rows[:, start:stop]) for part in self.mask),
            logit=_slice_rows(self.logit, start, stop),
            gain=_slice_rows(self.gain, start, stop),
            head_gain=_slice_rows(self.head_gain, start, stop),
        )

    def kept(self, heads: int, keys: int) -> Tensor | None:
        """``keep`` and ``read`` as bool ``[batch, heads or 1, key]``; None = every slot."""
        keep = None if self.keep is None else self.keep[:, None]
        if self.read is None:
            return keep
        batch, kv_heads, _ = self.read.shape
        named = torch.zeros(batch, kv_heads, keys + 1, dtype=torch.bool, device=self.read.device)
        named.scatter_(2, torch.where(self.read < 0, keys, self.read).long(), True)
        named = named[..., :keys].repeat_interleave(heads // kv_heads, 1)
        return named if keep is None else named & keep


NO_EDIT = AttentionEdit()


def _both(one: Tensor | None, other: Tensor | None, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    """Two tensors joined, where None leaves the other one as it is."""
    if one is None or other is None:
        return other if one is None else one
    return join(one, other)


def _slice_rows(parts: tuple[Part, ...], start: int, stop: int) -> tuple[Part, ...]:
    return tuple(part if part.rows is None else replace(part, rows=part.rows.slice(start, stop)) for part in parts)


def select_gains(part: GainPart, mass: Tensor, weighted: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """gamma and delta ``[batch, heads, query, groups]`` of one gain part: the plan's on its rows, 1 and 0 elsewhere."""
    gamma, delta = part.plan.gains(mass, weighted)
    if part.rows is not None:
        gamma = part.rows.where(gamma, 1.0)
        delta = None if delta is None else part.rows.where(delta, 0.0)
    return gamma, delta


def scale_heads(edit: AttentionEdit, out: Tensor) -> Tensor:
    """Apply the head-gain parts to head outputs ``[batch, heads, query, dim]``."""
    for part in edit.head_gain:
        new = out * part.gain[:, :, None, None].to(out.dtype)
        if part.offset is not None:
            new = new + part.offset[:, :, None].to(out.dtype)
        out = new if part.rows is None else part.rows.where(new, out)
    return out
