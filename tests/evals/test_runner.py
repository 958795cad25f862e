"""Runs: the same answers however often they are interrupted, and figures that follow from the answers."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from killing import kill_and_compare
from rich.console import Console

import vlmattn
from vlmattn.errors import StateError
from vlmattn.evals.journal import Journal
from vlmattn.evals.processes import Processes
from vlmattn.evals.report import markdown_tables, notes, terminal_tables
from vlmattn.evals.report.page import html_report
from vlmattn.evals.runner import evaluate
from vlmattn.evals.scoring import Scored
from vlmattn.evals.suites import Chair, Pope, Which, World


@pytest.fixture(scope="module")
def bundled():
    return vlmattn.load("embedded")


def small_suites():
    world = World("faint", 0.0, 6)
    return [Pope.on_scenes([world]), Chair.on_scenes([world])]


@pytest.fixture(scope="module")
def finished(bundled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, evaluate(
        *bundled, small_suites(), ["none", "vhr", "pai"], folder, "embedded", batch_size=20, say=lambda _: None
    )


def test_the_summary_follows_from_the_answers(finished):
    folder, result = finished
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == len(result.answers) == 3 * sum(len(s.samples()) for s in small_suites())
    summary = json.loads((folder / "summary.json").read_text())
    table = next(t for t in summary["tables"] if t["split"] == "adversarial")
    pope = small_suites()[0]
    members = [s for s in pope.samples() if "adversarial" in s.splits]
    right = sum((result.answers["pope", "vhr", s.id] == "yes") == s.truth for s in members)
    assert table["rows"]["vhr"]["metrics"]["accuracy"]["value"] == pytest.approx(100 * right / len(members), abs=1e-3)
    yes = sum(result.answers["pope", "vhr", s.id] == "yes" for s in members)
    assert table["rows"]["vhr"]["metrics"]["yes_ratio"]["value"] == pytest.approx(100 * yes / len(members), abs=1e-3)
    assert {"recipes", "versions", "seed", "hardware", "decoding"} <= summary.keys()
    assert summary["reports"]["vhr"]["fired"]["vhr"] > 0
    assert not list(folder.glob("*.partial"))


def test_presets_change_answers(finished):
    _, result = finished
    changed = [t["rows"]["vhr"]["changed"] for t in result.summary["tables"]]
    assert sum(changed) > 0


def test_a_wrapped_model_is_refused_before_it_answers(tmp_path):
    model, processor = vlmattn.load("embedded")
    vlmattn.wrap(model, "vhr")
    with pytest.raises(StateError, match="wrapped with 'vhr'"):
        evaluate(model, processor, small_suites(), ["none"], tmp_path / "run", "embedded")
    assert not (tmp_path / "run").exists()


def test_restart_leaves_nothing_of_the_earlier_run(finished, tmp_path):
    folder, _ = finished
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with Journal(tmp_path, {"other": True}, Processes(), restart=True) as journal:
        assert journal.done == {}
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "journal.jsonl"}


def test_only_the_idle_method_of_a_composition_is_named(finished):
    _, result = finished
    summary = {**result.summary, "reports": {"var+pai": {"fired": {"var": 0, "pai": 3}}}}
    assert notes(replace(result, summary=summary)) == [
        "var+pai: var never found anything to do on this model and had no part in the answers.",
        *notes(result),
    ]


def test_other_settings_are_refused(bundled, finished):
    folder, _ = finished
    with pytest.raises(StateError, match=r"other settings \(batch_size\).*--restart"):
        evaluate(
            *bundled, small_suites(), ["none", "vhr", "pai"], folder, "embedded", batch_size=10, say=lambda _: None
        )


def test_answers_of_other_weights_are_not_resumed(finished):
    folder, _ = finished
    model, processor = vlmattn.load("embedded")
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    with pytest.raises(StateError, match=r"other settings \(weights\)"):
        evaluate(
            model,
            processor,
            small_suites(),
            ["none", "vhr", "pai"],
            folder,
            "embedded",
            batch_size=20,
            say=lambda _: None,
        )


def test_the_journal_has_what_methods_did_and_took(finished):
    folder, result = finished
    batches = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert {path.name for path in folder.glob("journal*")} == {"journal.jsonl"}
    for preset in ("vhr", "pai"):
        own = [batch for batch in batches if batch["preset"] == preset]
        assert result.summary["reports"][preset]["fired"] == {preset: sum(b["report"]["fired"][preset] for b in own)}
        assert result.summary["cost"][preset]["tokens_per_second"] > 0
    assert sum(batch["tokens"] for batch in batches) > len(result.answers)


@pytest.mark.parametrize("cut", [1, 300, 1500, 2500])
def test_cut_off_runs_lose_nothing_and_repeat_nothing(bundled, finished, tmp_path, cut):
    folder, result = finished
    (tmp_path / "settings.json").write_bytes((folder / "settings.json").read_bytes())
    whole = (folder / "journal.jsonl").read_bytes()
    left = whole[: len(whole) - cut]  # as a kill in the middle of a write leaves it
    begun = left.rindex(b"\n", 0, len(left) // 2) + 1
    (tmp_path / "journal-0.jsonl").write_bytes(left[:begun])  # two processes wrote, now there is one
    (tmp_path / "journal-1.jsonl").write_bytes(left[begun:])
    again = evaluate(
        *bundled, small_suites(), ["none", "vhr", "pai"], tmp_path, "embedded", batch_size=20, say=lambda _: None
    )
    assert again.answers == result.answers
    assert (tmp_path / "answers.jsonl").read_bytes() == (folder / "answers.jsonl").read_bytes()
    for name in ("tables", "reports"):
        assert again.summary[name] == result.summary[name]


@pytest.mark.slow
def test_killed_twice_in_two_processes_equals_one_that_was_left_alone(tmp_path):
    """The real thing, in small; ``python tests/evals/killing.py`` does it with 10,000 questions."""
    killed, whole = kill_and_compare(tmp_path, questions=240, batch=8)
    assert killed == whole


def test_batching_does_not_change_answers(bundled, finished, tmp_path):
    _, result = finished
    single = evaluate(
        *bundled, [small_suites()[1]], ["none", "vhr"], tmp_path, "embedded", batch_size=1, say=lambda _: None
    )
    assert all(result.answers[key] == text for key, text in single.answers.items())


def test_reports_show_every_preset(finished):
    _, result = finished
    page = html_report(result)
    assert page.count("<svg") == 2 + 2  # charts and costs
    assert not re.search(r"""(src|href)\s*=\s*["']?(http|//)|<script|<link|@import|url\(http""", page), (
        "must work offline"
    )
    for word in ("vhr", "pai", "adversarial", "chair_i", "data:image/png;base64"):
        assert word in page
    assert "| adversarial (36) | none |" in markdown_tables(result)
    assert [note[:35] for note in notes(result)] == ["No interval: fewer than 10 images, "], "there are six"


def test_many_presets_are_drawn_as_differences(finished):
    _, result = finished
    names = [f"vhr{n}" for n in range(9)]
    summary = copy.deepcopy(result.summary)
    summary["recipes"] |= dict.fromkeys(names, summary["recipes"]["vhr"])
    for table in (*summary["tables"], *summary["overall"]):
        table["rows"] |= dict.fromkeys(names, table["rows"]["vhr"])
    answers = {**result.answers}
    for (suite, preset, sample), text in result.answers.items():
        if preset == "vhr":
            answers |= {(suite, name, sample): text for name in names}
    scored = {suite.name: Scored(suite, list(summary["recipes"]), answers) for suite in result.suites}
    summary["cost"] |= dict.fromkeys(names, summary["cost"]["vhr"])
    page = html_report(replace(result, summary=summary, answers=answers, scored=scored))
    assert page.count("<svg") == 4
    assert "difference to none (higher is better)" in page
    assert "difference to none (lower is better)" in page
    assert "difference to none (" not in html_report(result)


def test_an_edit_that_never_fires_is_said(bundled, tmp_path):
    with pytest.warns(UserWarning, match="cannot fire"):
        result = evaluate(
            *bundled, [Which(World("clear", 0, 6), (2,))], ["var"], tmp_path, "embedded", say=lambda _: None
        )
    assert "var never found anything to do" in notes(result)[0]
    assert result.summary["tables"][0]["rows"]["var"]["changed"] == 0


def test_titles_in_the_terminal_are_no_markup(finished, monkeypatch, capsys):
    _, result = finished
    monkeypatch.setattr(type(result.suites[0]), "title", "[bold]a name[/nothing]")
    Console(width=120).print(terminal_tables(result))
    assert "[bold]a name[/nothing]" in capsys.readouterr().out
