"""The section on fewer image tokens: every figure is the summary's, and the section takes the place of an earlier
one."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

import pytest

import vlmattn
from tools.results import curve, survey
from tools.results.curve import curves, picture, table
from tools.results.survey import FEWER_TOKENS, read_run
from vlmattn.errors import InputError
from vlmattn.evals.runner import evaluate
from vlmattn.evals.suites import Chair, Pope, World

PRESETS = ["fastv@0.25", "fastv@0.5", "visionzip@0.5", "avl@0.5", "vhr"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    world = World("faint", 0.0, 6)
    suites = [Pope.on_scenes([world]), Chair.on_scenes([world])]
    evaluate(*vlmattn.load("embedded"), suites, PRESETS, folder, "embedded", say=lambda _: None, command="typed this")
    return folder


def test_budgets_fall_and_other_presets_are_left_out(run):
    found = curves(read_run(run))
    assert found["fastv"] == [(0.5, "fastv@0.5"), (0.25, "fastv@0.25")]
    assert set(found) == {"fastv", "visionzip", "avl"}


def test_the_table_says_what_the_summary_says(run):
    summary = read_run(run)
    rows = {tuple(c.strip() for c in line.split("|")[1:3]): line for line in table(summary).splitlines()[2:]}
    assert len(rows) == 5
    line = rows["`fastv`", "25 %"]
    value = summary["overall"][0]["rows"]["fastv@0.25"]["metrics"]["accuracy"]
    assert f"{value['value']:.1f} (" in line
    assert f"{value['difference']['value']:+.1f}" in line
    # two of six layers see all 49 tokens of an image, four see 12
    assert f"| {100 * (2 * 49 + 4 * 12) / (6 * 49):.0f} % |" in line
    assert "| 100 % |" in rows["`avl`", "50 %"], "it acts after the prompt"


def test_the_picture_is_a_picture_with_a_line_for_each_method(run):
    text = picture(read_run(run))
    assert ET.fromstring(text).tag.endswith("svg")
    assert picture(read_run(run)) == text, "the same figures draw the same bytes"


def test_the_section_is_written_once_and_survives_the_survey(run, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["survey", "--run", str(run), "--out", str(page)])
    survey.main()
    first = page.read_text()
    arguments = ["curve", "--run", str(run), "--page", str(page), "--picture", str(tmp_path / "c.svg")]
    monkeypatch.setattr(sys, "argv", arguments)
    curve.main()
    curve.main()
    both = page.read_text()
    assert both.count(FEWER_TOKENS) == 1
    assert both.startswith(first.rstrip())
    assert (tmp_path / "c.svg").is_file()
    monkeypatch.setattr(sys, "argv", ["survey", "--run", str(run), "--out", str(page)])
    survey.main()
    assert page.read_text() == both


def test_a_run_without_budgets(run, capsys, monkeypatch, tmp_path):
    summary = read_run(run)
    summary["recipes"] = {"none": summary["recipes"]["none"], "vhr": summary["recipes"]["vhr"]}
    with pytest.raises(InputError, match=r"presets such as fastv@0\.5"):
        curves(summary)
    monkeypatch.setattr(sys, "argv", ["curve", "--run", str(tmp_path), "--page", "p", "--picture", "q"])
    with pytest.raises(SystemExit) as stopped:
        curve.main()
    assert stopped.value.code == 2
    assert "finish the run" in capsys.readouterr().err
