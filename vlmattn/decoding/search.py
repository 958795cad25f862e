"""Search methods: the method itself chooses the tokens, over one prompt that grows along several rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vlmattn.options import Options
from vlmattn.request import LayerContext, Request, Weights

#: Logits processors of the caller: (generated ids ``[rows, length]``, scores ``[rows, vocabulary]``) -> scores.
Process = Callable[[Tensor, Tensor], Tensor]


class Rows(Protocol):
    """One prompt that grows along several rows, all of one length."""

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt, without padding."""
        ...

    @property
    def visual(self) -> Tensor:
        """bool ``[prompt_length]``: image tokens of the prompt."""
        ...

    def start(self) -> tuple[Tensor, Tensor]:
        """Read the prompt. Logits ``[1, vocabulary]`` after it and attention ``[1, keys]`` of its last token.

        Attention is always that of the last layer, maximum over heads.
        """
        ...

    def grow(self, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Row i becomes row ``parents[i]`` with ``tokens[i]`` after it, for as many rows as given.

        Logits ``[rows, vocabulary]`` and attention ``[rows, keys]`` of the new tokens; keys are those of the prompt and
        of all generated tokens, the own one included.
        """
        ...

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on, in this order (may repeat)."""
        ...

    def rewind(self, generated: Tensor) -> Tensor:
        """Start over from the prompt with ``generated [rows, length]`` after it. Logits ``[rows, vocabulary]``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Search(Options):
    """Base of methods that choose the tokens themselves. Instances are immutable."""

    def search(self, rows: Rows, eos: frozenset[int], max_new_tokens: int, process: Process) -> Hypothesis:
        """The best hypothesis: no prompt, with its eos if it ended by one.

        Args:
            rows: the prompt in a model.
            eos: tokens that end a row.
            max_new_tokens: no result is longer.
            process: logits processors of the caller.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LastLook:
    """Notes how much the newest token attends to each key in the last layer, maximum over heads."""

    follows_attention = True

    def on_attention(self, context: LayerContext, weights: Weights) -> None:
        context.request.store(LastLook).rows["gaze"] = weights(context.queries - 1, context.queries)[:, :, 0].amax(1)

    @staticmethod
    def read(request: Request) -> Tensor:
        """float32 ``[row, key]``."""
        seen: Tensor = request.store(LastLook).rows["gaze"]
        return seen


@dataclass(frozen=True, eq=False)
class Trail:
    """Choices that a row came from, token by token: ``tokens`` and log-probabilities ``scores``, ``[choices]``."""

    before: Trail | None
    scores: Tensor
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A row that ended, with its log-probability per generated token (length penalty 1, eos counted).

    Attributes:
        tokens: int64 ``[generated tokens]``.
        trail: what each of them was chosen from; their log-probabilities there sum up to ``score`` times their number.
    """

    score: float
    tokens: Tensor
    trail: Trail | None = None

    def scores(self, vocabulary: int) -> Tensor:
        """Log-probabilities ``[generated tokens, vocabulary]``, float32, -inf where a token could not be chosen."""
        found, at = self.tokens.new_full((len(self.tokens), vocabulary), -torch.inf, dtype=torch.float32), self.trail
        for row in range(len(found) - 1, -1, -1):
            assert at is not None
            found[row, at.tokens] = at.scores.float()
            at = at.before
        return found


@dataclass(frozen=True)
class Beams:
    """Rows of a beam search that still grow, best first, and the ones that ended.

    The rules are those of ``generate(num_beams=width)`` with its defaults (``_beam_search`` of transformers 5), but for
    one: there are fewer rows than ``width`` where there were fewer choices.

    Attributes:
        width: rows that may grow, and hypotheses that are kept.
        tokens: int64 ``[rows, length]``, generated so far.
        scores: float32 ``[rows]``, sums of log-probabilities.
        ended: the best hypotheses, best first.
        trails: of each row; () before the first token.
    """

    width: int
    tokens: Tensor
    scores: Tensor
    ended: tuple[Hypothesis, ...] = ()
    trails: tuple[Trail, ...] = ()

    @classmethod
    def start(cls, width: int, device: torch.device) -> Beams:
        """One row without tokens."""
        return cls(width, torch.empty(1, 0, dtype=torch.int64, device=device), torch.zeros(1, device=device))

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def done(self) -> bool:
        """No row grows, or ``width`` ended and none is worse than the best row is now (``early_stopping=False``)."""
        if not len(self.tokens):
            return True
        full = len(self.ended) == self.width
        return full and self.ended[-1].score >= float(self.scores[0] / max(self.length, 1))

    @property
    def best(self) -> Hypothesis:
        """The best hypothesis, or the best row while none ended."""
        return self.ended[0] if self.ended else self._hypothesis(0)

    def longer(self, scores: Tensor, tokens: Tensor, eos: frozenset[int], last: bool) -> tuple[Beams, Tensor]:
        """One token more: log-probabilities ``scores`` of the choices ``tokens``, both ``[rows, choices]``.

        The max(2, 1 + number of eos) width best choices are looked at. Those that end (by eos, or all of them if this
        is the ``last`` token) become hypotheses if they are among the ``width`` best; the ``width`` best others grow.
        Where no choice is possible (all -inf), the rows end as they are.

        Returns:
            The beams, and which choice (row * choices + choice) each of their rows is.
        """
        total = (self.scores[:, None] + scores).flatten()
        values, order = total.topk(min(max(2, 1 + len(eos)) * self.width, len(total)))
        possible = values > -torch.inf
        values, order = values[possible], order[possible]
        parents = order // tokens.shape[1]
        trails = [
            Trail(self.trails[row] if self.trails else None, scores[row], tokens[row]) for row in parents.tolist()
        ]
        grown = Beams(
            self.width,
            torch.cat([self.tokens[parents], tokens.flatten()[order, None]], 1),
            values,
            self.ended,
            tuple(trails),
        )
        last_tokens = grown.tokens[:, -1]
        ends = torch.isin(last_tokens, torch.tensor(sorted(eos), dtype=last_tokens.dtype, device=order.device)) | last
        if len(order):
            ended = grown._with(ends[: self.width].nonzero().flatten().tolist())
        else:
            ended = self._with(range(len(self.tokens)))
        go = (~ends).nonzero().flatten()[: self.width]
        kept = tuple(trails[row] for row in go.tolist())
        return Beams(self.width, grown.tokens[go], values[go], ended, kept), order[go]

    def _hypothesis(self, row: int) -> Hypothesis:
        trail = self.trails[row] if self.trails else None
        return Hypothesis(float(self.scores[row] / max(self.length, 1)), self.tokens[row], trail)

    def _with(self, rows: Iterable[int]) -> tuple[Hypothesis, ...]:
        """The best hypotheses, once these rows have ended."""
        found = [*self.ended, *map(self._hypothesis, rows)]
        return tuple(sorted(found, key=lambda one: -one.score)[: self.width])
