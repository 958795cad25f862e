"""The page on many presets: every figure is the summary's, and words follow from figures."""

from __future__ import annotations

import copy
import json
import re
import sys

import pytest

import vlmattn
from tools.results import survey
from tools.results.controls import against_controls
from tools.results.survey import (
    bench_costs,
    comparisons,
    controls_section,
    findings,
    joined,
    page,
    read_run,
    read_tuned,
    table_of_presets,
    times,
    tuned_section,
)
from vlmattn.errors import InputError
from vlmattn.evals.bench import bench, encode
from vlmattn.evals.compare import Compared
from vlmattn.evals.report import change
from vlmattn.evals.runner import evaluate
from vlmattn.evals.stats import Interval
from vlmattn.evals.suites import Chair, Pope, Which, World
from vlmattn.evals.timing import write_csv
from vlmattn.evals.tune import tune
from vlmattn.recipe import Recipe
from vlmattn.registry import all_presets


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    world = World("faint", 0.0, 8)
    suites = [Pope.on_scenes([world]), Chair.on_scenes([world]), Which(world, (2, 3))]
    evaluate(
        *vlmattn.load("embedded"), suites, ["vhr", "pai"], folder, "embedded", say=lambda _: None, command="typed this"
    )
    return folder


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """A preset, and its control in another run on the same questions."""
    folder = tmp_path_factory.mktemp("controlled")
    world = World("faint", 0.0, 4)
    suites = [Pope.on_scenes([world]), Chair.on_scenes([world])]
    for name, presets in (("first", ["vhr", Recipe.of("vhr", alpha=3.0)]), ("second", ["heads_random_half", "pai"])):
        evaluate(*vlmattn.load("embedded"), suites, presets, folder / name, "embedded", say=lambda _: None)
    return folder


@pytest.fixture
def summary(run):
    return copy.deepcopy(read_run(run))


def cell(summary, column, preset):
    table = summary["overall"][column]
    return table["rows"][preset]["metrics"][summary["metrics"][table["suite"]][0]["name"]]


def set_difference(summary, column, preset, value, low, high):
    cell(summary, column, preset)["difference"] = {"value": value, "low": low, "high": high}


def rows_of(summary):
    lines = table_of_presets(summary, times(summary)).splitlines()
    assert len({line.count("|") for line in lines}) == 1, "a table that renders"
    return {line.split("|")[1].strip().strip("`"): [c.strip() for c in line.split("|")[2:-1]] for line in lines[2:]}


def test_overall_figures_are_means_over_splits(summary):
    by_split = {t["split"]: t for t in summary["tables"] if t["suite"] == "pope"}
    (whole,) = (t for t in summary["overall"] if t["suite"] == "pope")
    for preset in ("none", "vhr", "pai"):
        values = [t["rows"][preset]["metrics"]["accuracy"]["value"] for t in by_split.values()]
        assert whole["rows"][preset]["metrics"]["accuracy"]["value"] == pytest.approx(sum(values) / 3, abs=1e-3)
    assert whole["samples"] < sum(t["samples"] for t in by_split.values()), "shared questions are asked once"
    assert whole["rows"]["vhr"]["changed"] <= whole["samples"]
    (captions,) = (t for t in summary["tables"] if t["suite"] == "chair")
    assert {**summary["overall"][1], "split": "captions"} == captions


def part(summary, *gone):
    """The summary as a run without some presets would have it."""
    found = copy.deepcopy(summary)
    for kept in (*(table["rows"] for table in found["overall"]), *(found[n] for n in ("recipes", "reports", "cost"))):
        for preset in gone:
            kept.pop(preset, None)
    return found


def test_runs_of_other_presets_are_one_page(summary):
    first, second = part(summary, "pai"), {**part(summary, "vhr"), "command": "typed that"}
    whole = joined([first, second])
    assert {**whole, "command": "typed this"} == {**summary, "tables": first["tables"]}
    assert "- answers: `typed this`, `typed that`" in page(whole, "made by")
    assert [list(table["rows"]) for table in whole["overall"]] == [["none", "vhr", "pai"]] * 3
    assert joined([summary]) == summary
    for name, value in (("weights", "others"), ("seed", 5), ("suites", {})):
        with pytest.raises(InputError, match=f"their {name} are different"):
            joined([first, {**second, name: value}])
    second["overall"][0]["rows"]["none"]["metrics"]["accuracy"]["value"] += 1
    with pytest.raises(InputError, match="does not say the same"):
        joined([first, second])


def test_each_preset_has_a_row_with_its_figures(summary):
    rows = rows_of(summary)
    assert list(rows) == ["none", "vhr", "pai"]
    assert rows["vhr"][:3] == ["vhr", "[2412.13949](https://arxiv.org/abs/2412.13949)", "paper text"]
    for column in range(3):
        shown, found = rows["vhr"][3 + column], cell(summary, column, "vhr")
        assert shown.startswith(f"{found['value']:.1f}<br>")
        assert change(found) in shown
        assert rows["none"][3 + column] == f"{cell(summary, column, 'none')['value']:.1f}"
    assert rows["vhr"][6] == str(summary["reports"]["vhr"]["fired"]["vhr"])
    own, base = (summary["cost"][name]["seconds_per_sample"] for name in ("vhr", "none"))
    assert rows["vhr"][7] == f"{own / base:.2f}x"
    changed = summary["overall"][0]["rows"]["vhr"]["changed"]
    assert rows["vhr"][3].endswith(f", {changed} changed")


def test_bold_and_verdict_follow_the_interval_and_the_metrics_side(summary):
    for column, better in ((0, "better"), (1, "worse")):  # accuracy, chair_i
        set_difference(summary, column, "vhr", 3.0, 0.1, 6.0)
        assert f"**+3.0 [+0.1, +6.0]** {better}" in rows_of(summary)["vhr"][3 + column]
        set_difference(summary, column, "vhr", 3.0, 0.0, 6.0)
        assert "<br>+3.0 [+0.0, +6.0]<br>" in rows_of(summary)["vhr"][3 + column]


def neutral(summary):
    """Every difference of every metric is about 0."""
    for table in summary["overall"]:
        for preset, row in table["rows"].items():
            for found in row["metrics"].values() if preset != "none" else ():
                found["difference"] = {"value": 0.0, "low": -1.0, "high": 1.0}


def test_findings_name_who_helps_and_who_hurts(summary):
    neutral(summary)
    plain = findings(summary).split("By the other")[0]
    assert "- helps: none of them" in plain
    assert "- hurts: none of them" in plain
    assert "- neither: `vhr`, `pai`" in plain
    set_difference(summary, 0, "vhr", 3.0, 0.1, 6.0)
    set_difference(summary, 1, "vhr", 3.0, 0.1, 6.0)
    text = findings(summary).split("By the other")[0]
    assert "- helps: `vhr` (pope faint: accuracy)" in text
    assert "- hurts: `vhr` (chair faint: chair_i)" in text
    assert "- neither: `pai`\n" in text


def test_a_gain_names_its_price(summary):
    """Who names fewer things names fewer wrong ones."""
    neutral(summary)
    set_difference(summary, 1, "vhr", -3.0, -6.0, -0.1)
    assert "- helps: `vhr` (chair faint: chair_i)\n" in findings(summary)
    recall = summary["overall"][1]["rows"]["vhr"]["metrics"]["recall"]
    recall["difference"] = {"value": -9.0, "low": -12.0, "high": -6.0}
    assert "- helps: `vhr` (chair faint: chair_i, but recall worse)\n" in findings(summary)
    assert "`vhr` (chair faint: chair_i, but recall worse)" in controls_section(summary, {})
    set_difference(summary, 1, "vhr", 3.0, 0.1, 6.0)
    assert "- hurts: `vhr` (chair faint: chair_i)\n" in findings(summary)


def test_comparisons_are_counted_and_chance_is_said(summary):
    made = comparisons(summary)
    sided = sum(bool(m["better"]) for table in summary["overall"] for m in summary["metrics"][table["suite"]])
    assert len(made) == 2 * sided
    assert sum(c.headline for c in made) == 6
    for column in range(3):
        for preset in ("vhr", "pai"):
            set_difference(summary, column, preset, 1.0, -1.0, 3.0)
            summary["overall"][column]["rows"][preset] |= {"changed": 2, "mcnemar_p": 0.02}
    text = findings(summary)
    assert "Headline metrics: 6 comparisons with `none`, 6 of them with an answer changed; 0 intervals" in text
    assert "about 0.3 would by chance alone" in text
    assert "0.05 / 6 = 0.0083 (Bonferroni): none of them." in text
    summary["overall"][2]["rows"]["pai"] |= {"mcnemar_p": 0.001}
    assert "(Bonferroni): `pai` (which faint, interval with 0)." in findings(summary)


def test_what_never_fired_is_said_and_not_called_neutral(summary):
    summary["reports"]["vhr"]["fired"]["vhr"] = 0
    assert rows_of(summary)["vhr"][6] == "never fired"
    text = findings(summary)
    assert "say nothing about it: `vhr`" in text
    assert not re.search(r"neither: .*vhr", text)
    summary["reports"]["vhr"]["fired"] = {"var": 0, "pai": 4}
    assert rows_of(summary)["vhr"][6] == "var: never fired, pai: 4"


def added(summary, name, recipe):
    """Another preset in the summary, with the figures of pai."""
    summary["recipes"][name] = recipe
    for part in (summary["reports"], summary["cost"], *(table["rows"] for table in summary["overall"])):
        part[name] = part["pai"]


def test_own_settings_and_compositions_have_origins(summary):
    for name, methods in (("vhr+pai", ["vhr", "pai"]), ("pai[alpha=0.3]", ["pai"])):
        recipe = {"interventions": [{"method": method} for method in methods]}
        added(summary, name, recipe)
    rows = rows_of(summary)
    assert rows["vhr+pai"][0] == "vhr + pai"
    assert rows["vhr+pai"][2] == "paper text + golden"
    assert rows["pai[alpha=0.3]"][2] == "own settings"


def test_decoding_rules_have_origins(summary):
    for name in ("vcd", "vhr+vcd"):
        added(summary, name, Recipe.of(name).record())
    added(summary, "contrast", {"interventions": [], "decoding": "ContrastiveDecoding(...)"})
    rows = rows_of(summary)
    assert rows["vcd"][:3] == ["vcd", "[2311.16922](https://arxiv.org/abs/2311.16922)", "golden"]
    assert rows["vhr+vcd"][0] == "vhr + vcd"
    assert rows["contrast"][:3] == ["a rule made by hand", "", "own settings"]


def test_the_page_says_how_it_was_made(run, tmp_path, monkeypatch):
    out = tmp_path / "docs" / "results.md"
    monkeypatch.setattr(sys, "argv", ["survey", "--run", str(run), "--out", str(out)])
    survey.main()
    text = out.read_text()
    assert not list(out.parent.glob("*.partial"))
    summary = read_run(run)
    for word in (
        "`typed this`",
        f"--run {run}",
        summary["weights"],
        f"torch {summary['versions']['torch']}",
        "seed of the bootstrap: 0",
        '"seed": 12',
        f"{summary['overall'][0]['samples']} questions about 8 images",
        table_of_presets(summary, times(summary)),
        findings(summary),
        "Many comparisons",
    ):
        assert word in text
    assert page(summary, "x") == page(summary, "x")
    (absent,) = re.findall("- presets of the library that were not run: (.+)", text)
    assert set(absent.replace("`", "").split(", ")) == set(all_presets()) - {"vhr", "pai"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot read", "vlmattn eval first"]),
        ("{", ["not valid JSON"]),
        ("[]", ["not of this version"]),
        ('{"tables": []}', ["overall", "run vlmattn eval again"]),
    ],
)
def test_runs_without_figures_are_refused(tmp_path, monkeypatch, capsys, content, words):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(InputError) as caught:
        read_run(tmp_path)
    assert all(word in str(caught.value) for word in words)
    monkeypatch.setattr(sys, "argv", ["survey", "--run", str(tmp_path), "--out", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit) as stop:
        survey.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "page.md").exists()


def test_times_of_a_busy_machine_are_left_out(run, summary, tmp_path, monkeypatch):
    out = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["survey", "--run", str(run), "--out", str(out)])
    survey.main()
    assert "| fired | cost |" in out.read_text()
    assert "not a benchmark" in out.read_text()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--without-times"])
    survey.main()
    assert "| fired |\n" in out.read_text()
    assert "Cost:" not in out.read_text()
    assert " s a sample" not in out.read_text()


def test_costs_are_those_of_a_bench(run, tmp_path, monkeypatch):
    model, processor = vlmattn.load("embedded")
    inputs = encode(processor, model, World("faint", 0.0, 1).image(0)[0], "Describe the image.")
    rows = bench(model, inputs, ["vhr", "opera"], rounds=2, new_tokens=4, processor=processor)
    write_csv(tmp_path / "bench.csv", rows)
    costs, settings = bench_costs([tmp_path / "bench.csv"])
    assert set(costs) == {"none", "vhr", "opera"}
    by = {(row["what"], row["candidate"]): row for row in rows}
    first, step = by["first token", "vhr"], by["decode step", "vhr"]
    assert costs["vhr"] == "<br>".join(
        f"{label} {row['ratio']:.2f}x [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"
        for label, row in (("first token", first), ("step", step))
    )
    assert costs["none"].startswith(f"first token {by['first token', 'none']['median']:.0f} ms<br>step ")
    assert costs["opera"].startswith("4 tokens "), "it has no first token of its own"
    assert f"{first['prompt_tokens']} tokens, {first['image_tokens']} of them" in settings
    assert "2 rounds" in settings
    out = tmp_path / "page.md"
    monkeypatch.setattr(
        sys, "argv", ["survey", "--run", str(run), "--out", str(out), "--bench", str(tmp_path / "bench.csv")]
    )
    survey.main()
    assert costs["vhr"] in out.read_text()
    assert settings in out.read_text()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="not a table of vlmattn bench"):
        bench_costs([tmp_path / "other.csv"])


def test_presets_are_held_against_their_controls(controlled):
    runs = [controlled / "first", controlled / "second"]
    parts = [read_run(run) for run in runs]
    found = against_controls(runs, parts)
    assert set(found) == {("vhr", "heads_random_half"), ("vhr[alpha=3.0]", "heads_random_half")}
    rows = found["vhr", "heads_random_half"]
    assert [(row.suite, row.metric) for row in rows] == [("pope", "accuracy"), ("chair", "chair_i")], "headlines only"
    summary = joined(parts)
    for row, table in zip(rows, summary["overall"], strict=True):
        values = {name: table["rows"][name]["metrics"][row.metric]["value"] for name in ("vhr", "heads_random_half")}
        assert row.difference.value == pytest.approx(values["vhr"] - values["heads_random_half"], abs=1e-3)
    text = controls_section(summary, found)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert f"{rows[0].difference.value:+.1f} (no interval)" in lines[2], "four images"
    assert against_controls([runs[0] / "summary.json", runs[1]], parts) == {}, "no answers of vhr"


@pytest.mark.parametrize(
    ("beaten", "kind"), [(True, "than every control"), (False, "so no claim"), (None, "without a control")]
)
def test_a_claim_needs_a_gain_over_the_control(summary, beaten, kind):
    neutral(summary)
    set_difference(summary, 0, "vhr", 3.0, 0.1, 6.0)
    low = 0.5 if beaten else -0.5
    row = Compared("pope", "faint", "x → vhr", "accuracy", "higher", 80, 83, Interval(3.0, low, 6.0), 0.01, 50, 7)
    found = {} if beaten is None else {("vhr", "heads_random_half"): [row]}
    (line,) = (line for line in controls_section(summary, found).splitlines() if "`vhr` (pope faint: accuracy)" in line)
    assert kind in line


def test_a_control_that_gains_is_no_preset_that_helps(summary):
    added(summary, "heads_random_half", Recipe.of("heads_random_half").record())
    neutral(summary)
    set_difference(summary, 0, "heads_random_half", 3.0, 0.1, 6.0)
    (line,) = (line for line in controls_section(summary, {}).splitlines() if "heads_random_half" in line)
    assert line.startswith("- controls that are better than `none`")


def test_what_was_tuned_is_said(tmp_path):
    model, processor = vlmattn.load("embedded")
    suite = Pope.on_scenes([World("faint", 0.0, 4, seed=13)])
    tuned = tune(
        model,
        processor,
        suite,
        "vhr",
        {"alpha": [1.5, 3.0]},
        tmp_path,
        "embedded",
        12,
        say=lambda _: None,
        command="tuned by",
    )
    text = tuned_section([read_tuned(tmp_path / "tune.json")])
    assert f"| `vhr` | alpha = 1.5, 3.0 | 12 of pope, seed 13 | {tuned.none:.1f} | `{tuned.chosen.name}` |" in text
    assert f"{tuned.chosen.value:.1f} accuracy" in text
    assert "- `tuned by`" in text
    (tmp_path / "tune.json").write_text("[]")
    with pytest.raises(InputError, match="run vlmattn tune first"):
        read_tuned(tmp_path / "tune.json")


def test_old_answers_give_a_new_summary(run):
    """A run of an earlier version needs no new answers: the same call writes what the page needs."""
    assert {"titles", "metrics", "overall", "command"} <= json.loads((run / "summary.json").read_text()).keys()
    assert not {"titles", "metrics", "overall", "command"} & json.loads((run / "settings.json").read_text()).keys()
