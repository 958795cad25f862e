"""Figures: ratios of sums, paired bootstrap over images, McNemar's test."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmattn.evals.stats import Bootstrap, Metric, mcnemar

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
    answers = [(True, i < 20) for i in range(40)]
    together = Bootstrap([str(i // 20) for i in range(40)]).interval(ACCURACY, FIELDS, records(answers))
    apart = Bootstrap([str(i) for i in range(40)]).interval(ACCURACY, FIELDS, records(answers))
    assert (together.low, together.high) == (0, 100)
    assert apart.high - apart.low < 40


def test_differences_are_paired():
    """The same answers give an interval of exactly zero, however uncertain each value is."""
    rng = np.random.default_rng(1)
    rows = records([(bool(rng.random() < 0.5), bool(rng.random() < 0.5)) for _ in range(100)])
    change = Bootstrap([str(i) for i in range(100)]).difference(ACCURACY, FIELDS, rows, rows)
    assert (change.value, change.low, change.high) == (0, 0, 0)


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
