"""The registry of suites: one file makes a suite known, its options are found by their names, its table is that of the docs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmattn.cli.data import SuiteOptions
from vlmattn.errors import InputError, OptionError, UnknownNameError
from vlmattn.evals.suites import Suite, World, all_suites, find_suite, make_suite, registry, suite
from vlmattn.evals.suites.making import door_of, options_of, parse_option
from vlmattn.evals.suites.registry import markdown

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(registry, "_SUITES", dict(all_suites()))


def test_the_table_of_the_docs_is_the_registry():
    assert markdown() in (DOCS / "howto-evals.md").read_text()


def test_every_suite_says_what_it_is():
    for info in all_suites().values():
        assert info.about
        assert info.data or set(info.doors) == {"scenes"}
        assert ("table" in info.doors) == bool(info.forms)


def test_a_class_is_a_suite_by_its_decorator():
    @suite("colours", "which colour?", data="a file")
    class Colours(Suite):
        title, fields, metrics = "Colours", ("right",), ()

        @classmethod
        def on_files(cls, data: Path, images: Path, shade: str | None = None, weights: list[int] | None = None):
            return cls((), {"data": data.name, "shade": shade})

        def score(self, sample, answer):
            return {"right": 1.0}

    info = find_suite("colours")
    assert (info.about, list(info.doors), Colours.name) == ("which colour?", ["files"], "colours")
    assert "| `colours` | which colour? | a file |" in markdown()
    with pytest.raises(OptionError, match="two suites 'pope' on scenes"):
        suite("pope")(type("Pope", (Suite,), {}))

    @suite("colours")
    class OnScenes(Colours):
        @classmethod
        def on_scenes(cls, world: World):
            return cls((), world.settings())

    assert list(find_suite("colours").doors) == ["files", "scenes"]
    assert make_suite("colours", [World("dim"), World("clear")]).settings["visibility"] == "clear"  # the last


def test_unknown_names_are_said_with_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown suite 'ambr'; did you mean amber"):
        find_suite("ambr")
    with pytest.raises(UnknownNameError, match="unknown option of suite 'which' on scenes 'size'; did you mean sizes"):
        make_suite("which", [World("clear", count=4)], size=(2,))
    with pytest.raises(OptionError, match=r"suite pope has no options on scenes; leave out pope\.limit"):
        make_suite("pope", [World("clear", count=4)], limit=3)
    with pytest.raises(OptionError, match=r"mme\.limit must be at least 1, got 0"):
        make_suite("mme", data=DOCS, limit=0)


@pytest.mark.parametrize(
    ("name", "option", "text", "value"),
    [
        ("chair", "synonyms", "a=b.txt", Path("a=b.txt")),
        ("chair", "drop_cut", "True", True),
        ("chair", "limit", "7", 7),
        ("pope", "suffix", " One word, please.", " One word, please."),
        ("pqa", "sizes", "2, 8", [2, 8]),
        ("mmhal", "judge", "my.module:judge", "my.module:judge"),
    ],
)
def test_options_are_read_by_their_types(name, option, text, value):
    assert parse_option(find_suite(name), "files", option, text) == value


@pytest.mark.parametrize(
    ("name", "option", "text", "message"),
    [
        ("chair", "drop_cut", "perhaps", "--set chair.drop_cut takes true or false, got 'perhaps'"),
        ("chair", "limit", "few", "--set chair.limit takes a whole number, got 'few'"),
        ("pqa", "sizes", "2,", "takes a whole number, or several with commas"),
    ],
)
def test_values_of_another_kind_are_refused(name, option, text, message):
    with pytest.raises(OptionError, match=message):
        parse_option(find_suite(name), "files", option, text)


def test_every_option_of_every_suite_can_be_shown():
    for info in all_suites().values():
        for door in info.doors:
            assert all(words for words, _ in options_of(info, door).values())
    assert options_of(find_suite("chair"), "files")["limit"] == ("a whole number", 500)


def test_a_suite_on_scenes_takes_no_data():
    with pytest.raises(InputError, match="made of generated scenes"):
        door_of(find_suite("which"), [Path("x")])
    with pytest.raises(InputError, match="no data for suite vqa: vqa needs --data vqa=PATH"):
        make_suite("vqa", [World("clear", count=2)])
    with pytest.raises(InputError, match="takes one --data mme"):
        make_suite("mme", data=[DOCS, DOCS])


# --- suites that a file describes ------------------------------------------------------------------------------------

CUPS: dict[str, Any] = {
    "name": "cups", "kind": "yes_no", "title": "Cups", "columns": {"question": "ask", "answer": "truth", "images": "photo"},
}  # fmt: skip
LETTERS: dict[str, Any] = {**CUPS, "kind": "choice", "columns": {**CUPS["columns"], "options": "among"}}


def described(folder: Path, about: dict[str, Any], *rows: dict[str, Any], name: str = "cups.yaml") -> Path:
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / name).write_text(json.dumps(about))
    return folder / name


def test_a_described_suite_on_the_command_line(tmp_path):
    rows = [
        {"ask": f"A {thing}?", "truth": truth, "photo": "a.png"} for thing, truth in (("cup", "yes"), ("dog", "No"))
    ]
    path = described(tmp_path, {**CUPS, "ending": "Yes or no?"}, *rows)
    options = SuiteOptions(data=[f"cups={tmp_path / 'q.jsonl'}"], images=tmp_path, limit=1)
    (made,) = options.make([str(path)], "embedded")
    assert [(s.id, s.prompt, s.truth, s.image_id, s.condition) for s in made.samples()] == [
        ("0", "A cup?\nYes or no?", True, "a.png", "cups")
    ]
    own = described(tmp_path, {**CUPS, "files": "q.jsonl", "images": "."}, *rows, name="own.yml")
    one, two = SuiteOptions(scenes=4).make([str(own), "which"], "embedded")  # each on its own
    assert [s.truth for s in one.samples()] == [True, False]
    assert two.name == "which"
    assert one.metrics[0].name == "accuracy"
    assert one.records({"0": "Yes", "1": "yes"})["1"] == {"right": 0, "wrong": 1, "yes": 1}


def test_described_choices(tmp_path):
    row = {"ask": "Which?", "truth": "B", "photo": ["a.png", "a.png"], "among": ["red", "blue"]}
    made = make_suite(str(described(tmp_path, LETTERS, row)), data=tmp_path / "q.jsonl", images=tmp_path)
    (sample,) = made.samples()
    assert sample.prompt == "Which?\nA. red\nB. blue"
    assert (sample.image_count, sample.splits) == (2, ("all", "2 images"))
    assert made.score(sample, "Blue")["right"] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "essay"}, InputError, "kind must be yes_no or choice, got 'essay'"),
        ({"titel": "x"}, UnknownNameError, "did you mean title"),
        ({"columns": {"question": "ask", "images": "photo"}}, InputError, "columns.answer is missing"),
        ({"columns": {**CUPS["columns"], "ansver": "x"}}, UnknownNameError, "did you mean answer"),
        ({"columns": {**CUPS["columns"], "id": 3}}, InputError, r"columns\.id must be the name of a column"),
        ({"columns": []}, InputError, "columns must be a mapping"),
        ({"max_new_tokens": 0}, InputError, "max_new_tokens must be a whole number above 0"),
        ({"answers": {"yes": ["1"]}}, InputError, "answers must be a mapping with the keys yes and no"),
        ({"groups": [{"name": "x"}]}, InputError, "groups must be a list of mappings with name, field, of"),
        ({"tables": [{"name": "x", "needs": ["a"], "need": []}]}, UnknownNameError, "did you mean needs"),
        ({"files": 3}, InputError, "files must be a file name"),
    ],
)
def test_what_describes_no_suite_is_refused(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        make_suite(str(described(tmp_path, {**CUPS, **change})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": "maybe"}, "q.jsonl:1: truth must be yes or no, got 'maybe'"),
        ({"photo": None}, "q.jsonl:1: photo must be a file name"),
        ({"photo": []}, "photo must be a file name"),
        ({"ask": 5}, "ask must be a text"),
        ({"photo": "../b.png"}, "lies outside of"),
    ],
)
def test_damaged_questions_are_named(tmp_path, change, message):
    path = described(tmp_path, CUPS, {"ask": "?", "truth": "yes", "photo": "a.png", **change})
    with pytest.raises(InputError, match=message):
        make_suite(str(path), data=tmp_path / "q.jsonl", images=tmp_path)
