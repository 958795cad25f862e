"""Tuning: the best setting of a grid by the suite's own direction, on samples that are said, and resumable."""

from __future__ import annotations

import dataclasses
import json

import pytest

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError, UnknownNameError
from vlmattn.evals import asking
from vlmattn.evals.runner import evaluate
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites import Chair, Pope, Which, World
from vlmattn.evals.suites.pope import says_yes
from vlmattn.evals.suites.subset import Subset
from vlmattn.evals.suites.world import EVAL_SEED
from vlmattn.evals.tune import TUNE_SEED, parse_grid, settings_of, tune
from vlmattn.evals.tune import test_once as once
from vlmattn.recipe import Recipe

PAI, VHR = Recipe.of("pai"), Recipe.of("vhr")
WORLD = World("clear", 0.0, 8, TUNE_SEED)
GRID = {"alpha": [10.0, 1.0]}  # the first breaks the model, the second changes nothing


class Inverted(Pope):
    """POPE where the share of wrong answers is the headline."""

    metrics = (
        Metric("wrong", {"fp": 1, "fn": 1}, {"tp": 1, "fp": 1, "tn": 1, "fn": 1}, "wrong answers", better="lower"),
    )


class Undirected(Pope):
    metrics = tuple(metric for metric in Pope.metrics if metric.name == "yes_ratio")


@pytest.fixture(scope="module")
def bundled():
    return vlmattn.load("embedded")


def tuned(bundled, out, suite=None, recipe="vhr", grid=GRID, **options):
    suite = Pope.on_scenes([WORLD]) if suite is None else suite
    return tune(*bundled, suite, recipe, grid, out, "embedded", **{"samples": 24, "say": lambda _: None, **options})


@pytest.fixture(scope="module")
def finished(bundled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    return folder, tuned(bundled, folder)


# --- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("alpha=0.25,0.5", [0.25, 0.5]),
        ("alpha=0:.9:.3", [0.0, 0.3, 0.6, 0.9]),
        ("alpha=0:.95:.3", [0.0, 0.3, 0.6, 0.9]),
        (" alpha = 0, .1:.3:.1 ", [0.0, 0.1, 0.2, 0.3]),
        ("alpha=.5:.5:1", [0.5]),
        ("layers=0:,2:", ["0:", "2:"]),  # a slice is no range
    ],
)
def test_grids_as_typed(text, values):
    (found,) = parse_grid(PAI, [text]).values()
    assert found == values
    assert all(type(value) is type(values[0]) for value in found)


def test_values_have_the_type_of_the_option():
    assert parse_grid(VHR, ["drop_outliers=true,False", "alpha=2"]) == {"drop_outliers": [True, False], "alpha": [2.0]}


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        (["alpha"], InputError, ["sigma=0.25,0.5", "'alpha'"]),
        (["=1"], InputError, ["sigma=0.25,0.5"]),
        (["alpha="], InputError, ["sigma=0.25,0.5"]),
        (["alpha=x"], InputError, ["takes numbers", "'x'"]),
        (["alpha=0:1"], InputError, ["start:stop:step", "'0:1'"]),
        (["alpha=0:1:0"], InputError, ["steps above 0"]),
        (["alpha=1:0:.1"], InputError, ["go up"]),
        (["alpha=0:inf:.1"], InputError, ["takes numbers"]),
        (["alpha=0:.9:1e-9"], OptionError, ["at most 1000"]),
        (["alpha=.1", "alpha=.2"], InputError, ["twice"]),
        (["alpa=.1"], UnknownNameError, ["option of 'pai'", "alpha"]),
    ],
)
def test_bad_grids_are_named(texts, error, words):
    with pytest.raises(error) as caught:
        parse_grid(PAI, texts)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_settings_are_all_combinations_in_order():
    found = settings_of(PAI, {"alpha": [0.1, 0.2], "layers": ["0:", "2:"]})
    assert [(r.interventions[0].alpha, r.interventions[0].layers) for r, _ in found.values()] == [
        (0.1, "0:"), (0.1, "2:"), (0.2, "0:"), (0.2, "2:"),
    ]  # fmt: skip
    assert all(name == recipe.name and "alpha=" in name for name, (recipe, _) in found.items())


@pytest.mark.parametrize(
    ("recipe", "grid", "error", "message"),
    [
        (Recipe.of("vhr+pai"), {"alpha": [0.1]}, OptionError, "one method"),
        (Recipe.of("none"), {"alpha": [0.1]}, OptionError, "one method"),
        (PAI, {"sigma": [0.1]}, UnknownNameError, "unknown option"),
        (PAI, {"alpha": [0.1, 3]}, OptionError, r"within 0\.\.0\.999, got 3"),
        (PAI, {"alpha": [0.1, 0.1]}, OptionError, "twice"),
        (PAI, {"alpha": []}, OptionError, "at least one"),
        (PAI, {}, OptionError, "at least one"),
        (PAI, {"alpha": [i / 2000 for i in range(1001)]}, OptionError, "1001 settings"),
    ],
)
def test_bad_settings_are_refused(recipe, grid, error, message):
    with pytest.raises(error, match=message):
        settings_of(recipe, grid)


# --- validation samples ----------------------------------------------------------------------------------------------


def test_a_subset_has_the_samples_and_scores_of_its_suite():
    suite = Chair.on_scenes([World("clear", 0, 4), World("faint", 0, 4)])
    ids = ["faint/2", "clear/1"]
    part = Subset(suite, ids)
    assert [sample.id for sample in part.samples()] == ["clear/1", "faint/2"]
    assert {(sample.condition, sample.splits) for sample in part.samples()} == {("validation", ("validation",))}
    assert (part.name, part.metrics, part.fields, part.max_new_tokens) == ("chair", suite.metrics, suite.fields, 48)
    sample, whole = part.samples()[0], suite.samples()[1]
    assert part.score(sample, "a cup .") == suite.score(whole, "a cup .")
    assert part.expected(sample) == suite.expected(whole)
    assert part.settings["validation"] == ["clear/1", "faint/2"]
    with pytest.raises(InputError, match="no sample 'dim/1'"):
        Subset(suite, ["dim/1"])


def test_draws_follow_from_the_seed():
    suite = Pope.on_scenes([WORLD])

    def ids(count, seed):
        return {sample.id for sample in Subset.draw(suite, count, seed).samples()}

    assert len(ids(10, 1)) == 10
    assert ids(10, 1) == ids(10, 1) != ids(10, 2)
    assert ids(5, 1) < ids(10, 1), "the first of one order"
    assert ids(10, 1) != {sample.id for sample in suite.samples()[:10]}
    for count in (0, len(suite.samples()) + 1):
        with pytest.raises(OptionError, match=f"within 1..{len(suite.samples())}"):
            Subset.draw(suite, count, 1)


def test_validation_scenes_are_not_those_of_the_evaluation():
    assert TUNE_SEED != EVAL_SEED
    tests = World("clear", 0.0, 8)
    assert tests.seed == EVAL_SEED
    assert all(list(WORLD.image(0)[0].getdata()) != list(tests.image(i)[0].getdata()) for i in range(8))


# --- tuning ----------------------------------------------------------------------------------------------------------


def test_the_best_setting_wins_whatever_its_place(bundled, finished, tmp_path):
    folder, best = finished
    assert best.chosen.name == best.recipe.name == "vhr[alpha=1.0]"
    broken, kept = best.settings
    assert kept.value == best.none > broken.value
    assert broken.changed > 0 == kept.changed
    other = tuned(bundled, tmp_path, grid={"alpha": [1.0, 10.0]})
    assert other.chosen.name == best.chosen.name
    assert [s.value for s in other.settings] == [s.value for s in best.settings][::-1]
    assert json.loads((folder / "tune.json").read_text())["chosen"] == "vhr[alpha=1.0]"


def test_lower_may_be_better(bundled, finished, tmp_path):
    found = tuned(bundled, tmp_path, suite=Inverted.on_scenes([WORLD]))
    assert (found.metric, found.better, found.chosen.name) == ("wrong", "lower", "vhr[alpha=1.0]")
    assert found.chosen.value == pytest.approx(100 - finished[1].chosen.value, abs=1e-3)
    assert found.chosen.value < found.settings[0].value


def test_ties_go_to_the_first_and_are_said(bundled, tmp_path):
    found = tuned(bundled, tmp_path, recipe="pai", grid={"alpha": [0.002, 0.001]})
    assert found.chosen.name == "pai[alpha=0.002]"
    assert len(found.tied) == 2
    assert "No setting changed an answer" in found.notes()[1]
    half = tuned(bundled, tmp_path / "half", grid={"alpha": [10.0, 1.0, 1.001]})
    assert half.chosen.name == "vhr[alpha=1.0]"
    assert half.notes()[1].startswith("vhr[alpha=1.0], vhr[alpha=1.001] are equally good")


def test_the_record_follows_from_the_answers(finished):
    folder, found = finished
    record = json.loads((folder / "tune.json").read_text())
    suite = Pope.on_scenes([WORLD])
    truth = {sample.id: sample.truth for sample in suite.samples()}
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert record["samples"] == list(found.samples)
    assert len(record["samples"]) == len(set(record["samples"])) == 24
    for setting in record["settings"]:
        said = {line["id"]: line["answer"] for line in lines if line["preset"] == setting["name"]}
        assert set(said) == set(record["samples"]), "every setting sees the same samples"
        right = sum(truth[i] == says_yes(answer) for i, answer in said.items())
        assert setting["value"] == pytest.approx(100 * right / 24, abs=1e-3)
        assert setting["n"] == 24
        assert setting["fired"] > 0 or setting["options"]["alpha"] == 1
    assert (record["metric"], record["better"], record["seed"]) == ("accuracy", "higher", TUNE_SEED)
    assert record["grid"] == GRID
    assert record["suite_settings"]["scenes"][0]["seed"] == TUNE_SEED
    assert record["versions"]["vlmattn"] == vlmattn.__version__
    assert "chose the setting" in record["notes"][0]
    assert "flatter it" in record["notes"][0]
    assert not list(folder.glob("*.partial"))


def test_the_recipe_can_be_evaluated(bundled, finished, tmp_path):
    folder, found = finished
    assert Recipe.of(str(folder / "tuned.yaml")) == found.recipe
    suite = Pope.on_scenes([World("clear", 0.0, 2)])
    result = evaluate(*bundled, [suite], [str(folder / "tuned.yaml"), PAI], tmp_path, "embedded", say=lambda _: None)
    assert list(result.summary["tables"][0]["rows"]) == ["none", "vhr[alpha=1.0]", "pai"]


def test_a_finished_run_is_not_asked_again(bundled, finished, monkeypatch):
    folder, found = finished
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(asking, "answer", lambda *_: pytest.fail("asked again"))
    assert tuned(bundled, folder) == found
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("answered", [1, 2])
def test_a_run_that_stops_goes_on_with_all_it_knew(bundled, finished, tmp_path, monkeypatch, answered):
    """Stopped after ``answered`` presets: the rest is asked, and what the first ones reported is still there."""
    folder, found = finished
    calls = []

    def some(*arguments):
        if len(calls) == answered:
            raise KeyboardInterrupt
        calls.append(arguments)
        return ask(*arguments)

    ask = asking.answer
    monkeypatch.setattr(asking, "answer", some)
    with pytest.raises(KeyboardInterrupt):
        tuned(bundled, tmp_path)
    assert not (tmp_path / "tuned.yaml").exists()
    kept = [json.loads(line) for line in (tmp_path / "journal-0.jsonl").read_text().splitlines()]
    assert len(kept) == answered
    answered, calls = 99, []
    assert tuned(bundled, tmp_path) == found
    assert len(calls) == 3 - len(kept)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["reports"]) == ["vhr[alpha=10.0]", "vhr[alpha=1.0]"]
    for batch in kept:
        assert summary["cost"][batch["preset"]]["tokens_per_second"] == round(batch["tokens"] / batch["seconds"], 2)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}


def test_a_choice_is_tested_once_on_samples_of_other_images(bundled, tmp_path):
    suite = Pope.on_scenes([WORLD])
    few = tuned(bundled, tmp_path / "few", suite=suite, samples=4)
    tested = once(*bundled, suite, "vhr", few, tmp_path / "few", "embedded", say=lambda _: None)
    images = {sample.id: sample.image_id for sample in suite.samples()}
    asked = {key for _, _, key in tested.answers}
    assert asked
    assert not {images[key] for key in asked} & {images[key] for key in few.samples}
    assert asked | set(few.samples) < set(images)  # what shares an image with a validation sample is left out
    assert list(tested.summary["recipes"]) == ["none", "vhr", few.recipe.name]
    assert {table["split"] for table in tested.summary["tables"]} == {"random", "popular", "adversarial"}
    again = once(*bundled, suite, "vhr", few, tmp_path / "few", "embedded", say=lambda _: None)
    assert again.summary["tables"] == tested.summary["tables"]
    other = dataclasses.replace(few, recipe=Recipe.of("vhr", alpha=3.0))
    with pytest.raises(StateError, match=r"were looked at with none, vhr, vhr\[alpha.*second choice"):
        once(*bundled, suite, "vhr", other, tmp_path / "few", "embedded")
    every = dataclasses.replace(few, samples=tuple(images))
    with pytest.raises(OptionError, match="take fewer --shots"):
        once(*bundled, suite, "vhr", every, tmp_path / "every", "embedded")


def test_other_settings_are_refused_and_restart_helps(bundled, finished, tmp_path):
    folder, _ = finished
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(StateError, match=r"other settings \(recipes\)"):
        tuned(bundled, tmp_path, grid={"alpha": [2.0]})
    with pytest.raises(StateError, match=r"other settings \(suites\)"):
        tuned(bundled, tmp_path, seed=TUNE_SEED + 1)
    assert tuned(bundled, tmp_path, grid={"alpha": [2.0]}, restart=True).chosen.name == "vhr[alpha=2.0]"


def test_what_cannot_be_tuned_is_refused_before_anything_is_written(bundled, tmp_path):
    suite = Which(WORLD, (2,))
    for options, message in (
        ({"samples": 99}, "within 1..8"),
        ({"recipe": "vhr+pai"}, "one method"),
        ({"grid": {"alpha": [99]}}, r"within 0\.\.10"),
        ({"grid": {"layers": ["90:"]}}, "selects none of the layers"),
        ({"suite": Undirected.on_scenes([WORLD])}, "no better side"),
    ):
        with pytest.raises(OptionError, match=message):
            tuned(bundled, tmp_path / "out", **{"suite": suite, "samples": 8, **options})
    assert not (tmp_path / "out").exists()


def test_methods_get_the_processor(bundled, tmp_path, monkeypatch):
    model, processor = bundled
    seen = []
    applied = vlmattn.applied

    def spy(*arguments, **options):
        seen.append(options.get("processor"))
        return applied(*arguments, **options)

    monkeypatch.setattr(vlmattn, "applied", spy)
    evaluate(model, processor, [Which(WORLD, (2,))], ["pai"], tmp_path, "embedded", say=lambda _: None)
    assert seen
    assert all(one is processor for one in seen)
