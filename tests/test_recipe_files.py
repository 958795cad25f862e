"""Recipes and profiles that people write: whatever stands in them, a recipe comes out or one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmattn
from vlmattn import PAI, VHR, InputError, OptionError, Recipe, VlmattnError
from vlmattn.anatomy import Anatomy
from vlmattn.binding import bind
from vlmattn.interventions.profiles import HeadProfile, SinkProfile, load_profile
from vlmattn.registry import find_method

SIZES = Anatomy("llava", 32, 32, 32, 128, 4096, ("llama", 4096, 32, 11008), tower_layers=24)
METHODS = sorted({info.method for info in vlmattn.presets().values()})
# what no option takes, or only some do
ODD = st.sampled_from([400, 5000]).map(lambda digits: 10**digits) | st.sampled_from(
    [
        True, None, -1, 0, 1, 3, 0.5, 1e308, float("inf"), float("nan"), "", "a" * 5000, "0", "2:", "1/0:", "9" * 5000, "9" * 30 + ":",
        ":::", "12.3", "9.9.9", ".", "1." + "9" * 5000, "line\nbreak", "\0", "{{data}}", "<script>", "$\\frac{", "none", "all", "image",
        [], [0], [-1], [1e999], ["x"], [[0]], {}, {"a": 1}, [10**30],
    ]
)  # fmt: skip
NAMES = st.sampled_from(METHODS)


@st.composite
def methods(draw, names=NAMES):
    name = draw(names)
    known = [spec.name for spec in dataclasses.fields(find_method(name))] if name in METHODS else ["alpha"]
    options = draw(st.dictionaries(st.sampled_from(known) | st.sampled_from(["alfa", "", "a" * 300]), ODD, max_size=2))
    return {"method": name, **options}


ITEMS = methods() | methods(NAMES | st.sampled_from(["vaar", "", "a" * 5000])) | ODD
RECIPES = st.fixed_dictionaries(
    {"schema": st.just(1) | ODD, "name": st.text(max_size=3) | ODD, "interventions": st.lists(ITEMS, max_size=3) | ODD},
    optional={"pruning": st.lists(ITEMS, max_size=2) | ODD, "decoding": ITEMS, "more": ODD},
)


def said_in_a_line(error):
    assert isinstance(error, VlmattnError)
    assert str(error).isprintable()
    assert len(str(error)) <= 1000
    return True


def written(data, form):
    if form == "yaml":
        return yaml.safe_dump(data)
    return json.dumps(data, indent=2 if form == "indented" else None)


@settings(max_examples=400, deadline=None)
@given(
    RECIPES | methods().map(lambda method: {"schema": 1, "interventions": [method]}),
    st.sampled_from(["json", "indented", "yaml"]),
)
def test_a_recipe_or_one_line(data, form):
    try:
        text = written(data, form)
    except ValueError:  # 10 ** 5000, which Python does not write
        text = written({"name": "n"}, form)
    try:
        recipe = Recipe.from_text(text)
    except VlmattnError as error:
        assert said_in_a_line(error)  # noqa: PT017
        return
    for again in (Recipe.from_text(recipe.to_json()), Recipe.from_text(recipe.to_yaml())):
        assert again == recipe
    try:
        bind(recipe, SIZES)
    except VlmattnError as error:
        assert said_in_a_line(error)  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(NAMES, st.data())
def test_options_from_python_are_taken_or_refused_in_a_line(name, data):
    option = data.draw(st.sampled_from([spec.name for spec in dataclasses.fields(find_method(name))]))
    value = data.draw(ODD)
    try:
        find_method(name)(**{option: value})
    except VlmattnError as error:
        assert said_in_a_line(error)  # noqa: PT017
        assert f"{name}.{option}" in str(error) or option in str(error)  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(
    st.text()
    | st.sampled_from(
        [
            "a" * 256,
            "a" * 5000,
            "\0",
            "a\0.yaml",
            "\ud800",
            "\ud800.json",
            "/" * 5000,
            "a/" * 3000 + "b.yaml",
            "pai@" + "9" * 5000,
            "+" * 300,
            ".",
        ]
    )
)
def test_names_are_recipes_or_refused_in_a_line(text):
    for spec in (text, [text], [text, PAI()], f"pai+{text}"):
        try:
            Recipe.of(spec)
        except VlmattnError as error:
            assert said_in_a_line(error)  # noqa: PT017


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["pai", "vhr", "none", "fastv@0.5", "vhr+pai"]), min_size=1, max_size=3),
    st.sampled_from([list, tuple]),
)
def test_a_list_of_names_is_their_composition(names, kind):
    assert Recipe.of(kind(names)) == Recipe.of("+".join(names))


def test_lists_hold_methods_names_and_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(Recipe.of(PAI(alpha=0.1)).to_yaml())
    assert Recipe.of(["vhr", PAI(alpha=0.1)]).interventions == (VHR(), PAI(alpha=0.1))
    assert (
        Recipe.of(["vhr", path]).interventions == Recipe.of(["vhr", str(path)]).interventions == (VHR(), PAI(alpha=0.1))
    )
    assert Recipe.of(["vcd", "fastv"]) == Recipe.of("vcd+fastv")
    for spec, words in (
        ([3], "got int in a list"),
        (["pai", None], "got NoneType in a list"),
        (["pai", ""], "this one is empty"),
        ("", "this one is empty; 'none' is the bare model"),
        (" ", "is empty"),
        (["vcd", "m3id"], "at most one"),
    ):
        with pytest.raises(OptionError, match=words):
            Recipe.of(spec)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 1, "name": "n", "interventions": [{"method": "pai", "alpha": 0.1, "alpha": 0.9}]}', "the key 'alpha' stands twice"),
        ("schema: 1\nname: n\ninterventions:\n- method: pai\n  alpha: 0.1\n  alpha: 0.9\n", "line 4: the key 'alpha' stands twice"),
        ("schema: 1\nname: n\ninterventions: [&a {method: pai}, *a]\n", r"line 3: aliases \(\*a\)"),
        ("schema: 1\nname: n\ninterventions:\n- {method: pai, alpha: !!int x}\n", "line 4: tags"),
        ("schema: 1\nname: n\ninterventions:\n- {method: pai, alpha: 2001-13-45}\n", "pai.alpha must be a number within 0..0.999, got '2001-13-45'"),
        ("schema: 1\nname: n\ninterventions:\n- {method: pai, alpha: 0x_}\n", "line 4: '0x_' is not a number"),
        ('{"schema": 1, "name": ["n"], "interventions": []}', r"its name must be text, got \['n'\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, text, words):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=rf"mine\.yaml: .*{words}"):
        Recipe.from_file(tmp_path / "mine.yaml")


def test_files_of_recipes_are_bounded(tmp_path):
    (tmp_path / "mine.json").write_text(" " * 2**20 + "{}")
    with pytest.raises(InputError, match=r"cannot read the recipe .*mine\.json: it has more than 1048576 bytes"):
        Recipe.of(tmp_path / "mine.json")


# --- profiles


NUMBERS = st.sampled_from([0, 1, -1, 0.5, True, None, "1", [], [1], float("nan"), float("inf"), 10**30, 10**400, {}])
PROFILES = st.fixed_dictionaries(
    {"fingerprint": st.just("f") | ODD},
    optional={
        "source": ODD, "prompts": ODD, "seed": ODD, "dims": st.lists(NUMBERS, max_size=2) | ODD, "tau": NUMBERS,
        "layers": st.lists(NUMBERS, min_size=2, max_size=2), "levels": st.lists(st.lists(NUMBERS, min_size=2, max_size=2), max_size=2),
        "scores": st.dictionaries(st.sampled_from(["a", "$b$"]), st.lists(st.lists(NUMBERS, max_size=2), max_size=2)), "means": ODD,
    },
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(PROFILES | st.sampled_from(["[" * 100_000, "9" * 5000, '{"a": 1, "a": 2}', '"\\ud800"', ""]))
def test_a_profile_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "profile.json"
    try:
        path.write_text(data if isinstance(data, str) else json.dumps(data))
    except ValueError:  # 10 ** 5000
        path.write_text("{}")
    try:
        found = load_profile(path)
    except VlmattnError as error:
        assert said_in_a_line(error)  # noqa: PT017
        assert str(error).startswith(f"{path}: not a ")  # noqa: PT017
        return
    assert isinstance(found, (HeadProfile, SinkProfile))
    found.save(path)
    assert repr(load_profile(path)) == repr(found)
