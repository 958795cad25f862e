"""``python -m lmms_eval --model vlmattn`` finds what ``vlmattn eval`` finds: the same answers, the same figures."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("lmms_eval.models")  # its own name would find this folder

from lmms_runs import NAMES, TORCHRUN, outcome, start, write_tasks

import vlmattn
from vlmattn.evals.runner import evaluate


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs at the same time: without a preset, with one, and with one in two processes."""
    tasks = write_tasks(tmp_path_factory.mktemp("tasks"))
    wanted = {"none": ("none", ()), "vhr": ("vhr", ()), "vhr in two": ("vhr", TORCHRUN)}
    folders = {name: tmp_path_factory.mktemp("out") for name in wanted}
    running = {name: start(tasks, folders[name], *how) for name, how in wanted.items()}
    return {name: outcome(process, folders[name]) for name, process in running.items()}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    suites = list(NAMES.values())
    model, processor = vlmattn.load("embedded")
    folder = tmp_path_factory.mktemp("ours")
    return evaluate(model, processor, suites, ["none", "vhr"], folder, "embedded", 4, say=lambda _: None)


@pytest.mark.parametrize("preset", ["none", "vhr"])
@pytest.mark.parametrize("task", NAMES)
def test_answers_are_those_of_our_runner(runs, ours, task, preset):
    suite = NAMES[task]
    assert runs[preset]["answers"][task] == {s.id: ours.answers[suite.name, preset, s.id] for s in suite.samples()}


@pytest.mark.parametrize("preset", ["none", "vhr"])
@pytest.mark.parametrize("task", NAMES)
def test_figures_are_those_of_our_runner(runs, ours, task, preset):
    found = dict(runs[preset]["figures"][task])
    found.pop("score")
    expected = {}
    for table in (*ours.summary["tables"], *ours.summary["overall"]):
        if table["suite"] == NAMES[task].name:
            split = "" if table["split"] == "all" else "_" + re.sub(r"\W+", "_", table["split"])
            for metric, cell in table["rows"][preset]["metrics"].items():
                expected[metric + split] = pytest.approx(cell["value"] / 100, abs=1e-6)
    assert len(found) > 15
    assert {name: expected[name] for name in found} == found


def test_the_preset_changes_answers(runs):
    assert runs["none"]["answers"] != runs["vhr"]["answers"]


def test_two_processes_are_one(runs):
    assert runs["vhr in two"]["answers"] == runs["vhr"]["answers"]
    assert runs["vhr in two"]["figures"] == runs["vhr"]["figures"]


def test_the_table_is_printed(runs):
    assert re.search(r"small_pope\s*\|.*\|accuracy\s*\|", runs["vhr"]["printed"])
    assert 0 < runs["vhr"]["errors"]["small_pope"] < 0.2  # over images
