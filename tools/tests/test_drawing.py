"""The picture of many presets: what it shows is the summary's, and better is to the right."""

from __future__ import annotations

import re

import pytest

from tools.results.drawing import _COLOURS, forest


def cell(value, low, high):
    return {"value": 80 + value, "difference": {"value": value, "low": low, "high": high}}


def summary(better="higher"):
    cells = {"good": cell(3, 1, 5), "even": cell(0, -1, 1), "bad": cell(-3, -5, -1), "broken": cell(-60, -70, -50)}
    rows = {name: {"metrics": {"rate": of}} for name, of in cells.items()}
    rows["none"] = {"metrics": {"rate": {"value": 80}}}
    metrics = {"metrics": {"pope": [{"name": "rate", "better": better}]}, "recipes": dict.fromkeys(["none", *cells])}
    return metrics | {"overall": [{"suite": "pope", "condition": "faint", "rows": rows}]}


def markers(svg, colour):
    """Places of the dots and arrows of one colour, from left to right."""
    return sorted(float(x) for x in re.findall(rf'<use [^>]*x="([\d.]+)"[^>]*fill: {colour}', svg))


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_better_is_to_the_right_whatever_the_side(better):
    drawn = forest(summary(better))
    assert forest(summary(better)) == drawn, "the same bytes"
    for text in ("good", "even", "bad", "broken", "pope faint", f"({better} is better)"):
        assert f"<!-- {text} -->" in drawn
    green, grey, red = (markers(drawn, _COLOURS[kind]) for kind in ("better", "", "worse"))
    assert (len(green), len(grey), len(red)) == ((1, 1, 2) if better == "higher" else (2, 1, 1))
    assert max(red) < grey[0] < min(green)


def test_what_is_far_off_is_an_arrow_at_the_edge():
    drawn = forest(summary())
    (left,) = {float(x) for x in re.findall(r'<rect x="([\d.]+)"', drawn)}
    broken, bad = markers(drawn, _COLOURS["worse"])
    assert broken == pytest.approx(left, abs=1e-3)
    assert bad > left + 1


def test_a_difference_without_an_interval_is_drawn_as_a_dot():
    found = summary()
    found["overall"][0]["rows"]["even"] = {"metrics": {"rate": cell(0, None, None)}}
    assert len(markers(forest(found), _COLOURS[""])) == 1
