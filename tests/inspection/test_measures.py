"""Measures on traces, against loops over the attention that the bare eager model returns, and algebra on made-up rows."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import IMG, ZOO

from vlmattn import VCD, InputError, OptionError
from vlmattn.inspection import (
    GROUPS,
    Named,
    Trace,
    distances,
    entropy,
    group_masses,
    head_distances,
    image_maps,
    influence,
    logit_difference,
    look,
    sink_scores,
    sink_tokens,
    split_heads,
)
from vlmattn.models import Piece

SAID = (5, 17, 60, 33, 8, 71, 40)
LAYERS, HEADS = 4, 4


def processor_of(name: str) -> Any:
    decode = lambda ids, **_: f"<{ids[0]}>"  # noqa: E731
    return SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: ZOO[name].vocabulary, decode=decode))


class Case:
    """A trace of a model, read from the disk, and what the eager model says in one forward: attention, states, ids."""

    def __init__(self, name: str, folder: Any) -> None:
        inputs = ZOO[name].prompt(2).inputs
        with torch.no_grad():
            self.trace = look(ZOO[name].build(), processor_of(name), inputs, answer=SAID, folder=folder / name)
            ids = torch.cat([inputs["input_ids"], torch.tensor([SAID[:-1]])], 1)
            longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            out = ZOO[name].build("eager")(**longer, output_attentions=True, output_hidden_states=True)
        self.attention = torch.cat(out.attentions).double()  # [layer, head, row, key]
        self.states = torch.cat(out.hidden_states[:-1]).double()
        self.ids, self.prompt = ids[0].tolist(), inputs["input_ids"].shape[1]
        self.rows = [self.prompt - 1 + step for step in range(len(SAID))]

    def check(self, found: Named, axes: tuple[str, ...], wanted: Any, close: float = 1e-4) -> None:
        assert found.axes == axes
        torch.testing.assert_close(
            found.values.double(), torch.tensor(wanted).double(), rtol=close, atol=1e-5, equal_nan=True
        )


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("traces"))


def each(case: Case, measure: Any) -> list:
    """``on_attention(row, a)`` for every step, layer and head; a is a list of attention by key."""
    return [
        [[measure(row, case.attention[n, h, row].tolist()) for h in range(HEADS)] for n in range(LAYERS)]
        for row in case.rows
    ]


# Loops


def test_masses_of_groups_by_hand(case):
    first = case.ids.index(IMG)

    def masses(row: int, a: list[float]) -> list[float]:
        found = [0.0] * 4
        for key, value in enumerate(a):
            kind = 3 if key >= case.prompt else 1 if case.ids[key] == IMG else 0 if key < first else 2
            found[kind] += value
        return found

    assert GROUPS == ("system", "image", "question", "answer")
    found = group_masses(case.trace)
    case.check(found, ("step", "layer", "head", "group"), each(case, masses))
    case.check(found.sum("group"), ("step", "layer", "head"), torch.ones(len(SAID), LAYERS, HEADS).tolist())
    assert found.pick(step=0, group=3).values.abs().max() == 0  # the last prompt row sees no answer
    assert found.pick(step=-1, group=3).values.min() > 0


def plain_entropy(a: list[float]) -> float:
    total = sum(a)
    return -sum(x / total * math.log(x / total) for x in a if x > 0)


def test_entropy_by_hand(case):
    axes = ("step", "layer", "head")
    images = [key for key, token in enumerate(case.ids) if token == IMG and key < case.prompt]
    case.check(entropy(case.trace), axes, each(case, lambda row, a: plain_entropy(a)))
    wanted = each(case, lambda row, a: plain_entropy(a) / math.log(row + 1))
    case.check(entropy(case.trace, normalised=True), axes, wanted)
    wanted = each(case, lambda row, a: plain_entropy([a[key] for key in images]))
    case.check(entropy(case.trace, image=True), axes, wanted)
    wanted = each(case, lambda row, a: plain_entropy([a[key] for key in images]) / math.log(len(images)))
    case.check(entropy(case.trace, image=True, normalised=True), axes, wanted)


def by_distance(case: Case) -> list[tuple[float, int, int]]:
    """(mean distance, layer, head), nearest first."""
    found = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            a = case.attention[layer, head]
            sums = [sum(float(a[row, key]) * (row - key) for key in range(row + 1)) for row in case.rows]
            found.append((sum(sums) / len(sums), layer, head))
    return sorted(found)


def test_local_and_global_heads_by_hand(case):
    wanted = by_distance(case)
    table = torch.zeros(LAYERS, HEADS)
    for value, layer, head in wanted:
        table[layer, head] = value
    case.check(head_distances(case.trace), ("layer", "head"), table.tolist())
    for share, count in ((0.3, 4), (0.5, 8), (0.01, 1)):  # of 16
        near, far = split_heads(case.trace, share)
        assert near == [(layer, head) for _, layer, head in wanted[:count]]
        assert far == [(layer, head) for _, layer, head in wanted[-count:]]


@pytest.mark.parametrize("window", [10, 3])
def test_windowed_distance_by_hand(case, window):
    local = by_distance(case)[:4]
    wanted = []
    for row in case.rows:
        total = 0.0
        for _, layer, head in local:
            for key in range(row + 1):
                total += float(case.attention[layer, head, row, key]) * min(row - key, window) / len(local)
        wanted.append(total)
    case.check(distances(case.trace, window=window), ("step",), wanted)


@pytest.mark.parametrize(("low", "high"), [(10, 50), (2, 4), (0, 0)])
def test_influence_by_hand(case, low, high):
    far = by_distance(case)[-4:]
    wanted = []
    for token in range(case.prompt + len(SAID)):
        rows = [row for row in case.rows if token + low <= row <= token + high]
        values = [
            sum(float(case.attention[layer, head, row, token]) for _, layer, head in far) / len(far) for row in rows
        ]
        wanted.append(sum(values) / len(values) if values else math.nan)
    found = influence(case.trace, low, high)
    case.check(found, ("token",), wanted)
    assert found.values.isnan().any()
    assert found.values.isfinite().any()


def test_sinks_by_hand(case):
    tokens = case.prompt + len(SAID)
    wanted = []
    for layer in range(LAYERS):
        wanted.append([])
        for token in range(tokens):
            rows = [row for row in case.rows if row >= token]
            values = [sum(float(case.attention[layer, h, row, token]) for h in range(HEADS)) / HEADS for row in rows]
            wanted[-1].append(sum(values) / len(values) if values else math.nan)
    case.check(sink_scores(case.trace), ("layer", "token"), wanted)
    assert math.isnan(wanted[0][-1])
    assert not math.isnan(wanted[0][-2])
    largest = case.states.abs().amax(-1) / case.states.square().mean(-1).sqrt()
    dims = case.states.abs().argmax(-1)
    tau = float(largest.median()) + 1e-4
    some = dims.flatten().bincount().topk(5).indices.tolist()
    found = sink_tokens(case.trace, tau)
    assert found.axes == ("layer", "token")
    assert torch.equal(found.values, largest > tau)
    chosen = sink_tokens(case.trace, tau, some).values
    assert torch.equal(chosen, (largest > tau) & sum(dims == dim for dim in some).bool())
    assert 0 < int(chosen.sum()) < int(found.values.sum())
    assert not sink_tokens(case.trace).values.any()  # tau = 20 is out of reach of 32 dimensions


def test_maps_lie_where_the_pieces_say(case):
    """A row of llava_next's tiles has a newline token behind it, which is in no piece."""
    slots = [key for key, token in enumerate(case.ids) if token == IMG]
    half = len(slots) // 2 if len(case.trace.pieces[0]) == 1 else 16 + 2 * 9
    for image, own in ((0, slots[:half]), (1, slots[half:])):
        for step in (0, 3, -1):
            row = case.rows[step]
            found = image_maps(case.trace, image, step)
            assert len(found) == len(case.trace.pieces[image]) > 0
            shapes = [(4, 4), (2 + 2 * image, 8)][: len(found)]
            for number, (one, (high, wide)) in enumerate(zip(found, shapes, strict=True)):
                first, behind = (16, 1) if number else (0, 0)
                wanted = [
                    [
                        [[float(case.attention[n, h, row, own[first + y * (wide + behind) + x]]) for x in range(wide)] for y in range(high)]
                        for h in range(HEADS)
                    ]
                    for n in range(LAYERS)
                ]  # fmt: skip
                case.check(one, ("layer", "head", "row", "column"), wanted)


# Two recipes


def test_difference_of_two_recipes():
    model, inputs = ZOO["llava"].build(), ZOO["llava"].prompt(2).inputs
    ours, bare = (
        look(model, processor_of("llava"), inputs, recipe, answer=SAID) for recipe in ("knockout_text_image", None)
    )
    found = logit_difference(ours, bare)
    assert found.axes == ("step",)
    assert torch.equal(found.values, ours.logprobs - bare.logprobs)
    assert torch.equal(logit_difference(bare, ours).values, -found.values)
    assert found.values.abs().max() > 0.01
    ruled = look(model, processor_of("llava"), inputs, VCD(), answer=SAID)
    assert bool((logit_difference(ruled, bare).values == -math.inf).any())
    other = look(model, processor_of("llava"), inputs, answer=SAID[:-1])
    with pytest.raises(InputError, match=r"different answers; look\(..., answer=trace.answer\)"):
        logit_difference(bare, other)


def test_places_and_options_out_of_range(case):
    trace = case.trace
    for error, match, measure in (
        (InputError, r"image 2 is out of range: the prompt has 2 \(0 to 1\)", lambda: image_maps(trace, 2, 0)),
        (InputError, "image -1 is out of range", lambda: image_maps(trace, -1, 0)),
        (InputError, "answer token 7 is out of range", lambda: image_maps(trace, 0, 7)),
        (OptionError, "share must be above 0 and at most 0.5, got 0.6", lambda: split_heads(trace, 0.6)),
        (OptionError, "share", lambda: distances(trace, share=0)),
        (OptionError, "window must be at least 1, got 0", lambda: distances(trace, window=0)),
        (OptionError, "0 <= low <= high, got 5 and 4", lambda: influence(trace, 5, 4)),
        (OptionError, "low and high", lambda: influence(trace, -1, 4)),
    ):
        with pytest.raises(error, match=match):
            measure()


def test_axes_by_name():
    values = torch.arange(24.0).view(2, 3, 4)
    named = Named(values, ("layer", "head", "key"))
    assert named.sizes == {"layer": 2, "head": 3, "key": 4}
    assert repr(named) == "Named(layer 2, head 3, key 4)"
    for found, wanted, axes in (
        (named.mean("head"), values.mean(1), ("layer", "key")),
        (named.sum("key", "layer"), values.sum((0, 2)), ("head",)),
        (named.pick(head=-1), values[:, 2], ("layer", "key")),
        (named.pick(key=3, layer=0), values[0, :, 3], ("head",)),
    ):
        assert found.axes == axes
        torch.testing.assert_close(found.values, wanted)
    for match, wrong in (
        ("no axis 'row'; the axes are layer, head, key", lambda: named.mean("row")),
        (r"head 3 is out of range: there are 3 \(0 to 2\)", lambda: named.pick(head=3)),
        ("out of range", lambda: named.pick(layer=-3)),
        ("needs as many different names", lambda: Named(values, ("layer", "head"))),
        ("needs as many different names", lambda: Named(values, ("layer", "head", "head"))),
    ):
        with pytest.raises(OptionError, match=match):
            wrong()


# Algebra


def made(rows: torch.Tensor, prompt: int, images: int) -> Trace:
    """A trace of rows ``[step, layer, head, token]``, whose image tokens stand behind the first token."""
    steps, layers, heads, tokens = rows.shape
    groups = [0, *[1] * images, *[2] * (prompt - 1 - images), *[3] * steps]
    numbers = [-1, *[0] * images, *[-1] * (tokens - 1 - images)]
    states = torch.zeros(layers, tokens - 1)
    return Trace(
        recipe="none", source="", tokens=("t",) * tokens, groups=tuple(groups), images=tuple(numbers),
        pieces=((Piece(torch.arange(images)[None]),),), prompt=prompt, answer=tuple(range(steps)), said="", layers=tuple(range(layers)),
        rows={prompt - 1 + n: row[..., : prompt + n] for n, row in enumerate(rows)},
        gains={prompt - 1 + n: torch.ones(layers, heads) for n in range(steps)},
        phi=states, dims=states.long(), norms=states, likeness=states, logprobs=torch.zeros(steps), rivals=((),) * steps,
    )  # fmt: skip


@st.composite
def traces(draw):
    """Causal rows of softmax, from nearly uniform to nearly one key."""
    images, more, steps = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    prompt = 1 + images + more
    score = torch.randn(steps, layers, heads, prompt + steps, generator=generator) * draw(
        st.sampled_from([0.0, 1, 5, 40])
    )
    later = torch.arange(prompt + steps) > prompt - 1 + torch.arange(steps)[:, None]
    return made(score.masked_fill(later[:, None, None], -math.inf).softmax(-1), prompt, images)


@given(traces())
def test_masses_are_shares_of_one(trace):
    found = group_masses(trace).values
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


@given(traces())
def test_entropy_is_between_one_key_and_all(trace):
    keys = torch.tensor([row + 1.0 for row in trace.answer_rows])[:, None, None]
    whole, image = entropy(trace).values, entropy(trace, image=True).values
    assert bool((whole >= 0).all())
    assert bool((whole <= keys.log() + 1e-5).all())
    assert bool((image <= math.log(int(trace.keys_of("image").sum())) + 1e-5).all())
    torch.testing.assert_close(entropy(trace, normalised=True).values * keys.log(), whole)


@given(st.integers(1, 6), st.integers(1, 4))
def test_uniform_rows(images, steps):
    prompt = images + 3
    rows = torch.zeros(steps, 2, 2, prompt + steps)
    for step in range(steps):
        rows[step, ..., : prompt + step] = 1 / (prompt + step)
    trace = made(rows, prompt, images)
    for step, row in enumerate(trace.answer_rows):
        assert entropy(trace).values[step].tolist() == [[pytest.approx(math.log(row + 1))] * 2] * 2
        mean = sum(min(back, 10) for back in range(row + 1)) / (row + 1)
        assert distances(trace).values[step] == pytest.approx(mean)
    torch.testing.assert_close(entropy(trace, normalised=True).values, torch.ones(steps, 2, 2))


@given(traces(), st.integers(1, 12))
def test_distances_are_within_their_window_and_grow_with_it(trace, window):
    near, far = distances(trace, window).values, distances(trace, window + 1).values
    assert bool((near >= 0).all())
    assert bool((near <= window + 1e-4).all())
    assert bool((near <= far + 1e-5).all())
    local, distant = split_heads(trace)
    table = head_distances(trace).values
    assert max(float(table[place]) for place in local) <= min(float(table[place]) for place in distant) + 1e-6


@given(traces())
def test_a_step_hands_out_attention_of_one(trace):
    """Sink scores times the number of their rows, over all tokens, are the rows."""
    scores = sink_scores(trace).values
    rows = torch.tensor(trace.answer_rows)
    count = (rows >= torch.arange(len(trace.tokens))[:, None]).sum(1)
    torch.testing.assert_close((scores * count)[:, :-1].sum(-1), torch.full((len(trace.layers),), float(len(rows))))
    assert bool((scores[:, :-1] <= 1 + 1e-5).all())
    assert bool(scores[:, -1].isnan().all())


def test_a_row_that_does_not_see_the_image():
    rows = torch.zeros(1, 1, 1, 7)
    rows[..., 0] = 1
    trace = made(rows, 6, 3)
    assert entropy(trace, image=True).values.item() == 0
    assert entropy(trace).values.item() == 0
    assert group_masses(trace).values.flatten().tolist() == [1, 0, 0, 0]


def test_rows_of_dropped_tokens_count_as_they_are():
    """A recipe that leaves less than 1 is not brought back to 1, except for entropy."""
    rows = torch.zeros(2, 1, 1, 8)
    rows[..., 1:3] = 0.25
    trace = made(rows, 6, 3)
    assert group_masses(trace).values[0].flatten().tolist() == [0, 0.5, 0, 0]
    assert entropy(trace).values.flatten().tolist() == pytest.approx([math.log(2)] * 2)
    assert distances(trace, window=100).values.tolist() == pytest.approx([0.25 * (4 + 3), 0.25 * (5 + 4)])
