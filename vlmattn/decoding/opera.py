"""OPERA: beam search with an over-trust penalty and retrospection (arXiv 2311.17911)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmattn.decoding.search import Beams, Hypothesis, Process, Rows, Search
from vlmattn.options import option
from vlmattn.registry import register

FACTOR = 1e-7  # of the column products
LARGEST = 60.0  # logarithm of the penalty, so that sums of scores stay finite
EARLY = 10  # tokens whose penalty is the missing attention to the image, and that are never rolled back to


def shares(attention: Tensor) -> Tensor:
    """Attention ``[rows, keys]`` (a maximum over heads) as shares of 1, float32."""
    attention = attention.float()
    return attention / attention.sum(-1, keepdim=True)


def columns_with(columns: Tensor, share: Tensor, scale: float) -> Tensor:
    """Logarithms of the column products with the row of a new token:  log prod_{i >= j} scale W_ij.

    Args:
        columns: without it, ``[rows, length]``.
        share: its attention to generated tokens, itself included, ``[rows, length + 1]``.
        scale: sigma.
    """
    return pad(columns, (0, 1)) + (scale * share).log()


def over_trust(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Penalty  phi = max_j FACTOR exp(columns_j)  and where the maximum is, of ``columns [..., length]``."""
    largest, location = columns.max(-1)
    return (largest + math.log(FACTOR)).clamp(max=LARGEST).exp(), location


@dataclass(frozen=True)
class Front:
    """The beams and what the model says after them.

    Attributes:
        beams: ``rows`` sequences of ``length`` tokens.
        logits: float32 ``[rows, vocabulary]`` of the next token.
        columns: float32 ``[rows, length]``, see ``columns_with``.
    """

    beams: Beams
    logits: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Moment:
    """What a rollback comes back to: the beams before a token, and the choices (row * vocabulary + token) made then."""

    beams: Beams
    columns: Tensor
    chosen: Tensor


@dataclass
class Memory:
    """What retrospection looks back on. Positions are lengths: ``past[n]`` is the choice of token n (from 0 on).

    Attributes:
        past: the last ``window`` positions.
        locations: of every token, the location of the penalty in each beam ``[num_beams]``, -1 where there was no beam.
        forbidden: choices that are not made again, of the beams in ``past``.
        times: how often each position was rolled back to.
    """

    past: dict[int, Moment] = field(default_factory=dict)
    locations: list[Tensor] = field(default_factory=list)
    forbidden: dict[int, Tensor] = field(default_factory=dict)
    times: Counter[int] = field(default_factory=Counter)

    def target(self, beams: int, threshold: int, limit: int) -> int | None:
        """The position to roll back to, if the ``beams`` of now agree on one location more than ``threshold`` times."""
        seen = torch.stack(self.locations)[:, :beams]
        location = int(seen[-1].mode().values)
        if location < EARLY or not bool(((seen == location).sum(0) > threshold).all()):
            return None
        position = location + 1 if self.times[location + 1] < limit else location
        position = max(position, min(self.past))
        return position if position in self.past and self.times[position] < limit else None

    def remember(self, moment: Moment, window: int) -> None:
        position = moment.beams.length
        self.past[position] = moment
        self.past.pop(position - window, None)

    def back(self, position: int) -> tuple[Moment, Tensor]:
        """Forget what came after ``position``. Its moment, and the choices forbidden there: all made so far."""
        self.times[position] += 1
        self.past = {n: moment for n, moment in self.past.items() if n <= position}
        self.forbidden = {n: choices for n, choices in self.forbidden.items() if n <= position}
        del self.locations[position + 1 :]
        moment = self.past[position]
        earlier = self.forbidden.get(position, moment.chosen[:0])
        self.forbidden[position] = torch.cat([earlier, moment.chosen])
        return moment, self.forbidden[position]


@register(
    "opera",
    paper="arXiv:2311.17911 (CVPR 2024)",
    code="github.com/shikiw/OPERA",
    faithful="golden",
    parts="decoding",
    cost="one forward of num_beams x candidates rows per token, attention weights of the last layer;"
    " a rollback reads the answer again",
    presets={
        "opera": ("defaults of paper and release: 5 beams, 5 candidates, r = 15", {}),
        "opera_fast": ("the release's efficient setting: 1 candidate, r = 25", {"candidates": 1, "threshold": 25}),
    },
)
@dataclass(frozen=True, kw_only=True)
class OPERA(Search):
    """Beam search that distrusts answers in which every token looks back at the same earlier token.

    With W_ij the attention of answer token i to answer token j <= i (last layer, maximum over heads, each row scaled to
    sum 1 over all keys), the ``candidates`` v of a beam (largest logits) are scored in the place of token t, counted
    from 1, by

        log softmax_v(l_v - weight phi_v),     phi_v = max_j 1e-7 prod_{j <= i <= t} scale W_ij     (t > 10)
                                               phi_v = -(attention share of v on image tokens)      (t <= 10)

    Retrospection: the location of a beam is the j of its maximum (mode over candidates), that of the step the mode
    over beams. If it is >= 10 (from 0 on) and was the location of every beam at more than ``threshold`` tokens of the
    answer, the search returns to the choice of the token after it; to the choice of the location itself if it returned
    there ``candidates`` times; not at all if that holds for both. What was chosen there is forbidden, and this one
    choice is made from the whole vocabulary, without penalty. So there are at most ``candidates`` rollbacks per
    position, and the search ends.

    The release (``opera_beam_search`` in generation/utils.py of its transformers 4.29.2) runs every candidate alone and
    the chosen tokens again. Here the candidates of all beams grow together, and the rows that the beam update chooses
    go on with the logits they have: one ``grow`` per token; a rollback costs one ``rewind`` and one ``grow`` more.
    Column products are kept as logarithms in float32, ``[rows, length]``: nothing underflows, and no matrix is kept.

    Other than in the release:

    * Beams, eos and the end of the search follow today's ``generate`` with length penalty 1 and
      ``early_stopping=False`` (``search.Beams``). The release divides scores by the length of its ids, text of the
      prompt included, eos not.
    * What is no candidate cannot be chosen; there it has the logit -999. So beams may be fewer: with one candidate
      there is one, greedy, up to the first rollback, where the release has others that begin with arbitrary tokens.
    * Penalties are float32 and end at exp(60). There they are half precision (steps of 6e-8 below 6e-5, infinite from
      65520 on), and candidates with more than about 999 lose to arbitrary tokens.
    * ``process`` works on the log-probabilities of the candidates, as there; but tokens that it forbids (-inf) are no
      candidates from the start. So it is called twice per token.
    * Forbidden means -inf, there the row's lowest logit. A rollback forgets what later positions forbid (there: of one
      position only) and hypotheses that ended after it (there: at the first return only).
    * ``window`` is how many tokens a rollback may go back, and no more. The release, too, multiplies columns over the
      whole answer; its window also ends rollbacks to positions from 512 on.

    Normalised over the candidates alone, as in the release, a beam pays little for an unlikely token, and a penalty
    that all its candidates share cancels. ``softmax="vocabulary"`` normalises over all tokens; with weight 0, a
    threshold out of reach and at least max(2, 1 + number of eos) ``num_beams`` candidates this is ordinary beam search.

    Raises:
        OptionError: an option out of range.
    """

    num_beams: int = option(5, 1, 64, "rows that grow", source="release: README and evaluation")
    scale: float = option(50.0, 1e-3, 1e6, "sigma, of attention in column products", source="paper and release")
    threshold: int = option(
        15, 1, 10**6, "r: more tokens with one location start a rollback", source="paper and release"
    )
    candidates: int = option(5, 1, 256, "tokens of a beam that are tried; rollbacks per position", source="release")
    weight: float = option(1.0, 0, 100, "of the penalty", source="paper and release")
    window: int = option(512, 1, 10**6, "tokens that a rollback may go back", source="release: window_size")
    softmax: str = option(
        "candidates",
        about="tokens that scores are normalised over",
        source="release",
        choices=("candidates", "vocabulary"),
    )

    def search(self, rows: Rows, eos: frozenset[int], max_new_tokens: int, process: Process) -> Hypothesis:
        logits = rows.start()[0].float()
        front = Front(Beams.start(self.num_beams, logits.device), logits, logits.new_zeros(1, 0))
        memory = Memory()
        while front.beams.length < max_new_tokens and not front.beams.done:
            tokens = self._candidates(front, process)
            parents = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1])
            grown, columns, seen = self._grow(rows, front.columns, parents, tokens.flatten())
            penalty, location = over_trust(columns)
            penalty = -seen if columns.shape[1] <= EARLY else penalty
            places = location.view_as(tokens).mode().values
            memory.locations.append(pad(places, (0, self.num_beams - len(places)), value=-1))
            position = memory.target(len(tokens), self.threshold, self.candidates)
            if position is not None:
                front = self._again(rows, memory, position, eos, process)
                continue
            scores = self._scores(front, tokens, penalty.view_as(tokens), process)
            last = front.beams.length + 1 == max_new_tokens
            beams, chosen = front.beams.longer(scores, tokens, eos, last)
            self._remember(memory, front, beams, parents[chosen])
            if not beams.done:
                rows.keep(chosen)
            front = Front(beams, grown[chosen], columns[chosen])
        return front.beams.best

    def _candidates(self, front: Front, process: Process) -> Tensor:
        """Most likely allowed tokens ``[rows, candidates]``."""
        allowed = process(front.beams.tokens, front.logits.log_softmax(-1)) > -torch.inf
        logits = front.logits.masked_fill(~allowed, -torch.inf)
        return logits.topk(min(self.candidates, logits.shape[-1])).indices

    def _grow(self, rows: Rows, columns: Tensor, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows with new tokens: logits, columns ``[rows, length + 1]``, attention share of the image ``[rows]``."""
        logits, attention = rows.grow(parents, tokens)
        share = shares(attention)
        image = share[:, : rows.prompt_length][:, rows.visual].sum(-1)
        return logits.float(), columns_with(columns[parents], share[:, rows.prompt_length :], self.scale), image

    def _scores(self, front: Front, tokens: Tensor, penalty: Tensor, process: Process) -> Tensor:
        """Log-probabilities of the candidates, both ``[rows, candidates]``."""
        others = torch.ones_like(front.logits, dtype=torch.bool).scatter(-1, tokens, False)
        logits = front.logits
        if self.softmax == "candidates":  # what all share changes nothing, but would cost digits
            penalty, logits = penalty - penalty.amin(-1, keepdim=True), logits.masked_fill(others, -torch.inf)
        logits = logits.scatter_add(-1, tokens, -self.weight * penalty)
        scores = logits.log_softmax(-1).masked_fill(others, -torch.inf)
        return process(front.beams.tokens, scores).gather(-1, tokens)

    def _again(self, rows: Rows, memory: Memory, position: int, eos: frozenset[int], process: Process) -> Front:
        """Roll back to ``position`` and choose its token anew."""
        moment, forbidden = memory.back(position)
        logits = rows.rewind(moment.beams.tokens).float()
        free = logits.flatten().index_fill(0, forbidden, -torch.inf).view_as(logits)
        scores = free.log_softmax(-1).masked_fill(free == -torch.inf, -torch.inf)  # a row may have nothing left
        scores = process(moment.beams.tokens, scores)
        vocabulary = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        beams, chosen = moment.beams.longer(scores, vocabulary, eos, last=False)
        front = Front(moment.beams, logits, moment.columns)
        parents = chosen // logits.shape[-1]
        self._remember(memory, front, beams, parents)
        if beams.done:
            return replace(front, beams=beams)
        logits, columns, _ = self._grow(rows, moment.columns, parents, beams.tokens[:, -1])
        return Front(beams, logits, columns)

    def _remember(self, memory: Memory, front: Front, beams: Beams, parents: Tensor) -> None:
        """Note that ``beams`` came out of the rows ``parents`` of ``front``."""
        chosen = parents * front.logits.shape[-1] + beams.tokens[:, -1]
        memory.remember(Moment(front.beams, front.columns, chosen), self.window)
