"""Two runs side by side."""

from __future__ import annotations

import json

import pytest

import vlmattn
from vlmattn.errors import InputError, OptionError
from vlmattn.evals.compare import compare
from vlmattn.evals.runner import evaluate
from vlmattn.evals.suites import Chair, Pope, World


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same suites with vhr and pai, and some of them again in bfloat16."""
    folder = tmp_path_factory.mktemp("runs")
    world = World("faint", 0.0, 8)
    quiet = {"say": lambda _: None}
    first = evaluate(
        *vlmattn.load("embedded"), [Pope.on_scenes([world]), Chair.on_scenes([world])], ["vhr", "pai"], folder / "a", "embedded", **quiet
    )  # fmt: skip
    evaluate(
        *vlmattn.load("embedded", dtype="bfloat16"),
        [Pope.on_scenes([world])],
        ["pai"],
        folder / "b",
        "embedded",
        **quiet,
    )
    return folder, first


def test_a_pair_of_presets_has_the_figures_of_the_run_itself(runs):
    folder, result = runs
    found = compare(folder / "a", folder / "a", [("none", "vhr")])
    assert not found.settings
    assert found.only == (0, 0)
    assert {row.suite for row in found.rows} == {"pope", "chair"}
    for row in found.rows:
        (table,) = (t for t in result.summary["overall"] if t["suite"] == row.suite)
        cell = table["rows"]["vhr"]["metrics"][row.metric]
        assert row.first == pytest.approx(table["rows"]["none"]["metrics"][row.metric]["value"], abs=1e-3)
        assert row.second == pytest.approx(cell["value"], abs=1e-3)
        assert row.difference.to_dict() == pytest.approx(cell["difference"], abs=1e-3)
        assert row.p == table["rows"]["vhr"]["mcnemar_p"]
        assert row.changed == table["rows"]["vhr"]["changed"]
    assert any(row.changed for row in found.rows)
    assert all(one["right"] != other["right"] for one, other in found.changed)


def test_what_runs_share_is_compared_and_what_differs_is_named(runs):
    folder, _ = runs
    found = compare(folder / "a", folder / "b")
    assert {row.presets for row in found.rows} == {"none", "pai"}
    assert {row.suite for row in found.rows} == {"pope"}
    assert found.settings["dtype"] == ("float32", "bfloat16")
    assert found.only == (8, 0)  # captions


def test_what_cannot_be_compared_is_said(runs, tmp_path):
    folder, _ = runs
    with pytest.raises(InputError, match="no finished run"):
        compare(folder / "a", tmp_path)
    with pytest.raises(OptionError, match="no preset 'vhr'; it has none, pai"):
        compare(folder / "a", folder / "b", [("vhr", "vhr")])
    for name in ("summary.json", "answers.jsonl"):
        (tmp_path / name).write_bytes((folder / "a" / name).read_bytes())
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    (tmp_path / "answers.jsonl").write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]))
    with pytest.raises(InputError, match=r"answers\.jsonl:2: damaged line"):
        compare(folder / "a", tmp_path)
    other = [json.dumps({**json.loads(line), "prompt": "another question"}) for line in lines]
    (tmp_path / "answers.jsonl").write_text("\n".join(other))
    with pytest.raises(InputError, match="no question in common"):
        compare(folder / "a", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["metrics"]["pope"][0].pop("over")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(InputError, match="another version"):
        compare(tmp_path, tmp_path)


def test_the_command_shows_both_and_writes_json(runs, run, tmp_path):
    folder, _ = runs
    code, out, _ = run(
        "compare", str(folder / "a"), str(folder / "a"), "--pair", "none:vhr", "--out", str(tmp_path / "c.json")
    )
    assert code == 0
    assert "none → vhr" in out
    assert "chair_i" in out
    assert json.loads((tmp_path / "c.json").read_text())["rows"]
    code, _, said = run("compare", str(folder / "a"), str(folder / "a"), "--pair", "none")
    assert code == 2
    assert "FIRST:SECOND" in said
