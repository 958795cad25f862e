"""Recipes as data: parsing, composition, files, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmattn
from vlmattn import PAI, VAR, VHR, InputError, OptionError, Recipe, UnknownNameError, VlmattnError
from vlmattn.anatomy import Anatomy
from vlmattn.binding import bind
from vlmattn.options import parse_layers
from vlmattn.recipe import FILE_NAME
from vlmattn.registry import find_method, make_method

SIZES = Anatomy("llava", 32, 32, 32, 128, 4096, ("llama", 4096, 32, 11008), tower_layers=24)
PRESETS = sorted(vlmattn.presets())
MEASURED = {
    "focus": "fit_directions",
    "heads_amplify": "find_heads",
    "heads_block": "find_heads",
    "heads_cut": "find_heads",
    "duo": "duo: which heads keep everything",
    "razor": "razor: which heads keep everything",
    **{f"{name}{draw}": "vlmattn fit" for name in ("steer", "vti", "nullu") for draw in ("", "_random")},
}


# --- what people write


def test_every_form_is_a_recipe(tmp_path):
    pai = Recipe("pai", (PAI(),))
    assert Recipe.of("pai") == Recipe.of(PAI()) == Recipe.of([PAI()]) == Recipe.of((PAI(),)) == Recipe.of(pai) == pai
    assert Recipe.of(pai) is pai
    path = tmp_path / "mine.yaml"
    path.write_text(pai.to_yaml())
    pai.save_pretrained(tmp_path)
    assert Recipe.of(path) == Recipe.of(str(path)) == Recipe.of(tmp_path) == Recipe.of(str(tmp_path)) == pai


def test_names_compose_in_order():
    assert Recipe.of("vhr+pai").interventions == (VHR(), PAI())
    assert Recipe.of(" vhr + pai ").interventions == (VHR(), PAI())
    assert Recipe.of("vhr+none").interventions == (VHR(),)
    assert Recipe.of([VHR(), PAI(alpha=0.1)]) == Recipe("vhr+pai", (VHR(), PAI(alpha=0.1)))
    assert Recipe.of("none").interventions == Recipe.of([]).interventions == ()
    assert bind(Recipe.of("none"), SIZES).is_identity


def test_a_folder_named_like_a_preset_does_not_hide_it(tmp_path, monkeypatch):
    Recipe.of("vhr").save_pretrained(tmp_path / "pai")
    Recipe.of("vhr").save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert Recipe.of("pai") == Recipe("pai", (PAI(),))
    assert Recipe.of("mine") == Recipe.of("vhr")


def test_options_change_the_one_method():
    changed = Recipe.of("var_official", keep=0.7, dims=[1, 2])
    assert changed.interventions == (VAR(keep=0.7, dims=(1, 2), layers="2:", need_visual_sink=True),)
    assert "keep=0.7" in changed.name
    assert Recipe.of(PAI(alpha=0.1), layers="3").interventions == (PAI(alpha=0.1, layers="3"),)
    assert Recipe.of("pai", alpha=0.1) != Recipe.of("pai")


@pytest.mark.parametrize(
    "spec", [None, 3, {"method": "pai"}, b"pai", [PAI(), 3], object()], ids=lambda spec: type(spec).__name__
)
def test_other_things_are_no_recipes(spec):
    with pytest.raises(OptionError, match="a recipe is a preset name, a file, a method or a list of methods; got"):
        Recipe.of(spec)


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown preset 'var_offical'; did you mean var_official"):
        Recipe.of("vhr+var_offical")
    with pytest.raises(UnknownNameError, match=r"unknown preset 'qqq'; known: agla, .* and [0-9]+ more"):
        Recipe.of("qqq")
    with pytest.raises(UnknownNameError, match="unknown preset ''"):
        Recipe.of("pai+")
    with pytest.raises(UnknownNameError, match="unknown method 'vaar'; did you mean var"):
        find_method("vaar")
    with pytest.raises(UnknownNameError, match="unknown option of 'vhr' 'alfa'; did you mean alpha"):
        make_method("vhr", {"alfa": 2})
    for spec in ("vhr+pai", "none"):
        with pytest.raises(OptionError, match="need a recipe of one method"):
            Recipe.of(spec, alpha=0.1)


@pytest.mark.parametrize(
    ("method", "option", "value", "allowed"),
    [
        (PAI, "alpha", 1.0, r"0\.\.0\.999"),
        (PAI, "alpha", -0.1, r"0\.\.0\.999"),
        (PAI, "alpha", "0.2", r"0\.\.0\.999"),
        (PAI, "alpha", True, r"0\.\.0\.999"),
        (PAI, "alpha", None, r"0\.\.0\.999"),
        (VAR, "keep", float("nan"), r"0\.\.1"),
        (VAR, "tau", float("inf"), r"0\.\.1000\.0"),
        (VAR, "max_sink", 1.1, r"0\.\.1"),
        (VAR, "min_visual", [0.1], r"0\.\.1"),
        (VHR, "alpha", 11, r"0\.\.10"),
        (VHR, "ta_power", 3, r"1\.\.2"),
    ],
)
def test_numbers_out_of_range_name_field_range_and_value(method, option, value, allowed):
    with pytest.raises(OptionError, match=rf"{method.info.name}\.{option} must be a number within {allowed}, got"):
        method(**{option: value})


def test_flags_and_texts_have_their_types():
    with pytest.raises(OptionError, match=r"var\.need_visual_sink must be of type bool, got 1"):
        VAR(need_visual_sink=1)
    with pytest.raises(OptionError, match=r"pai\.layers must be of type str, got 3"):
        PAI(layers=3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_inside_their_own_ranges(name):
    info = vlmattn.presets()[name]
    (method,) = Recipe.of(name).methods
    assert method.info.name == info.method
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in info.options.items()}
    assert {key: method.options()[key] for key in info.options} == given
    assert info.about
    if name in MEASURED:  # these act on what was measured on a model
        with pytest.raises(OptionError, match=MEASURED[name]):
            bind(Recipe.of(name), SIZES)
    else:
        plan = bind(Recipe.of(name), SIZES)
        acts = any(plan.by_layer) or any(plan.pruning) or any(plan.steering) or plan.decoding or plan.search
        assert acts, "in a 7B model"


@pytest.mark.parametrize(
    ("preset", "layers"),
    [
        ("pai", range(2, 32)),
        ("vaf", range(9, 15)),
        ("heads_guided", range(5, 19)),
        ("gift", range(12, 23)),
        ("sofa", range(0, 31, 2)),
        ("vhr", [1, *range(18, 32)]),
    ],
)
def test_shares_of_the_depth_are_the_papers_layers_in_7b(preset, layers):
    (method,) = Recipe.of(preset).interventions
    assert method.active_layers(SIZES) == tuple(layers)


@pytest.mark.parametrize(("preset", "alpha"), [("pai", 0.2), ("pai_official", 0.2), ("pai_paint", 0.5), ("focus", 0.2)])
def test_strengths_are_the_released_ones(preset, alpha):
    (method,) = Recipe.of(preset).interventions
    assert method.alpha == alpha


# --- value semantics


def test_recipes_are_values():
    a, b = Recipe.of(VAR(dims=(1, 2))), Recipe.of(VAR(dims=[1, 2]))
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b, Recipe.of("var"), Recipe.of("var")}) == 2
    assert Recipe.of("vhr+pai") != Recipe.of("pai+vhr")
    with pytest.raises(AttributeError):
        a.name = "other"
    with pytest.raises(AttributeError):
        PAI().alpha = 0.1


def test_options_are_plain_data():
    options = VAR(dims=(1, 2)).options()
    assert options["dims"] == [1, 2]
    assert json.loads(json.dumps(options)) == options
    assert make_method("var", options) == VAR(dims=(1, 2))


# --- files


EDITS = [name for name in PRESETS if Recipe.of(name).interventions]


@pytest.mark.parametrize("name", [*PRESETS, "none", "vhr+pai", "+".join([*EDITS, "vcd"])])
def test_round_trips(name, tmp_path):
    recipe = Recipe.of(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert Recipe.from_text(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json()) == yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()
    recipe.save_pretrained(tmp_path / "new" / "folder")
    assert Recipe.from_pretrained(tmp_path / "new" / "folder") == recipe


@settings(max_examples=10)
@given(st.floats(0, 1), st.floats(0, 1), st.lists(st.integers(0, 4095), max_size=3), st.booleans())
def test_any_value_survives_a_round_trip(keep, max_sink, dims, flag):
    recipe = Recipe.of(
        [VAR(keep=keep, max_sink=max_sink, dims=tuple(dims), need_visual_sink=flag), PAI(alpha=0.9 * keep)]
    )
    assert Recipe.from_text(recipe.to_yaml()) == Recipe.from_text(recipe.to_json()) == recipe


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the recipe .*gone\.yaml: No such file"):
        Recipe.from_file(tmp_path / "gone.yaml")
    with pytest.raises(InputError, match=r"cannot read the recipe gone\.json"):
        Recipe.of("gone.json")
    with pytest.raises(InputError, match=rf"has no {FILE_NAME}; save one with recipe\.save_pretrained"):
        Recipe.of(tmp_path)


BAD = {
    "empty": (b"", "needs schema 1"),
    "not yaml": (b"a: [1", "not valid YAML or JSON"),
    "a text": (b"pai", "needs schema 1"),
    "no schema": (b"interventions: []", "needs schema 1"),
    "other schema": (b"schema: 2\ninterventions: []", "needs schema 1"),
    "no list": (b"schema: 1\ninterventions: {method: pai}", "a list of interventions"),
    "no method": (b"schema: 1\ninterventions: [{alpha: 1}]", "needs a 'method'"),
    "text in list": (b"schema: 1\ninterventions: [pai]", "needs a 'method'"),
    "unknown method": (b"schema: 1\ninterventions: [{method: paii}]", "did you mean pai"),
    "unknown option": (b"schema: 1\ninterventions: [{method: pai, alpa: .1}]", "did you mean alpha"),
    "out of range": (b"schema: 1\ninterventions: [{method: pai, alpha: 2}]", r"pai\.alpha .* 0\.\.0\.999, got 2"),
    "wrong type": (b"schema: 1\ninterventions: [{method: pai, layers: 3}]", r"pai\.layers must be of type str"),
    "dims one number": (b"schema: 1\ninterventions: [{method: var, dims: 3}]", r"var\.dims"),
    "dims null": (b"schema: 1\ninterventions: [{method: var, dims: null}]", r"var\.dims"),
    "dims fraction": (b"schema: 1\ninterventions: [{method: var, dims: [3.5]}]", r"var\.dims"),
    "method a list": (b"schema: 1\ninterventions: [{method: [pai]}]", "method"),
    "option a number": (b"schema: 1\ninterventions: [{method: pai, 1: 2}]", "unknown option of 'pai'"),
    "not text": (b"\xff\xfe\x00\x01", "x.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_a_remedy(case, tmp_path):
    content, match = BAD[case]
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(VlmattnError, match=match):
        Recipe.from_file(tmp_path / "x.yaml")


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: [1")
    with pytest.raises(InputError, match=r"x\.yaml: not valid YAML or JSON: [^\n]+$"):
        Recipe.from_file(path)


def test_saving_is_atomic(tmp_path, monkeypatch):
    Recipe.of("pai").save_pretrained(tmp_path)
    Recipe.of("vhr").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert Recipe.from_pretrained(tmp_path) == Recipe.of("vhr")

    def full(self, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        Recipe.of("pai").save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path) == Recipe.of("vhr"), "the old file is whole"


# --- layers


@settings(max_examples=200)
@given(st.integers(1, 40), st.none() | st.integers(-50, 50), st.none() | st.integers(-50, 50))
def test_layer_slices_are_those_of_python(count, first, last):
    text = ["" if end is None else str(end) for end in (first, last)]
    expected = tuple(range(count)[first:last])
    assert parse_layers(":".join(text), count, "m") == expected
    assert parse_layers(" : ".join(text), count, "m") == expected


@settings(max_examples=200)
@given(st.integers(1, 40), st.lists(st.integers(-45, 45), min_size=1, max_size=4))
def test_layer_indices_are_those_of_python(count, indices):
    layers = list(range(count))
    try:
        expected = tuple(sorted({layers[i] for i in indices} | set(layers[1:3])))
    except IndexError:
        with pytest.raises(OptionError, match=rf"m names layer -?\d+, but the decoder has layers 0\.\.{count - 1}"):
            parse_layers(",".join(map(str, indices)), count, "m")
    else:
        assert parse_layers(",".join([*map(str, indices), "1:3"]), count, "m") == expected


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "1.5", "1:2:3:4", "2-3", "1;2", "a:b"])
def test_other_texts_are_no_layers(text):
    with pytest.raises(
        OptionError, match=r"pai\.layers must look like '2:-1', '1,-14:', '0:-1:2' or '9/32:15/32', got"
    ):
        PAI(layers=text)
