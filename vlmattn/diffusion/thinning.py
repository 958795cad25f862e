"""Rows of image tokens that pass by layers of a bidirectional denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.diffusion.gaze import Look, Score, answer_attention, no_grad
from vlmattn.diffusion.schedules import Schedule, counts_of, share_of
from vlmattn.errors import InputError, OptionError, StateError, UnsupportedError
from vlmattn.interventions.pruning.policy import best
from vlmattn.kernels import additive, hide
from vlmattn.request import compacted

_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_BY_ROW = ("attention_mask", "position_ids", "position_embeddings")
_UNREAD = ("cache_position",)  # without a cache nothing reads it


@contextmanager
def thinned(
    layers: Sequence[nn.Module],
    visual: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    real: Tensor | None = None,
    answer: Tensor | None = None,
    select: int = 0,
    persist: bool = True,
    without_positions: bool = False,
    score: Score = answer_attention,
) -> Iterator[Thinning]:
    """Let the layers of a bidirectional denoiser compute fewer image rows, for the block.

    Each forward of the stack is a denoising step. With n image tokens in a sequence, x the residual stream and K the
    round(keep(s, l) n) of them with the highest scores (ties: the first), in step s layer l computes text and K:

        x'_i = layer_l(x_text, x_K)_i  for text and K,     x'_i = x_i  for the others and for padding

    Kept rows keep their positions. Scores are taken when layer ``select`` is entered, in the first step only
    (``persist``, arXiv 2601.20168) or in every step; as long as there are none all image tokens go through, unless none
    is kept.

    Args:
        layers: decoder layers in order. Each gets ``hidden_states`` ``[batch, rows, hidden]`` first or by keyword, and
            by keyword may get ``attention_mask`` (2D, or 4D ``[batch or 1, heads or 1, rows or 1, rows]``),
            ``position_ids`` and ``position_embeddings`` (``[batch or 1, rows, ...]``).
        visual: bool ``[batch, rows]``, image tokens. real: False for padding; None = none.
        answer: bool ``[batch, rows]``, rows whose gaze counts; None = all that are no image tokens.
        schedule: see ``Schedule``. steps: forwards of the stack in one answer.
        without_positions: layers may get no positions. Right if those lie in the residual stream; layers that count
            their rows themselves count them anew then.
        score: see ``Score``.

    Raises:
        OptionError: a schedule or an option that does not fit the stack.
        StateError: more forwards than steps.
        InputError: another batch or length than that of ``visual``.
        UnsupportedError: layers that read or write a cache, that get inputs by row under other names, or no positions.

    Not thread-safe: one answer at a time.
    """
    state = Thinning(tuple(layers), visual, schedule, steps, real, answer, select, persist, without_positions, score)
    hooks = []
    try:
        for number, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(partial(state._enter, number), with_kwargs=True))
            hooks.append(layer.register_forward_hook(partial(state._leave, number)))
        yield state
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(eq=False)
class Thinning:
    """What ``thinned`` does, as it goes.

    Attributes:
        step: the present denoising step, -1 before the first.
        rows: ``rows[step][layer]``, how many rows of each sequence the layer computed.
        scores: float32 ``[batch, rows]``, what each row is worth; None before that is known.
    """

    _layers: tuple[nn.Module, ...]
    _visual: Tensor
    _schedule: Schedule
    _steps: int
    _real: Tensor | None
    _answer: Tensor | None
    _select: int
    _persist: bool
    _without_positions: bool
    _score: Score
    step: int = field(default=-1, init=False)
    rows: list[list[int]] = field(default_factory=list, init=False)
    scores: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._there = torch.ones_like(self._visual) if self._real is None else self._real
        self._visual = self._visual & self._there
        self._asked = (~self._visual if self._answer is None else self._answer) & self._there
        self._given: list[int] = self._visual.sum(1).tolist()
        self._text: list[int] = (self._there.sum(1) - self._visual.sum(1)).tolist()
        self._kept: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, Tensor | None]] = {}
        self._held: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._check_options()

    def _check_options(self) -> None:
        count = len(self._layers)
        if len(set(map(id, self._layers))) < count:
            raise UnsupportedError("a layer is in the stack twice, and its calls cannot be told apart")
        if not 0 <= self._select < count:
            raise OptionError(f"select must be one of the layers 0..{count - 1}, got {self._select}")
        if self._steps < 1:
            raise OptionError(f"steps must count the forwards of one answer, got {self._steps}")
        for layer in range(count):
            share_of(self._schedule, 0, self._steps, layer, count)

    def _enter(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of a layer."""
        self._held.pop(number, None)  # of a forward that failed
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        self._check_inputs(hidden, args[1:], kwargs)
        if number == 0:
            self._begin_step()
        if number == self._select and (self.scores is None or not self._persist):
            self._take_scores(layer, hidden, kwargs)
        counts = counts_of(share_of(self._schedule, self.step, self._steps, number, len(self._layers)), self._given)
        if list(counts) == self._given or (self.scores is None and any(counts)):
            self.rows[-1].append(hidden.shape[1])
            return None
        rows, valid = self._keep(counts, hidden.device)
        self._held[number] = hidden, rows, valid
        self.rows[-1].append(rows.shape[1])
        narrow = _narrowed(kwargs, rows, valid, hidden.dtype)
        short = _at(hidden, rows)
        return ((short, *args[1:]), narrow) if args else ((), {**narrow, "hidden_states": short})

    def _leave(self, number: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of a layer."""
        if number not in self._held:
            return None
        hidden, rows, valid = self._held.pop(number)
        new = output[0] if isinstance(output, tuple) else output
        if valid is not None:  # fillers pass by too
            new = torch.where(valid[..., None], new, _at(hidden, rows))
        whole = hidden.scatter(1, rows[..., None].expand(-1, -1, hidden.shape[-1]), new)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    def _take_scores(self, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
        answer, real = self._asked.to(hidden.device), self._there.to(hidden.device)
        self.scores = no_grad(self._score, layer, Look(hidden, answer, real, kwargs))
        self._kept.clear()
        if self.scores.shape != self._visual.shape:
            raise OptionError(
                f"score must be {list(self._visual.shape)}, one for each row, got {list(self.scores.shape)}"
            )

    def _begin_step(self) -> None:
        if self.step + 1 >= self._steps:
            raise StateError(
                f"this is forward {self.step + 2} of a denoiser of {self._steps} steps; begin a new thinned() for each"
                " answer"
            )
        self.step += 1
        self.rows.append([])

    def _keep(self, counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Rows that a layer computes, ``[batch, kept]``, and which of them are no fillers."""
        if (counts, device) not in self._kept:
            visual, real = self._visual.to(device), self._there.to(device)
            scores = torch.zeros(visual.shape, device=device) if self.scores is None else self.scores.to(device)
            keep = ~visual | best(scores, visual, list(counts))
            left = [n + text for n, text in zip(counts, self._text, strict=True)]
            self._kept[counts, device] = compacted(keep, real, left)
        return self._kept[counts, device]

    def _check_inputs(self, hidden: Tensor, others: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if hidden.shape[:2] != self._visual.shape:
            raise InputError(
                f"a layer got {list(hidden.shape[:2])} rows and visual has {list(self._visual.shape)}; give visual (and"
                " real) for all rows that the stack sees, those of classifier-free guidance too"
            )
        if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in _CACHES):
            raise UnsupportedError(
                "the layers use a cache; thinned() is for denoisers that see all rows in every step: call with"
                " use_cache=False"
            )
        if any(value is not None and not isinstance(value, (bool, int, float, str)) for value in others):
            raise UnsupportedError(
                f"the layers get more than hidden_states by position; give {', '.join(_BY_ROW)} by keyword"
            )
        known = ("hidden_states", *_BY_ROW, *_UNREAD)
        if unknown := [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in known]:
            raise UnsupportedError(
                f"the layers get {', '.join(unknown)}, of which nobody knows the rows; known: {', '.join(known)}"
            )
        self._check_positions(hidden, kwargs)

    def _check_positions(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
        tables = kwargs.get("position_embeddings")
        placed = [kwargs.get("position_ids"), *((tables,) if tables is None or isinstance(tables, Tensor) else tables)]
        placed = [values for values in placed if values is not None]
        if any(len(values) not in (1, len(hidden)) or values.shape[1:2] != hidden.shape[1:2] for values in placed):
            raise UnsupportedError(
                "positions must be [batch or 1, rows, ...]; several positions for a row are not known here"
            )
        if not placed and not self._without_positions:
            raise UnsupportedError(
                "the layers get no position_ids or position_embeddings; if positions lie in the residual stream say"
                " without_positions=True"
            )


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """``[batch or 1, rows, ...]`` at ``rows`` ``[batch, kept]``."""
    index = rows.view(*rows.shape, *(1,) * (values.ndim - 2)).expand(*rows.shape, *values.shape[2:])
    return values.expand(len(rows), *values.shape[1:]).gather(1, index)


def _narrowed(kwargs: Mapping[str, Any], rows: Tensor, valid: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """What a layer gets besides the residual stream, for some of the rows."""
    found = dict(kwargs)
    mask = _mask(kwargs.get("attention_mask"), rows, valid, dtype)
    if mask is not None:
        found["attention_mask"] = mask
    if (ids := kwargs.get("position_ids")) is not None:
        found["position_ids"] = _at(ids, rows)
    if (tables := kwargs.get("position_embeddings")) is not None:
        found["position_embeddings"] = (
            _at(tables, rows) if isinstance(tables, Tensor) else tuple(_at(table, rows) for table in tables)
        )
    return found


def _mask(given: Any, rows: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask of some rows, which hides fillers.

    Raises:
        UnsupportedError: a mask that is no tensor of 2 or 4 dimensions.
    """
    if given is None:
        if valid is None:
            return None
        return additive(valid[:, None, None], dtype)  # which every attention takes
    if not isinstance(given, Tensor) or given.ndim not in (2, 4):
        raise UnsupportedError(
            "thinned() knows attention masks of 2 or 4 dimensions; use attn_implementation='sdpa' or 'eager'"
        )
    if given.ndim == 2:
        found = _at(given, rows)
        return found if valid is None else found.masked_fill(~valid, 0)
    wide = given.expand(len(rows), -1, -1, -1)
    if wide.shape[2] > 1:
        wide = _at(wide.transpose(1, 2), rows).transpose(1, 2)
    found = wide.gather(3, rows[:, None, None].expand(*wide.shape[:3], -1))
    return found if valid is None else hide(found, ~valid[:, None, None])
