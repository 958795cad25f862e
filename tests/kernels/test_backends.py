"""Law 2, one truth: every backend agrees with the float64 reference, on edits drawn at random and on hard cases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numerics import bound, size
from tiny import Largest
from torch import Tensor

from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.kernels import (
    AttentionEdit,
    BoostPlan,
    GainPart,
    GainPlan,
    HeadPart,
    LevelPlan,
    LogitPart,
    MaskPart,
    MassGate,
    Problem,
    Rows,
    Visibility,
    attend,
    merge,
    weights,
)

TERMS = 16 + 24  # of a score, and keys of a row
# Groups: text, text sink, image, image sink. The gate asks for mass on the image, as VAR's does.
VAR_PLAN = GainPlan(taken=(0, 0.6, 0, 0.6), given=(0, 0, 1, 0), gates=(MassGate((0, 0, 1, 1), 0.2),))


@pytest.fixture(params=["eager", "merge", "merge, nothing gathered"])
def backend(request, monkeypatch):
    """Fast backends; merge with few keys of a group gathered (all of them, in cases as small as these) and hidden among others."""
    name, *flash = request.param.split(", ")
    if flash:
        monkeypatch.setattr(merge, "_FEW", -1)
    return name


@dataclass
class Case:
    query: Tensor
    key: Tensor
    value: Tensor
    see: Visibility
    scale: float

    def run(self, edit: AttentionEdit, backend: str) -> Tensor:
        return attend(self.problem(edit), backend)[0]

    def problem(self, edit: AttentionEdit, **model: object) -> Problem:
        return Problem(self.query, self.key, self.value, self.see, self.scale, edit, **model)

    @property
    def tolerance(self) -> float:
        """Float32: of its sums. Half precision also rounds scores (on some CPUs with every term of the dot product): weights are off in proportion to the largest."""
        if self.query.dtype == torch.float32:
            return bound(torch.float32, TERMS, scale=4.0)
        key = self.key.float().repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        score = size(self.query.float() @ key.transpose(-1, -2)) * self.scale
        return bound(self.query.dtype, 1, (1 + score) * size(self.value))


def make_case(
    seed: int, rows: int = 12, past: int = 0, padding: int = 2, kv_heads: int = 2, repeat: int = 2, dim: int = 16,
    dtype: torch.dtype = torch.float32, sink: float = 0.0, float_mask: bool = False, batch: int = 2,
) -> Case:  # fmt: skip
    """Random q, k, v; sample 0 is left-padded. ``sink``: mass that key 5 and key ``padding`` take together from every row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys = past + rows
    query, key = normal(batch, kv_heads * repeat, rows, dim), normal(batch, kv_heads, keys, dim)
    value = normal(batch, kv_heads, keys, dim)
    if sink:
        query[..., 0] = 4.0
        key[..., 0] = 0.0
        for slot in (5, padding):
            key[:, :, slot, 0] = torch.logit(torch.tensor(sink)) + 3.0  # scale 1/4 x query 4: a score of that size
    real = torch.ones(batch, keys, dtype=torch.bool)
    real[0, :padding] = False
    causal = torch.arange(keys)[None] <= past + torch.arange(rows)[:, None]
    mask: Tensor | None = causal[None, None] & real[:, None, None]
    if not padding and not past and not float_mask:
        mask = None
    elif float_mask:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    see = Visibility(mask, past, real if padding else None)
    return Case(query.to(dtype), key.to(dtype), value.to(dtype), see, dim**-0.5)


def groups_of(case: Case, seed: int, present: bool = True, count: int = 4) -> GainPart:
    """Keys 0-3 text, 4-8 image, the rest text; sinks at random; rows after the image."""
    batch, keys = case.query.shape[0], case.key.shape[2]
    rows = case.query.shape[2]
    image = torch.zeros(batch, keys, dtype=torch.bool)
    image[:, 4:9] = True
    sink = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < 0.3
    sink[:, 5] = True
    groups = (image * 2 + sink).to(torch.uint8)
    runs = ((0, 4, (0, 1)), (4, 9, (2, 3))) if present else None
    first = max(0, min(9 - (case.see.offset or 0), rows))
    row_mask = torch.arange(rows)[None].expand(batch, rows) >= first
    return GainPart(groups, VAR_PLAN, Rows(row_mask, first), runs)


def check(case: Case, edit: AttentionEdit, backend: str) -> None:
    exact = case.run(edit, "reference").float()
    got = case.run(edit, backend).float()
    torch.testing.assert_close(got, exact, rtol=0, atol=case.tolerance)


@contextmanager
def watched_plans() -> Iterator[list[float]]:
    """How far the choices of gain plans are from the other ones, in mass: rows from a gate, and the last head that is boosted from the next."""
    found: list[float] = []
    move, boost = GainPlan.gains, BoostPlan.gains

    def gated(plan: GainPlan, mass: Tensor, weighted: Tensor | None):
        found.extend(float((mass @ mass.new_tensor(gate.weights) - gate.bound).abs().min()) for gate in plan.gates)
        return move(plan, mass, weighted)

    def ranked(plan: BoostPlan, mass: Tensor, weighted: Tensor | None):
        last = int(plan.share * mass.shape[1])
        if 0 < last < mass.shape[1]:
            masses = mass[..., 1:].sort(1, descending=True).values
            apart = masses[:, last - 1] - masses[:, last]
            found.append(float(apart[apart > 0].min()) if (apart > 0).any() else 1.0)  # equal: the first counts
        return boost(plan, mass, weighted)

    with mock.patch.object(GainPlan, "gains", gated), mock.patch.object(BoostPlan, "gains", ranked):
        yield found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sink", [0.0, 0.9, 0.999])
@pytest.mark.parametrize(
    "shape", [dict(rows=12), dict(rows=5, past=11), dict(rows=1, past=14), dict(rows=12, padding=0)]
)
def test_group_gains_match_the_reference(backend, dtype, sink, shape):
    case = make_case(1, dtype=dtype, sink=sink, **shape)
    part = groups_of(case, 2)
    edit = AttentionEdit(gain=(part,))
    check(case, edit, backend)
    plain = case.run(AttentionEdit(), "reference")
    assert (case.run(edit, "reference") - plain).abs().max() > 1e-3, "the edit must change something"
    torch.testing.assert_close(  # without the hint where groups are
        case.run(AttentionEdit(gain=(groups_of(case, 2, present=False),)), backend), case.run(edit, backend),
        rtol=0, atol=case.tolerance,
    )  # fmt: skip


def test_dominant_sinks_have_the_mass_they_are_said_to_have():
    case = make_case(1, rows=12, padding=0, sink=0.999)
    score = (case.query @ case.key.repeat_interleave(2, 1).transpose(-1, -2) * case.scale)[:, :, -1].softmax(-1)
    assert score[..., [0, 5]].sum(-1).min() > 0.98


def test_rows_that_see_nothing_are_zero(backend):
    case = make_case(3, rows=12, padding=4)
    part = groups_of(case, 2)
    edit = AttentionEdit(gain=(GainPart(part.groups, part.plan),))
    check(case, edit, backend)
    assert case.run(edit, backend)[0, :, :4].abs().max() == 0


@pytest.mark.parametrize("first", [0, 6, 12])
def test_rows_that_see_nothing_are_zero_before_the_first_edited_row_too(first):
    case = make_case(3, rows=12, padding=4, float_mask=True)
    rows = Rows((torch.arange(12) >= first).expand(2, 12), first)
    edit = AttentionEdit(logit=(LogitPart(lift=torch.ones(2, 12), rows=rows),))
    check(case, edit, "eager")
    assert case.run(edit, "eager")[0, :, :4].abs().max() == 0


def test_empty_groups_leave_attention_alone(backend):
    case = make_case(4)
    nothing = torch.zeros(2, 12, dtype=torch.uint8)
    edit = AttentionEdit(gain=(GainPart(nothing, VAR_PLAN),))
    check(case, edit, backend)
    torch.testing.assert_close(
        case.run(edit, backend), case.run(AttentionEdit(), "reference"), rtol=0, atol=case.tolerance
    )


@st.composite
def edits(draw, batch: int, heads: int, rows: int, keys: int) -> AttentionEdit:
    """Any composition of parts."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def some_rows() -> Rows | None:
        if draw(st.booleans()):
            return None
        first = draw(st.integers(0, rows))
        return Rows((uniform(batch, rows) < 0.7) & (torch.arange(rows) >= first), first)

    def ids(n: int) -> Tensor:
        return torch.randint(-1, 3, (batch, n), generator=generator)

    masks = [
        MaskPart(
            ids(rows), ids(keys), draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.sampled_from(["any", "same", "different"])),
            draw(st.booleans()), draw(st.sampled_from([None, uniform(1, heads) < 0.5, uniform(batch, heads) < 0.5])),
        )
        for _ in range(draw(st.integers(0, 2)))
    ]  # fmt: skip
    per_head = (batch, heads, keys) if draw(st.booleans()) else (batch, keys)
    logits = [
        LogitPart(
            uniform(*per_head) + 0.5,
            uniform(batch, keys),
            draw(st.sampled_from([None, uniform(batch, keys)])),
            uniform(*per_head) - 0.5,
            some_rows(),
        )
        for _ in range(draw(st.integers(0, 2)))
    ]
    gains = []
    for _ in range(draw(st.integers(0, 2))):
        count = draw(st.integers(1, 4))
        plan = GainPlan(
            taken=tuple(uniform(count).tolist()),
            given=tuple(float(v) for v in (uniform(count) < 0.5)),
            scale=draw(st.sampled_from([None, tuple((uniform(count) * 2).tolist())])),
            gates=draw(st.sampled_from([(), (MassGate(tuple(uniform(count).tolist()), 0.3),)])),
            renormalise=draw(st.booleans()),
        )
        weight = None
        if draw(st.booleans()):
            plan, weight = BoostPlan(draw(st.sampled_from([0.5, 0.25]))), uniform(batch, keys) * 3
        elif draw(st.booleans()):
            plan = LevelPlan(draw(st.integers(2, 5)), draw(st.floats(0, 1)))
        groups = torch.randint(0, plan.groups, (batch, keys), generator=generator, dtype=torch.uint8)
        gains.append(GainPart(groups, plan, some_rows(), weight=weight))
    offset = draw(st.sampled_from([None, uniform(batch, heads, 16), uniform(1, heads, 16)]))
    heads_part = [HeadPart(uniform(batch, heads) * 2, some_rows(), offset) for _ in range(draw(st.integers(0, 2)))]
    keep = uniform(batch, keys) < 0.8 if draw(st.booleans()) else None
    shift = uniform(heads, 16) - 0.5 if draw(st.booleans()) else None
    return AttentionEdit(tuple(masks), tuple(logits), tuple(gains), tuple(heads_part), keep, shift=shift)


@settings(max_examples=120)
@given(st.data())
def test_any_composition_matches_the_reference(data):
    rows, past = data.draw(st.sampled_from([(1, 8), (6, 0), (4, 5)]))
    case = make_case(
        data.draw(st.integers(0, 99)), rows, past, padding=data.draw(st.integers(0, 3)),
        repeat=data.draw(st.sampled_from([1, 3])), float_mask=data.draw(st.booleans()),
    )  # fmt: skip
    edit = data.draw(edits(2, case.query.shape[1], rows, past + rows))
    with watched_plans() as apart:
        case.run(edit, "eager")
    assume(min(apart, default=1.0) > 3e-5)  # masses are right to a few 1e-7; boosted heads are ranked by 1e-5
    check(case, edit, "eager")
    got, backend = attend(case.problem(edit))
    torch.testing.assert_close(got, case.run(edit, "reference"), rtol=0, atol=case.tolerance)
    assert backend == (
        "merge"
        if rows > 1
        and len(edit.gain) == 1
        and edit.gain[0].weight is None
        and not (edit.mask or edit.logit or edit.keep is not None)
        else "eager"
    )


@settings(max_examples=25)
@given(st.data())
def test_then_is_associative_with_a_neutral_identity(data):
    case = make_case(data.draw(st.integers(0, 99)), rows=5)
    a, b, c = (data.draw(edits(2, 4, 5, 5)) for _ in range(3))
    run = lambda edit: case.run(edit, "eager")  # noqa: E731
    assert torch.equal(run(a.then(b).then(c)), run(a.then(b.then(c))))
    assert torch.equal(run(AttentionEdit().then(a)), run(a.then(AttentionEdit())))


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(0, 1))
def test_a_transfer_keeps_the_mass(masses, keep):
    total = sum(masses) or 1.0
    mass = torch.tensor([m / total for m in masses], dtype=torch.float64)
    plan = GainPlan(taken=(0, 1 - keep, 0, 1 - keep), given=(0, 0, 1, 0))
    gamma = plan.gains(mass, None)[0]
    assert float((gamma * mass).sum()) == pytest.approx(float(mass.sum()), abs=1e-9)
    assert (gamma >= 0).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_shift_is_added_to_the_queries_before_scale_and_softcap(backend, softcap):
    case = make_case(7, 6)
    edit, sinks = AttentionEdit(shift=torch.randn(case.query.shape[1], 16)), torch.randn(case.query.shape[1])

    def run(query: Tensor, edit: AttentionEdit) -> Tensor:
        problem = case.problem(edit, softcap=softcap, sinks=sinks)
        return attend(replace(problem, query=query), backend)[0]

    by_hand = case.query + edit.shift[:, None]
    torch.testing.assert_close(run(case.query, edit), run(by_hand, AttentionEdit()), rtol=0, atol=1e-6)
    both = run(case.query, edit.then(AttentionEdit(shift=-0.5 * edit.shift)))
    torch.testing.assert_close(both, run(case.query + 0.5 * edit.shift[:, None], AttentionEdit()), rtol=0, atol=1e-6)
    looked, plain = (
        weights(replace(case.problem(one, softcap=softcap, sinks=sinks), query=query), 1, 4)
        for query, one in ((case.query, edit), (by_hand, AttentionEdit()))
    )
    assert torch.equal(looked, plain)
    if softcap is None:  # the same as a bias on each key
        repeat = case.query.shape[1] // case.key.shape[1]
        bias = torch.einsum("hd,bhkd->bhk", edit.shift, case.key.repeat_interleave(repeat, 1)) * case.scale
        biased = run(case.query, AttentionEdit(logit=(LogitPart(bias=bias),)))
        torch.testing.assert_close(run(case.query, edit), biased, rtol=0, atol=1e-5)


def test_prefill_never_holds_query_times_key_weights():
    """Law 6: the largest tensor of a long prefill with group gains stays linear in the length."""
    rows = 2048
    case = make_case(0, rows, padding=0, kv_heads=2, repeat=1, batch=1)
    part = groups_of(case, 1)
    with torch.no_grad(), Largest() as largest:
        _, backend = attend(case.problem(AttentionEdit(gain=(part,))))
    assert backend == "merge"
    assert 0 < largest.numel < rows * rows / 8


def test_forced_backends_never_fall_back(monkeypatch):
    case = make_case(0)
    logit = AttentionEdit(logit=(LogitPart(lift=torch.ones(2, 12)),))
    monkeypatch.setenv("VLMATTN_BACKEND", "merge")
    with pytest.raises(UnsupportedError, match="logit"):
        attend(case.problem(logit))
    monkeypatch.setenv("VLMATTN_BACKEND", "triton")
    with pytest.raises(UnsupportedError, match="float16"):
        attend(case.problem(logit))
    monkeypatch.setenv("VLMATTN_BACKEND", "flash9")
    with pytest.raises(OptionError, match="reference, eager, merge, triton"):
        attend(case.problem(logit))
    for name in ("reference", "eager"):
        monkeypatch.setenv("VLMATTN_BACKEND", name)
        assert attend(case.problem(logit))[1] == name


def test_values_of_another_size_than_queries_run_dense():
    case = make_case(0)
    case.value = torch.randn(2, 2, 12, 24, generator=torch.Generator().manual_seed(1))
    edit = AttentionEdit(gain=(groups_of(case, 1),))
    got, backend = attend(case.problem(edit))
    assert backend == "eager"
    torch.testing.assert_close(got, case.run(edit, "reference"), rtol=0, atol=case.tolerance)
    with pytest.raises(UnsupportedError, match="values of the size of the queries"):
        case.run(edit, "merge")


def test_plans_and_masks_refuse_bad_values():
    with pytest.raises(OptionError, match="one value per group"):
        GainPlan(taken=(0, 1), given=(1,))
    with pytest.raises(OptionError, match=r"0\.\.1"):
        MaskPart(torch.zeros(1, 1), torch.zeros(1, 1), weight=1.5)


def test_gradients_reach_query_key_and_value():
    case = make_case(5)
    leaves = [t.requires_grad_() for t in (case.query, case.key, case.value)]
    out, backend = attend(case.problem(AttentionEdit(gain=(groups_of(case, 1),))))
    out.square().sum().backward()
    assert backend == "eager"
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in leaves)
