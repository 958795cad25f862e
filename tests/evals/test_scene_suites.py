"""AMBER, MME and MMHal on generated scenes: truth recomputed from the scenes, answerers that know or only guess."""

from __future__ import annotations

import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from vlmattn.embedded import FOLDER
from vlmattn.embedded.scenes import _COUNT_P, COLOURS, PREFERRED_COLOUR, Scene, make_scene
from vlmattn.errors import OptionError, UnknownNameError
from vlmattn.evals.suites import World, all_suites, make_suite
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.questions import read_colour, read_number
from vlmattn.evals.suites.world import MOST_THINGS, USUAL_COUNT, co_occurrence

WORLDS = [World("clear", 0.0, 24), World("faint", 1.0, 24)]
NEW = ("amber", "amber_questions", "mme", "mmhal")
WORDS = ("zero", "one", "two", "three", "four", "five")


def scene_of(sample: Sample, things: int | None = None) -> Scene:
    """Drawn anew, without the world."""
    visibility, broken = ("clear", 0.0) if sample.condition == "clear" else ("faint", 1.0)
    return make_scene(12, int(sample.image_id), visibility, broken, things)[0]


def say(yes: bool) -> str:
    return "yes" if yes else "no"


def knowing(sample: Sample) -> str:
    """The right answer, from the scene and the words of the question alone."""
    if sample.prompt == "Describe the image.":
        return " and ".join(f"a {name}" for name in scene_of(sample, 3).categories)
    scene = scene_of(sample)
    colours = {thing.category: thing.colour for thing in scene.things}
    if found := re.fullmatch(r"Is there an? (\w+) in the image\?", sample.prompt):
        return say(found[1] in colours)
    if found := re.fullmatch(r"Is the (\w+) on the (left|right) side\?", sample.prompt):
        (x,) = (thing.x for thing in scene.things if thing.category == found[1])
        return say((x < 28) == (found[2] == "left"))
    if found := re.fullmatch(r"Is the (\w+) (\w+)\?", sample.prompt):
        assert found[2] in COLOURS
        return say(colours[found[1]] == found[2])
    if found := re.fullmatch(r"What color is the (\w+)\?", sample.prompt):
        return colours[found[1]]
    assert sample.prompt == "How many objects are there?"
    return WORDS[len(scene.things)]


def guessing(sample: Sample) -> str:
    """What one would expect without a look."""
    if found := re.fullmatch(r"Is the (\w+) (\w+)\?", sample.prompt):
        return say(PREFERRED_COLOUR[found[1]] == found[2])
    if found := re.fullmatch(r"What color is the (\w+)\?", sample.prompt):
        return PREFERRED_COLOUR[found[1]]
    if sample.prompt == "How many objects are there?":
        return "three"
    if sample.prompt == "Describe the image.":
        counts = co_occurrence()
        names = list(PREFERRED_COLOUR)
        absent = [name for name in names if name not in scene_of(sample, 3).categories]
        likely: list[str] = []
        for thing in scene_of(sample, 3).things:
            row = counts[names.index(thing.category)]
            likely.append(max((n for n in absent if n not in likely), key=lambda n: row[names.index(n)]))
        return " and ".join(f"a {name}" for name in likely)
    return "yes"


def values(suite: Suite, answerer, split: str | None = None) -> dict[str, float]:
    records = suite.records({sample.id: answerer(sample) for sample in suite.samples()})
    members = [s.id for s in suite.samples() if split is None or split in s.splits]
    sums = np.array([[records[key][name] for name in suite.fields] for key in members]).sum(0)
    return {metric.name: float(metric.value(suite.fields, sums)) for metric in suite.metrics}


@pytest.fixture(scope="module")
def suites() -> dict[str, Suite]:
    return {name: make_suite(name, WORLDS) for name in NEW}


@pytest.mark.parametrize("name", NEW)
def test_samples_are_functions_of_seed_and_index(suites, name):
    samples = suites[name].samples()
    assert len({sample.id for sample in samples}) == len(samples)
    few = make_suite(name, [World("clear", 0.0, 5)]).samples()
    of_five = [s for s in samples if s.condition == "clear" and int(s.image_id) < 5]
    assert [(s.id, s.prompt, s.truth) for s in few] == [(s.id, s.prompt, s.truth) for s in of_five]
    other = make_suite(name, [World("clear", 0.0, 5, seed=13)]).samples()
    assert [(s.prompt, s.truth) for s in few] != [(s.prompt, s.truth) for s in other]
    things = 3 if name == "amber" else None
    assert np.array_equal(np.asarray(few[-1].images()[0]), make_scene(12, 4, "clear", 0.0, things)[1])
    swapped = make_suite(name, [World("clear", 0.0, 5, swapped=True)]).samples()
    assert np.array_equal(np.asarray(swapped[0].images()[0]), make_scene(12, 1, "clear", 0.0, things)[1])


@pytest.mark.parametrize("name", NEW)
def test_the_bundled_model_knows_every_word(suites, name):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    for prompt in {sample.prompt for sample in suites[name].samples()}:
        assert tokenizer.unk_token_id not in tokenizer(prompt)["input_ids"], prompt


def test_who_knows_gets_everything(suites):
    assert values(suites["amber"], knowing) == {"chair": 0, "cover": 100, "hal": 0, "cog": 0}
    for split in ("existence", "state", "number", "relation"):
        found = values(suites["amber_questions"], knowing, split)
        assert [found[name] for name in ("accuracy", "precision", "recall", "f1")] == [100] * 4
    for split in ("existence", "count", "position", "colour"):
        assert values(suites["mme"], knowing, split) == {
            "score": 200, "accuracy": 100, "accuracy_plus": 100, "yes_ratio": 50,
        }  # fmt: skip
    assert values(suites["mmhal"], knowing) == {"accuracy": 100, "prior": 0, "unread": 0}
    for name in NEW:
        suite = suites[name]
        for sample in suite.samples():
            assert suite.right(suite.records({sample.id: knowing(sample)})[sample.id])


def test_who_guesses_is_caught(suites):
    found = values(suites["amber"], guessing)
    assert (found["cog"], found["hal"], found["chair"], found["cover"]) == (100, 100, 100, 0)
    assert values(suites["amber_questions"], guessing, "existence")["accuracy"] == 0
    assert values(suites["mme"], guessing, "existence")["accuracy_plus"] == 0
    for split in ("count", "colour"):
        assert values(suites["mme"], guessing, split)["accuracy_plus"] < 40
    assert values(suites["mmhal"], guessing, "colour, prior agrees")["accuracy"] == 100
    for kind in ("colour", "count"):
        disagrees = values(suites["mmhal"], guessing, f"{kind}, prior disagrees")
        assert disagrees == {"accuracy": 0, "prior": 100, "unread": 0}


def test_silence_is_wrong(suites):
    def silent(sample: Sample) -> str:
        return "well"

    assert values(suites["mmhal"], silent) == {"accuracy": 0, "prior": 0, "unread": 100}
    for name in ("amber_questions", "mme"):
        assert values(suites[name], silent)["accuracy"] == 0


def test_amber_captions_by_hand(suites):
    suite = suites["amber"]
    sample = next(s for s in suite.samples() if "dog" in s.truth.truth and "tree" in s.truth.traps)
    present = [name for name in sample.truth.truth if name != "dog"]
    found = suite.score(sample, f"there is a brown puppy , a tree , a {present[0]} and two blue trees .")
    assert found == {
        "words": 4, "unsafe": 2, "truth": 3, "covered": 2, "captions": 1, "unsafe_captions": 1, "traps": 3, "fallen_for": 1,
    }  # fmt: skip
    assert len(set(sample.truth.truth) | set(sample.truth.traps)) == 6


def test_amber_asks_about_absent_things_and_balances_the_rest(suites):
    samples = suites["amber_questions"].samples()
    assert not any(s.truth for s in samples if "existence" in s.splits)
    for split in ("state", "number", "relation"):
        share = np.mean([s.truth for s in samples if split in s.splits])
        assert 0.4 < share < 0.6
    counts = {len(scene_of(s).things) for s in samples if "number" in s.splits}
    assert len(counts) > 2  # where all have three, counting needs no look


def test_numbers_are_held_against_the_answer(suites):
    suite = suites["amber_questions"]
    number = next(s for s in suite.samples() if "number" in s.splits and s.truth and len(scene_of(s).things) == 2)
    scores = [suite.score(number, text) for text in ("two", "There are 2.", "three objects", "many")]
    assert [(one["right"], one["yes"], one["said_no"]) for one in scores] == [
        (1, 1, 0),
        (1, 1, 0),
        (0, 0, 1),
        (0, 0, 0),
    ]
    colour = next(s for s in suite.samples() if "state" in s.splits)
    assert suite.score(colour, "Two")["wrong"] == 1  # a number says nothing there
    for sample in suite.samples():
        if "number" in sample.splits:
            truth = len(scene_of(sample).things)
            held = truth if sample.truth else 4 if truth == USUAL_COUNT else USUAL_COUNT
            assert suite.score(sample, WORDS[held])["yes"] == 1
            assert suite.score(sample, WORDS[held])["right"] == float(sample.truth)
            assert suite.expected(sample) == (WORDS[held] if sample.truth else f"not {WORDS[held]}")


def test_mme_pairs(suites):
    suite = suites["mme"]
    pairs: dict[str, list[Sample]] = {}
    for sample in suite.samples():
        pairs.setdefault(sample.id.rpartition("/")[0], []).append(sample)
    assert len(pairs) == 2 * 24 * 4
    unusual = 0
    for yes, no in pairs.values():
        assert (yes.truth, no.truth) == (True, False)
        assert yes.image_id == no.image_id
        if "colour" in yes.splits:
            category, denied = re.fullmatch(r"Is the (\w+) (\w+)\?", no.prompt).groups()
            things = {thing.category: thing.colour for thing in scene_of(no).things}
            assert denied != things[category]
            if things[category] != PREFERRED_COLOUR[category]:
                assert denied == PREFERRED_COLOUR[category]
                unusual += 1
            else:  # only where every thing has its usual colour
                assert all(colour == PREFERRED_COLOUR[name] for name, colour in things.items())
    assert unusual > 24
    one = next(iter(pairs.values()))
    records = suite.records({one[0].id: "yes", one[1].id: "yes"})
    assert [records[s.id]["pair"] for s in one] == [0, 0]
    assert [records[s.id]["pair_asked"] for s in one] == [1, 0]


def test_sides_are_asked_where_they_are_clear(suites):
    for sample in suites["mme"].samples():
        if "position" in sample.splits:
            category = sample.prompt.split()[2]
            away = {thing.category: abs(thing.x - 28) for thing in scene_of(sample).things}
            assert away[category] == max(away.values())


def test_mmhal_splits_tell_where_the_prior_is_wrong(suites):
    for sample in suites["mmhal"].samples():
        agrees = knowing(sample) == guessing(sample)
        assert sample.splits[1].endswith("agrees" if agrees else "disagrees")
        assert sample.splits[1].endswith("disagrees") != agrees
        assert suites["mmhal"].expected(sample) == knowing(sample)


@pytest.mark.parametrize(
    ("answer", "colour", "number"),
    [("The cup is Red.", "red", None), ("three", None, 3), ("there are 12 , two of them blue", "blue", 12), ("coloured, someone", None, None), ("", None, None)],
)  # fmt: skip
def test_colours_and_numbers_are_read(answer, colour, number):
    assert read_colour(answer) == colour
    assert read_number(answer) == number


def test_the_usual_count_is_that_of_training():
    assert 1 + int(np.argmax(_COUNT_P)) == USUAL_COUNT
    assert len(_COUNT_P) == MOST_THINGS
    for bad in (0, 6):
        with pytest.raises(OptionError, match="1 to 5 things"):
            World(things=bad)


def test_generated_suites_by_name():
    generated = {name for name, info in all_suites().items() if "scenes" in info.doors}
    assert generated == {"pope", "chair", "which", "pqa", *NEW}
    for name in generated:
        suite = make_suite(name, [World("faint", 0.0, 4), World("clear", 0.0, 8)])
        assert suite.name == name
        conditions = {sample.condition for sample in suite.samples()}
        assert conditions == ({"clear"} if name in ("which", "pqa") else {"clear", "faint"})
    with pytest.raises(UnknownNameError, match="did you mean mmhal"):
        make_suite("mmhall", WORLDS)
