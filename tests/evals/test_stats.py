"""Figures: ratios of sums, paired bootstrap over images, McNemar's test."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmattn.evals.stats import FEWEST, Bootstrap, Metric, mcnemar

FIELDS = ("tp", "fp", "tn", "fn")
ACCURACY = Metric("accuracy", {"tp": 1, "tn": 1}, dict.fromkeys(FIELDS, 1.0), "")
PRECISION = Metric("precision", {"tp": 1}, {"tp": 1, "fp": 1}, "")


def records(answers: list[tuple[bool, bool]]) -> np.ndarray:
    """One-hot (tp, fp, tn, fn) rows for (truth, said yes)."""
    names = {(True, True): 0, (False, True): 1, (False, False): 2, (True, False): 3}
    return np.eye(4)[[names[pair] for pair in answers]]


def test_metrics_are_ratios_of_sums():
    rows = records([(True, True)] * 3 + [(False, True)] + [(False, False)] * 4)
    sums = rows.sum(0)
    assert float(ACCURACY.value(FIELDS, sums)) == pytest.approx(87.5)
    assert float(PRECISION.value(FIELDS, sums)) == pytest.approx(75.0)
    assert float(PRECISION.value(FIELDS, np.array([0, 0, 5, 5]))) == 0, "no yes at all must not divide by zero"


def test_intervals_hold_the_value_and_shrink_with_more_images():
    rng = np.random.default_rng(0)

    def width(images: int) -> float:
        answers = [(True, bool(rng.random() < 0.8)) for _ in range(images * 4)]
        names = [str(i // 4) for i in range(images * 4)]
        cell = Bootstrap(names).interval(ACCURACY, FIELDS, records(answers))
        assert cell.low <= cell.value <= cell.high
        return cell.high - cell.low

    assert width(400) < width(40) / 2


def test_questions_about_one_image_are_resampled_together():
    answers = [(True, i < 200) for i in range(400)]
    together = Bootstrap([str(i // 20) for i in range(400)]).interval(ACCURACY, FIELDS, records(answers))
    apart = Bootstrap([str(i) for i in range(400)]).interval(ACCURACY, FIELDS, records(answers))
    assert together.high - together.low > 35
    assert apart.high - apart.low < 11


def test_differences_are_paired():
    """Answers that differ in one of a hundred images are that close, however uncertain each value is."""
    rng = np.random.default_rng(1)
    rows = records([(bool(rng.random() < 0.5), bool(rng.random() < 0.5)) for _ in range(100)])
    other = rows.copy()
    other[0] = rows[0][[3, 2, 1, 0]]
    names = [str(i) for i in range(100)]
    value = Bootstrap(names).interval(ACCURACY, FIELDS, rows)
    change = Bootstrap(names).difference(ACCURACY, FIELDS, rows, other)
    assert abs(change.value) == pytest.approx(1)
    assert change.high - change.low <= 3 < value.high - value.low


def test_the_same_answers_have_no_difference_and_no_interval():
    rows = records([(True, i % 3 > 0) for i in range(100)])
    change = Bootstrap([str(i) for i in range(100)]).difference(ACCURACY, FIELDS, rows, rows)
    assert change.to_dict() == {"value": 0, "low": None, "high": None}


@pytest.mark.parametrize("images", [1, 2, FEWEST - 1, FEWEST, 40])
def test_few_images_have_no_interval(images):
    names = [str(i % images) for i in range(200)]
    answers = [(True, (i // images + i) % 2 == 0 and i % images > 0) for i in range(200)]
    cell = Bootstrap(names).interval(ACCURACY, FIELDS, records(answers))
    assert (cell.low < cell.value < cell.high) if images >= FEWEST else np.isnan([cell.low, cell.high]).all()


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("images", [FEWEST, 100])
def test_shares_on_which_all_images_agree_have_the_exact_interval(right, images):
    """The ends are where so many trials that all agree have a chance of 2.5 %."""
    cell = Bootstrap([str(i % images) for i in range(300)]).interval(ACCURACY, FIELDS, records([(True, right)] * 300))
    other = cell.low if right else 100 - cell.high
    assert (other / 100) ** images == pytest.approx(0.025)
    assert cell.value == (cell.high if right else cell.low) == (100 if right else 0)


def test_only_images_with_something_to_count_are_counted():
    """Precision over answers that are yes on three images of forty."""
    answers = [(True, i < 3) for i in range(40)]
    cell = Bootstrap([str(i) for i in range(40)]).interval(PRECISION, FIELDS, records(answers))
    assert (cell.value, np.isnan(cell.low)) == (100, True)


def test_what_is_no_share_has_no_interval_where_all_images_agree():
    length = Metric("length", {"tp": 1}, {"fn": 1}, "", scale=1.0)
    rows = np.tile([7.0, 0, 0, 1], (20, 1))
    cell = Bootstrap([str(i) for i in range(20)]).interval(length, FIELDS, rows)
    assert (cell.value, np.isnan(cell.low)) == (7, True)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 25), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_no_interval_is_ever_of_width_zero(answers):
    names = [str(image) for image, *_ in answers]
    rows, base = (records([(truth, said[which]) for _, truth, *said in answers]) for which in (0, 1))
    bootstrap = Bootstrap(names, resamples=200)
    for metric in (ACCURACY, PRECISION):
        for cell in (
            bootstrap.interval(metric, FIELDS, rows),
            bootstrap.difference(metric, FIELDS, rows, base),
            bootstrap.difference(metric, FIELDS, rows, rows),
        ):
            assert np.isnan([cell.low, cell.high]).all() or cell.low < cell.high
            assert np.isfinite(cell.value)
            assert len(set(names)) >= FEWEST or np.isnan(cell.low)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_a_figure_over_parts_is_the_mean_of_theirs(answers):
    rows, parts = records([(truth, said) for _, truth, said in answers]), [part for part, *_ in answers]
    names = [str(i % 7) for i in range(len(answers))]
    whole = Bootstrap(names, parts=parts).interval(PRECISION, FIELDS, rows).value
    each = [
        Bootstrap([n for n, p in zip(names, parts, strict=True) if p == part])
        .interval(PRECISION, FIELDS, rows[[p == part for p in parts]])
        .value
        for part in sorted(set(parts))
    ]
    assert whole == pytest.approx(sum(each) / len(each))


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        answers = [(True, bool(rng.random() < 0.7)) for _ in range(150)]
        cell = Bootstrap([str(i) for i in range(150)], seed=seed, resamples=300).interval(
            ACCURACY, FIELDS, records(answers)
        )
        hits += cell.low <= 70 <= cell.high
    assert 178 <= hits <= 198


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_is_the_exact_two_sided_sign_test(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    b = sum(x and not y for x, y in pairs)
    n = b + sum(y and not x for x, y in pairs)
    exact = 1.0 if n == 0 else min(1.0, 2 * sum(comb(n, k) for k in range(min(b, n - b) + 1)) / 2**n)
    assert mcnemar(first, second) == pytest.approx(exact)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_by_hand():
    assert mcnemar([True] * 10, [False] * 10) == pytest.approx(2 / 1024)
    assert mcnemar([True, False], [False, True]) == 1
