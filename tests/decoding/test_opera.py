"""OPERA over scripted models, beside the same algorithm in plain loops, and beside the beam search of transformers."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vlmattn import OptionError
from vlmattn.decoding.opera import OPERA, columns_with, over_trust, shares
from vlmattn.decoding.search import Beams
from vlmattn.registry import all_presets, make_method

PROMPT = 6
VISUAL = torch.tensor([False, True, True, True, False, False])
OUT_OF_REACH = 10**6
NO_EOS: frozenset[int] = frozenset()


def unchanged(ids: Tensor, scores: Tensor) -> Tensor:
    return scores


class Table:
    """A model of a few tokens: logits and attention of a sequence are random, but always the same for it.

    Args:
        seed: another model.
        vocabulary: its tokens.
        sharp: scale of its logits.
        summary: position of the answer that later tokens attend to with ``pull``.
        swap: the summary moves on by one for odd tokens (an adversary that never agrees with itself).
    """

    def __init__(
        self,
        seed: int,
        vocabulary: int = 9,
        sharp: float = 2.0,
        summary: int | None = None,
        pull: float = 8.0,
        swap=False,
    ) -> None:
        self.seed, self.vocabulary, self.sharp = seed, vocabulary, sharp
        self.summary, self.pull, self.swap = summary, pull, swap

    def _draw(self, tokens: tuple[int, ...], what: int, count: int) -> Tensor:
        key = hash((self.seed, what, *tokens)) % 2**63
        return torch.randn(count, generator=torch.Generator().manual_seed(key))

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        return self._draw(tokens, 0, self.vocabulary) * self.sharp

    def attention(self, tokens: tuple[int, ...]) -> Tensor:
        """Of the last token; a maximum over heads, so it sums to more than 1."""
        row = self._draw(tokens, 1, PROMPT + len(tokens)).exp()
        if self.summary is not None:
            at = self.summary + (tokens[-1] % 2 if self.swap else 0)
            if len(tokens) > at:
                row[PROMPT + at] += self.pull * row.sum()
        return 1.7 * row / row.sum()


@dataclass
class Scripted:
    """``Rows`` over a table, with a record of what was asked."""

    table: Table
    prompt_length: int = PROMPT
    visual: Tensor = field(default_factory=lambda: VISUAL)
    rows: list[tuple[int, ...]] = field(default_factory=list)
    grown: list[list[tuple[int, ...]]] = field(default_factory=list)
    rewound: list[int] = field(default_factory=list)

    def _logits(self) -> Tensor:
        return torch.stack([self.table.logits(row) for row in self.rows])

    def start(self) -> tuple[Tensor, Tensor]:
        assert not self.rows, "the prompt is read once"
        self.rows = [()]
        return self._logits(), torch.full((1, PROMPT), 1 / PROMPT)

    def grow(self, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.rows = [(*self.rows[p], t) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
        self.grown.append(self.rows)
        return self._logits(), torch.stack([self.table.attention(row) for row in self.rows])

    def keep(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]

    def rewind(self, generated: Tensor) -> Tensor:
        self.rows = [tuple(row) for row in generated.tolist()]
        self.rewound.append(generated.shape[1])
        return self._logits()


def run(
    method: OPERA, table: Table, new: int, eos: frozenset[int] = NO_EOS, process=unchanged
) -> tuple[list, Scripted]:
    rows = Scripted(table)
    return method.search(rows, eos, new, process).tokens.tolist(), rows


# --- The penalty


def phi_by_loops(history: list[list[float]], scale: float) -> tuple[float, int]:
    """Penalty and location from full attention rows of the answer (prompt and answer keys), as the equation has it."""
    length = len(history)
    scores = []
    for j in range(length):
        product = 1.0
        for i in range(j, length):
            product *= scale * history[i][PROMPT + j] / sum(history[i])
        scores.append(1e-7 * product)
    return min(max(scores), math.exp(60)), scores.index(max(scores))


@settings(max_examples=80)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([1.0, 20.0, 50.0, 400.0]))
def test_the_penalty_is_the_largest_column_product(seed, length, scale):
    table = Table(seed, summary=seed % 7, pull=0.5)
    tokens = tuple(range(length))
    history = [table.attention(tokens[: i + 1]) for i in range(length)]
    columns = torch.zeros(1, 0)
    for row in history:
        columns = columns_with(columns, shares(row[None])[:, PROMPT:], scale)
    assert columns.shape == (1, length)
    penalty, location = over_trust(columns)
    expected, at = phi_by_loops([row.double().tolist() for row in history], scale)
    assert int(location) == at
    assert float(penalty) == pytest.approx(expected, rel=1e-3, abs=1e-30)


def test_columns_that_are_never_looked_at_weigh_nothing_and_long_ones_do_not_overflow():
    share = torch.tensor([[0.0, 0.9]])
    penalty, location = over_trust(columns_with(torch.zeros(1, 1), share, 50.0))
    assert (float(penalty), int(location)) == (pytest.approx(45e-7), 1)
    columns = torch.zeros(1, 0)
    for length in range(1, 200):
        row = torch.zeros(1, length)
        row[0, 0] = 1.0
        columns = columns_with(columns, row, 50.0)
    assert (float(over_trust(columns)[0]), int(over_trust(columns)[1])) == (pytest.approx(math.exp(60)), 0)
    nothing = over_trust(torch.full((1, 3), -torch.inf))
    assert (float(nothing[0]), int(nothing[1])) == (0, 0)


class Looking(Table):
    """Token 1 is likelier; token 2 sees the image, and up to ``until`` tokens that is all that differs."""

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        return torch.tensor([-9.0, 0.3, 0.0])

    def attention(self, tokens: tuple[int, ...]) -> Tensor:
        row = torch.ones(PROMPT + len(tokens))
        row[:PROMPT][VISUAL] = 100.0 if tokens[-1] == 2 else 1e-6
        return row


def test_the_first_ten_tokens_are_rewarded_for_seeing_the_image_and_later_ones_are_not():
    method = OPERA(num_beams=1, candidates=2, threshold=OUT_OF_REACH)
    assert run(method, Looking(0), 14)[0] == [2] * 10 + [1] * 4
    assert run(OPERA(num_beams=1, candidates=2, threshold=OUT_OF_REACH, weight=0), Looking(0), 14)[0] == [1] * 14
    assert run(OPERA(num_beams=1, candidates=1, threshold=OUT_OF_REACH), Looking(0), 14)[0] == [1] * 14


class Trusting(Table):
    """Token 1 is likelier; after token 11 it looks at token 3 of the answer alone, token 2 looks at everything."""

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        return torch.tensor([-9.0, 0.3, 0.0])

    def attention(self, tokens: tuple[int, ...]) -> Tensor:
        row = torch.ones(PROMPT + len(tokens))
        if len(tokens) > 3:
            row[PROMPT + 3] = 30.0 if tokens[-1] == 1 else 15.0
        return row


def test_a_token_that_trusts_one_earlier_token_is_passed_over():
    plain = OPERA(num_beams=1, candidates=2, threshold=OUT_OF_REACH, weight=0)
    wary = OPERA(num_beams=1, candidates=2, threshold=OUT_OF_REACH)
    assert run(plain, Trusting(0), 16)[0] == [1] * 16
    assert run(wary, Trusting(0), 16)[0] == [1] * 10 + [2] * 6


class Alike(Table):
    """Every token looks at token 2 of the answer, so penalties are huge and the same for all."""

    def attention(self, tokens: tuple[int, ...]) -> Tensor:
        row = torch.full((PROMPT + len(tokens),), 1e-3)
        row[PROMPT + min(2, len(tokens) - 1)] = 1.0
        return row


def test_a_penalty_that_all_candidates_share_costs_no_digit():
    for seed in range(5):
        wary, plain = (OPERA(num_beams=3, candidates=4, threshold=OUT_OF_REACH, weight=weight) for weight in (1, 0))
        assert run(wary, Alike(seed), 30)[0] == run(plain, Alike(seed), 30)[0]


# --- The whole search in plain loops: full attention matrices, every candidate on its own, every state copied


def softmax_log(values: list[float]) -> list[float]:
    top = max(values)
    if top == -math.inf:
        return values
    total = math.log(sum(math.exp(value - top) for value in values)) + top
    return [value - total for value in values]


def most_common(values: list[int]) -> int:
    counts = Counter(values)
    return min(value for value, count in counts.items() if count == max(counts.values()))


class Plain:
    """The search, written for one sequence at a time."""

    def __init__(self, method: OPERA, table: Table, eos: frozenset[int], new: int) -> None:
        self.method, self.table, self.eos, self.new = method, table, eos, new
        self.rewound: list[int] = []

    def candidates(self, tokens: tuple[int, ...]) -> list[int]:
        logits = self.table.logits(tokens).tolist()
        return sorted(range(len(logits)), key=lambda v: -logits[v])[: self.method.candidates]

    def phi(self, tokens: tuple[int, ...]) -> tuple[float, int]:
        history = [self.table.attention(tokens[: i + 1]).double().tolist() for i in range(len(tokens))]
        penalty, location = phi_by_loops(history, self.method.scale)
        if len(tokens) <= 10:
            seen = [a for a, image in zip(history[-1], VISUAL.tolist(), strict=False) if image]
            penalty = -sum(seen) / sum(history[-1])
        return penalty, location

    def choices(self, beams: list) -> list:
        """Scored continuations of all beams, by candidates with penalties."""
        found = []
        for row, (score, tokens) in enumerate(beams):
            logits, candidates = self.table.logits(tokens).tolist(), self.candidates(tokens)
            values = [-math.inf if self.method.softmax == "candidates" else value for value in logits]
            for v in candidates:
                values[v] = logits[v] - self.method.weight * self.phi((*tokens, v))[0]
            logp = softmax_log(values)
            found += [(score + logp[v], row, v) for v in candidates]
        return found

    def freely(self, beams: list, forbidden: list) -> list:
        found = []
        for row, (score, tokens) in enumerate(beams):
            logits = self.table.logits(tokens).tolist()
            logp = softmax_log([-math.inf if (row, v) in forbidden else value for v, value in enumerate(logits)])
            found += [(score + value, row, v) for v, value in enumerate(logp)]
        return found

    def update(self, beams: list, ended: list, found: list) -> tuple[list, list, list]:
        width, last = self.method.num_beams, len(beams[0][1]) + 1 == self.new
        found = sorted((one for one in found if one[0] > -math.inf), key=lambda one: -one[0])
        found = found[: max(2, 1 + len(self.eos)) * width]
        live, chosen, ended = [], [], list(ended)
        for rank, (score, row, v) in enumerate(found):
            tokens = (*beams[row][1], v)
            if v in self.eos or last:
                ended += [(score / len(tokens), tokens)] if rank < width else []
            elif len(live) < width:
                live.append((score, tokens))
                chosen.append((row, v))
        return live, sorted(ended, key=lambda one: -one[0])[:width], chosen

    def target(self, locations: list[list[int]], times: Counter, past: dict) -> int | None:
        now = locations[-1]
        location = most_common(now)
        counts = [sum(1 for step in locations if row < len(step) and step[row] == location) for row in range(len(now))]
        if location < 10 or min(counts) <= self.method.threshold:
            return None
        position = location + 1
        if times[position] >= self.method.candidates:
            position = location
        position = max(position, len(locations) - 1 - self.method.window)
        return position if position in past and times[position] < self.method.candidates else None

    def search(self) -> list[int]:
        beams, ended = [(0.0, ())], []
        past: dict = {}
        forbidden: dict = {}
        locations: list = []
        times: Counter = Counter()
        while beams:
            width, length = self.method.num_beams, len(beams[0][1])
            if length == self.new or (len(ended) == width and ended[-1][0] >= beams[0][0] / length):
                break
            locations.append([most_common([self.phi((*t, v))[1] for v in self.candidates(t)]) for _, t in beams])
            position = self.target(locations, times, past)
            if position is None:
                past[length] = (beams, ended)
                found = self.choices(beams)
            else:
                times[position] += 1
                self.rewound.append(position)
                beams, ended, chosen = past[position]
                forbidden = {n: pairs for n, pairs in forbidden.items() if n <= position}
                forbidden[position] = forbidden.get(position, []) + chosen
                past = {n: moment for n, moment in past.items() if n < position} | {position: (beams, ended)}
                locations = locations[: position + 1]
                found, length = self.freely(beams, forbidden[position]), position
            beams, ended, chosen = self.update(beams, ended, found)
            past[length] = (*past[length], chosen)
        return list(ended[0][1])


PLAIN = {
    "defaults": dict(threshold=4),
    "vocabulary": dict(threshold=4, softmax="vocabulary"),
    "three beams": dict(num_beams=3, candidates=4, threshold=3),
    "one candidate": dict(num_beams=3, candidates=1, threshold=3),
    "one beam": dict(num_beams=1, candidates=3, threshold=3, weight=0.3),
    "short window": dict(num_beams=3, candidates=3, threshold=5, window=4),
    "no retrospection": dict(num_beams=3, candidates=3, threshold=OUT_OF_REACH, scale=9.0),
    "two ends": dict(num_beams=2, candidates=6, threshold=3),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PLAIN)
def test_the_search_equals_the_same_search_in_plain_loops(name, seed):
    method, table = OPERA(**PLAIN[name]), Table(seed, summary=10 + seed % 2, pull=0.4 + seed, swap=seed == 3)
    eos = frozenset({0, 1}) if name == "two ends" else NO_EOS
    plain = Plain(method, table, eos, 20)
    tokens, rows = run(method, table, 20, eos)
    assert tokens == plain.search()
    assert rows.rewound == plain.rewound


def test_the_cases_of_the_plain_search_do_roll_back():
    count = sum(len(run(OPERA(threshold=4), Table(seed, summary=10, pull=2.0), 20)[1].rewound) for seed in range(4))
    assert count > 4


# --- Retrospection


def test_what_was_chosen_at_the_position_is_not_chosen_again():
    """One beam, so choices are seen: attention sticks to token 12, and the search comes back for token 13."""
    method = OPERA(num_beams=1, candidates=3, threshold=5, weight=0)
    tokens, rows = run(method, Table(1, summary=12), 30)
    assert rows.rewound == [13, 13, 13, 12, 12, 12]
    after = [
        index for index, grown in enumerate(rows.grown) if index and len(grown[0]) <= len(rows.grown[index - 1][0])
    ]
    assert len(after) == 6, "every rollback grows the choice that was made anew"
    for position in (13, 12):
        chosen = [rows.grown[index][0] for index in after if len(rows.grown[index][0]) == position + 1]
        assert len({row[:position] for row in chosen}) == 1
        assert len({row[position] for row in chosen}) == 3, "three times back, three other tokens"
        first = rows.table.logits(chosen[0][:position]).argmax()
        assert int(first) not in {row[position] for row in chosen}, "and not what stood there first"
    assert len(tokens) == 30


class Moody(Table):
    """The summary is another one of tokens 10 to 15 after every other choice there, so the search comes and goes."""

    def attention(self, tokens: tuple[int, ...]) -> Tensor:
        row = torch.full((PROMPT + len(tokens),), 1e-4)
        at = int(self._draw(tokens[10:16], 2, 6).argmax()) + 10 if len(tokens) >= 16 else len(tokens) - 1
        row[PROMPT + at] = 1.0
        return row


def test_what_later_positions_forbid_is_forgotten_with_their_beams():
    """The plain search agrees where an earlier rollback lies between two to the same position."""
    between = 0
    for seed in range(12):
        beams, threshold = 1 + seed % 2, 1 + seed // 2 % 2
        method, table = OPERA(num_beams=beams, candidates=3, threshold=threshold, weight=0), Moody(seed, vocabulary=7)
        plain = Plain(method, table, NO_EOS, 20)
        tokens, rows = run(method, table, 20)
        assert (tokens, rows.rewound) == (plain.search(), plain.rewound)
        for first, position in enumerate(rows.rewound):
            later = rows.rewound[first + 1 :]
            between += position in later and min(later[: later.index(position) + 1]) < position
    assert between > 5


class Divided(Table):
    """The likeliest token looks at itself; the others, which are never chosen, would look at token 12."""

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        return torch.tensor([3.0, 2.0, 1.0])

    def attention(self, tokens: tuple[int, ...]) -> Tensor:
        row = torch.full((PROMPT + len(tokens),), 1e-3)
        row[-1] = 1.0
        if len(tokens) > 13:
            row[PROMPT + 12] = 0.015 if tokens[-1] == 0 else 40.0
        return row


def test_the_location_of_a_beam_is_the_one_of_most_candidates():
    rewound = [run(OPERA(num_beams=1, candidates=n, threshold=4, weight=0), Divided(0), 24)[1].rewound for n in (1, 3)]
    assert rewound[0] == []
    assert rewound[1][0] == 13


@pytest.mark.parametrize("forbidden", range(1, 9))
def test_processors_hold_for_the_choice_that_is_made_anew(forbidden):
    def without(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(-1, torch.tensor([forbidden]), -torch.inf)

    _, rows = run(OPERA(num_beams=2, candidates=3, threshold=5), Table(1, summary=12), 24, NO_EOS, without)
    assert rows.rewound
    assert all(row[-1] != forbidden for grown in rows.grown for row in grown)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("candidates", [1, 2, 5])
@pytest.mark.parametrize("threshold", [1, 2, 15])
def test_no_position_is_returned_to_more_often_than_candidates(threshold, candidates, swap):
    method = OPERA(num_beams=3, candidates=candidates, threshold=threshold)
    tokens, rows = run(method, Table(7, summary=11, swap=swap), 32)
    assert len(tokens) == 32
    assert max(Counter(rows.rewound).values(), default=0) <= candidates
    assert swap or rows.rewound, "with one summary token the search does go back"
    assert min(rows.rewound, default=10) >= 10


class Chasing(Table):
    """An adversary: whatever the search does, attention sticks to the token a few back, a new one every few tokens."""

    def attention(self, tokens: tuple[int, ...]) -> Tensor:
        row = torch.full((PROMPT + len(tokens),), 1e-6)
        row[PROMPT + max(0, (len(tokens) - 1) // 4 * 4 - 1)] = 1.0
        return row


def test_the_search_ends_under_attention_that_asks_for_rollbacks_all_the_time():
    tokens, rows = run(OPERA(num_beams=2, candidates=2, threshold=1), Chasing(0), 40)
    assert len(tokens) == 40
    assert len(set(rows.rewound)) > 5
    assert max(Counter(rows.rewound).values()) <= 2
    steps = len(rows.grown) - 2 * len(rows.rewound)
    assert steps <= 40 * (len(rows.rewound) + 1)


def test_a_rollback_goes_no_further_than_the_window():
    table = Table(1, summary=12)
    far = run(OPERA(num_beams=1, candidates=1, threshold=9), table, 30)[1]
    near = run(OPERA(num_beams=1, candidates=1, threshold=9, window=4), table, 30)[1]
    assert far.rewound[0] == 13
    assert near.rewound[0] == len(max((g[0] for g in near.grown[: near.rewound[0] + 5]), key=len)) - 1 - 4 > 13


class Late(Table):
    """Token 1 is the likeliest, and after 15 times token 1 the eos (0), which is impossible elsewhere."""

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        return torch.tensor([30.0 if tokens == (1,) * 15 else -30.0, 5.0, 4.0, 3.0])


def test_what_ended_after_the_position_is_forgotten():
    """The best hypothesis was found after the position, and cannot be found again: its token there is forbidden."""
    method = dict(num_beams=2, candidates=2, weight=0)
    table = Late(0, summary=12)
    without = run(OPERA(threshold=OUT_OF_REACH, **method), table, 24, frozenset({0}))[0]
    assert without == [1] * 15 + [0]
    tokens, rows = run(OPERA(threshold=6, **method), table, 24, frozenset({0}))
    assert any(row[-1] == 0 for row in rows.grown[15]), "it was among the choices"
    assert rows.rewound
    assert len(tokens) == 24
    assert 0 not in tokens


# --- Cost, ends, processors


@pytest.mark.parametrize("beams", [1, 4])
def test_one_forward_per_token_without_rollback(beams):
    method = OPERA(num_beams=beams, candidates=3, threshold=OUT_OF_REACH)
    tokens, rows = run(method, Table(2), 17)
    assert len(tokens) == len(rows.grown) == 17
    assert not rows.rewound
    assert [len(grown) for grown in rows.grown][-1] == 3 * beams


def test_a_rollback_costs_one_rewind_and_one_forward():
    """The last step before it is thrown away; the token chosen anew grows alone, and then all goes on from there."""
    rows = run(OPERA(num_beams=1, candidates=2, threshold=9, weight=0), Table(1, summary=12), 26)[1]
    lengths = [len(grown[0]) for grown in rows.grown]
    back = [after for before, after in pairwise(lengths) if after != before + 1]
    assert rows.rewound == [13, 13, 12, 12]
    assert back == [14, 14, 13, 13]
    assert [len(grown[0]) for grown in rows.grown if len(grown) == 1] == back


@pytest.mark.parametrize("new", [0, 1, 2, 11])
def test_the_result_is_no_longer_than_max_new_tokens(new):
    assert len(run(OPERA(), Table(3), new)[0]) == new


class Ending(Table):
    """Token 0 (the eos) is by far the likeliest after three tokens, and later on."""

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        logits = self._draw(tokens, 0, 5)
        logits[0] = 20.0 if len(tokens) >= 3 else -20.0
        return logits


def test_the_result_ends_with_the_first_eos():
    tokens, rows = run(OPERA(num_beams=2, candidates=4), Ending(0), 30, frozenset({0}))
    assert tokens[-1] == 0
    assert 0 not in tokens[:-1]
    assert len(tokens) == 4
    assert len(rows.grown) < 30, "and the search stops before the limit"
    alone, _ = run(OPERA(num_beams=1, candidates=1), Ending(0), 30, frozenset({0}))
    assert alone[-1] == 0


def test_processors_see_generated_tokens_and_what_they_forbid_is_no_candidate():
    lengths = []

    def at_least_six(ids: Tensor, scores: Tensor) -> Tensor:
        lengths.append(ids.shape[1])
        assert ids.dtype == torch.int64
        assert len(ids) == len(scores)
        if ids.shape[1] < 6:
            scores[:, 0] = -torch.inf
        return scores

    tokens, _ = run(OPERA(num_beams=2, candidates=1), Ending(0), 30, frozenset({0}), at_least_six)
    assert len(tokens) == 7, "six, and the eos that had been the only candidate from the fourth token on"
    assert sorted(set(lengths)) == list(range(7))


def test_where_every_token_is_forbidden_the_answer_ends():
    def nothing_after_two(ids: Tensor, scores: Tensor) -> Tensor:
        return scores if ids.shape[1] < 2 else torch.full_like(scores, -torch.inf)

    tokens, _ = run(OPERA(), Table(0), 9, NO_EOS, nothing_after_two)
    assert len(tokens) == 2


def update(scores: list[list[float]], eos: set[int], last: bool = False, width: int = 2) -> tuple[Beams, list[int]]:
    """Two rows of one token (scores 0 and -1), one token longer."""
    beams = Beams(width, torch.tensor([[7], [8]]), torch.tensor([0.0, -1.0]))
    tokens = torch.arange(len(scores[0])).expand(2, -1)
    longer, chosen = beams.longer(torch.tensor(scores), tokens, frozenset(eos), last)
    return longer, chosen.tolist()


def test_choices_that_end_never_starve_the_beams():
    longer, chosen = update([[-0.1, -0.2, -5.0], [-0.1, -0.2, -6.0]], {0, 1})
    assert chosen == [2, 5]
    assert longer.tokens.tolist() == [[7, 2], [8, 2]]
    assert longer.scores.tolist() == pytest.approx([-5.0, -7.0])
    assert [one.tokens.tolist() for one in longer.ended] == [[7, 0], [7, 1]]
    assert [one.score for one in longer.ended] == pytest.approx([-0.05, -0.1])


def test_only_the_best_choices_become_hypotheses():
    longer, chosen = update([[-0.3, -0.1, -0.2], [-9.0, -9.0, -9.0]], {0})
    assert chosen == [1, 2]
    assert not longer.ended
    longer, chosen = update([[-0.3, -0.1, -0.2], [-9.0, -9.0, -9.0]], {0}, last=True)
    assert not chosen
    assert [one.tokens.tolist() for one in longer.ended] == [[7, 1], [7, 2]]
    assert longer.done
    assert longer.best.tokens.tolist() == [7, 1]


# --- Without penalty it is beam search


def beams_by_force(table: Table, width: int, new: int, eos: frozenset[int]) -> list[int]:
    """Beam search over a table, with nothing but sorted lists."""
    live, ended = [(0.0, ())], []
    for length in range(1, new + 1):
        grown = []
        for score, tokens in live:
            logp = table.logits(tokens).double().log_softmax(-1).tolist()
            grown += [(score + value, (*tokens, v)) for v, value in enumerate(logp)]
        best = sorted(grown, reverse=True)[: max(2, 1 + len(eos)) * width]
        ended += [(s / length, t) for s, t in best[:width] if t[-1] in eos or length == new]
        ended = sorted(ended, reverse=True)[:width]
        live = [(s, t) for s, t in best if t[-1] not in eos][:width]
        if len(ended) == width and ended[-1][0] >= live[0][0] / length:
            break
    return list(ended[0][1])


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([NO_EOS, frozenset({0}), frozenset({2, 5})]))
def test_without_penalty_it_is_beam_search(seed, width, eos):
    table = Table(seed, vocabulary=13, sharp=1 + seed % 3)
    method = OPERA(num_beams=width, candidates=3 * width, weight=0, threshold=OUT_OF_REACH, softmax="vocabulary")
    assert run(method, table, 9, eos)[0] == beams_by_force(table, width, 9, eos)


def test_normalised_over_candidates_it_is_beam_search_if_every_token_is_one():
    for seed in range(20):
        table = Table(seed, vocabulary=8)
        method = OPERA(num_beams=3, candidates=256, weight=0, threshold=OUT_OF_REACH)
        assert run(method, table, 8, frozenset({1}))[0] == beams_by_force(table, 3, 8, frozenset({1}))


class Recomputed:
    """``Rows`` over a language model that reads everything again for every token."""

    def __init__(self, model: LlamaForCausalLM, prompt: Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.prompt_length = prompt.shape[1]
        self.visual = torch.zeros(self.prompt_length, dtype=torch.bool)

    def _read(self) -> tuple[Tensor, Tensor]:
        ids = torch.cat([self.prompt.expand(len(self.rows), -1), self.rows], 1)
        out = self.model(input_ids=ids, output_attentions=True)
        return out.logits[:, -1], out.attentions[-1][:, :, -1].amax(1)

    def start(self) -> tuple[Tensor, Tensor]:
        self.rows = torch.empty(1, 0, dtype=torch.int64)
        return self._read()

    def grow(self, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.rows = torch.cat([self.rows[parents], tokens[:, None]], 1)
        return self._read()

    def keep(self, rows: Tensor) -> None:
        self.rows = self.rows[rows]

    def rewind(self, generated: Tensor) -> Tensor:
        self.rows = generated
        return self._read()[0]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.4, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("eos", [[3], [3, 7, 11, 20]])
@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_without_penalty_it_is_the_beam_search_of_transformers(seed, beams, eos):
    model, ids = tiny_llama(seed), torch.randint(0, 40, (1, 5), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor(eos)

    def at_least_three(generated: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(-1, ends, -torch.inf) if generated.shape[1] < 3 else scores

    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, max_new_tokens=14, do_sample=False,
        eos_token_id=eos, pad_token_id=0, min_new_tokens=3,
    )  # fmt: skip
    count = (1 + len(eos)) * beams
    method = OPERA(num_beams=beams, candidates=count, weight=0, threshold=OUT_OF_REACH, softmax="vocabulary")
    found = method.search(Recomputed(model, ids), frozenset(eos), 14, at_least_three).tokens
    assert found.dtype == torch.int64
    assert found.tolist() == expected[0, 5:].tolist()


@pytest.mark.usefixtures("no_grad")
def test_it_runs_on_a_language_model_with_everything_on():
    ids = torch.randint(0, 40, (1, 5), generator=torch.Generator().manual_seed(0))
    rows = Recomputed(tiny_llama(0), ids)
    found = OPERA(threshold=2).search(rows, frozenset({3}), 24, unchanged).tokens
    assert 0 < len(found) <= 24


# --- Options


def test_presets_and_ranges():
    presets = all_presets()
    assert make_method("opera", presets["opera"].options) == OPERA()
    fast = make_method("opera", presets["opera_fast"].options)
    assert (fast.candidates, fast.threshold, fast.num_beams) == (1, 25, 5)
    for wrong in ({"num_beams": 0}, {"candidates": 0}, {"scale": 0}, {"threshold": 0}, {"softmax": "some"}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            OPERA(**wrong)


# --- The released search over the same tables


class Released(Table):
    """The tables of the golden: the same, but with a hash that no version of Python changes."""

    def _draw(self, tokens: tuple[int, ...], what: int, count: int) -> Tensor:
        key = 0
        for number in (self.seed, what, *tokens):
            key = (key * 1000003 + number + 7) % (2**61 - 1)
        return torch.randn(count, generator=torch.Generator().manual_seed(key))


SCRIPTED = json.loads((Path(__file__).parent.parent / "goldens" / "released" / "index.json").read_text())[
    "opera_scripted"
]


@pytest.mark.parametrize("case", SCRIPTED["cases"], ids=[f"seed{case['seed']}" for case in SCRIPTED["cases"]])
def test_tokens_and_rollbacks_equal_those_of_the_released_code(case):
    """All cases roll back. The release counts the tokens that it reads again: one less than the length gone back to."""
    table = Released(case["seed"], vocabulary=300, **case["table"])
    tokens, rows = run(OPERA(**case["options"]), table, len(case["tokens"]))
    assert tokens == case["tokens"]
    assert case["rewinds"]
    assert [length - 1 for length in rows.rewound] == case["rewinds"]
