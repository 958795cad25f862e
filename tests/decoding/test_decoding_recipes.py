"""Decoding rules in recipes, on a model over its life, and on the command line."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from numerics import near
from PIL import Image
from tiny import FAMILIES, build, generate, left_padded, prompt
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import vlmattn
from vlmattn import (
    AGLA,
    ICD,
    M3ID,
    PAI,
    RBD,
    VCD,
    VHR,
    Branch,
    ContrastiveDecoding,
    InputError,
    Noise,
    OptionError,
    PAIGuidance,
    Recipe,
    UnknownNameError,
    VlmattnError,
    cli,
)
from vlmattn.anatomy import Anatomy
from vlmattn.binding import bind
from vlmattn.embedded.scenes import make_scene
from vlmattn.interventions import Intervention, Pruning
from vlmattn.recipe import FILE_NAME
from vlmattn.registry import find_method
from vlmattn.wrapping import record_of
from vlmattn.wrapping.call import CALL

ROOT = Path(__file__).parents[2]
SIZES = Anatomy("llava", 32, 32, 32, 128, 4096, ("llama", 4096, 32, 11008), tower_layers=24)
RULES = [
    name
    for name, info in vlmattn.presets().items()
    if not issubclass(find_method(info.method), (Intervention, Pruning))
]  # searches too
EXPECTED = {
    "agla", "agla_attention", "avisc", "buckets", "deco", "dola_high", "dola_low", "icd", "m3id", "pai_guidance",
    "pai_guidance_cli", "rbd", "vcd", "vcd_pope",
}  # fmt: skip
JOINED = ["var+rbd", "pai_official+pai_guidance", "vhr+pai+vcd", "rbd+var", "pai+dola_low", "none+icd"]
BY_HAND = "a ContrastiveDecoding made by hand cannot be written down; register a decoding method"


def halved(main: Tensor, others: Any, t: Tensor) -> Tensor:
    return main - 0.5 * others[0]


def by_hand(rule: Any = halved) -> ContrastiveDecoding:
    return ContrastiveDecoding((Branch(name="noised", image=Noise()),), rule)


def wrapped(recipe: Any = "vcd", family: str = "llava", **options: Any) -> Any:
    return vlmattn.wrap(build(family), recipe, **options)


def tokens(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options).tolist()


# Recipes as data


@pytest.mark.parametrize("spec", [*RULES, *JOINED])
def test_round_trips(spec, tmp_path):
    recipe = Recipe.of(spec)
    data = recipe.to_dict()
    assert data["decoding"]["method"] == recipe.decoding.info.name
    assert len(data["interventions"]) == len(recipe.interventions)
    assert json.loads(json.dumps(data)) == data
    for again in (
        Recipe.from_dict(data),
        Recipe.from_text(recipe.to_json()),
        Recipe.from_text(recipe.to_yaml()),
        Recipe.from_dict(json.loads(json.dumps(data))),
    ):
        assert again == recipe
        assert hash(again) == hash(recipe)
        assert again.to_dict() == data
        assert type(again.decoding) is type(recipe.decoding)
    for name in ("r.yaml", "r.json"):
        (tmp_path / name).write_text(recipe.to_yaml() if name.endswith("yaml") else recipe.to_json())
        assert Recipe.of(tmp_path / name) == Recipe.of(str(tmp_path / name)) == recipe
    recipe.save_pretrained(tmp_path / "folder")
    assert Recipe.of(tmp_path / "folder") == Recipe.from_pretrained(tmp_path / "folder") == recipe


@pytest.mark.parametrize("spec", [name for name in RULES if name not in ("icd", "opera", "opera_fast")])
def test_what_comes_back_binds_to_the_same_rule(spec):
    recipe = Recipe.of(spec)
    again = bind(Recipe.from_text(recipe.to_yaml()), SIZES)
    plan = bind(recipe, SIZES)
    assert again.decoding == plan.decoding
    assert plan.rule == recipe.decoding.info.name
    assert [branch.name for branch in plan.branches] == [f"{spec}/{b.name}" for b in plan.decoding.branches]


def test_options_survive_exactly():
    """Floats that YAML takes for words, lists, long seeds."""
    made = [
        M3ID(rate=1e-5, cap=1e9, unsure_below=0.1 + 0.2),
        VCD(alpha=1e-7, seed=2**63 - 1, step=0),
        vlmattn.Buckets(factors=(1e-5, 1.5, 3.0)),
        ICD(system='It\'s: "odd"\n\t- {x} # Größe 目'),
        RBD(layers="0:1,-1", edits="none"),
    ]
    for method in made:
        recipe = Recipe.of(method)
        assert Recipe.from_text(recipe.to_yaml()) == Recipe.from_text(recipe.to_json()) == recipe
        assert Recipe.from_text(recipe.to_yaml()).decoding.options() == method.options()


def test_options_change_the_rule():
    changed = Recipe.of("vcd", alpha=0.5)
    assert changed.decoding == VCD(alpha=0.5)
    assert changed.name == "vcd[alpha=0.5]"
    assert changed.interventions == ()
    assert wrapped("vcd", alpha=0.5).vlmattn.recipe == changed
    assert Recipe.of(VCD(seed=3), alpha=0.5).decoding == VCD(alpha=0.5, seed=3)
    assert Recipe.of("vcd_pope", alpha=0.5).decoding == VCD(alpha=0.5, beta=0.2)
    assert Recipe.of("none+vcd", alpha=0.5).decoding == VCD(alpha=0.5)


def test_every_form_is_a_recipe():
    recipe = Recipe.of("vcd")
    assert recipe == Recipe("vcd", (), VCD()) == Recipe.of(VCD()) == Recipe.of([VCD()]) == Recipe.of((VCD(),))
    assert Recipe.of(iter([VCD()])) == recipe
    assert recipe.methods == (VCD(),)
    assert not recipe.is_none


def test_lists_of_methods():
    wanted = Recipe("pai+vhr+vcd", (PAI(), VHR()), VCD())
    assert Recipe.of([PAI(), VHR(), VCD()]) == wanted
    assert Recipe.of("pai+vhr+vcd") == wanted
    mixed = Recipe.of([PAI(), VCD(), VHR()])
    assert (mixed.interventions, mixed.decoding) == (wanted.interventions, wanted.decoding)
    assert wanted.methods == (PAI(), VHR(), VCD())
    assert Recipe.of([PAI(), "vhr", "vcd"]) == wanted
    with pytest.raises(OptionError, match=r"a recipe is a preset name, .* or a list of methods; got int in a list"):
        Recipe.of([PAI(), 3])


def test_none_beside_a_rule():
    for name in ("none+vcd", "vcd+none", " none + vcd "):
        recipe = Recipe.of(name)
        assert (recipe.interventions, recipe.decoding) == ((), VCD())
        assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert Recipe.of("none").decoding is None
    assert "decoding" not in Recipe.of("none").to_dict()


def test_recipes_are_values():
    one, other = Recipe.of(VCD(alpha=0.5)), Recipe.of(VCD(alpha=0.5))
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other, Recipe.of(VCD()), Recipe.of("vcd"), Recipe.of("pai+vcd")}) == 3
    assert one != Recipe.of(VCD(alpha=0.25))
    assert Recipe.of(by_hand()) == Recipe.of(by_hand())
    assert hash(Recipe.of(by_hand())) == hash(Recipe.of(by_hand()))
    assert Recipe.of(by_hand()) != Recipe.of(by_hand(lambda main, others, t: main))
    with pytest.raises(AttributeError):
        one.decoding = None


BAD = {
    "a text": ("vcd", InputError, "decoding needs a 'method'"),
    "a list": ([{"method": "vcd"}], InputError, "decoding needs a 'method'"),
    "no method": ({"alpha": 1.0}, InputError, "decoding needs a 'method'"),
    "unknown method": ({"method": "vdc"}, UnknownNameError, "unknown method 'vdc'; did you mean .*vcd"),
    "unknown option": (
        {"method": "vcd", "alfa": 1},
        UnknownNameError,
        "unknown option of 'vcd' 'alfa'; did you mean alpha",
    ),
    "out of range": (
        {"method": "vcd", "alpha": -1},
        OptionError,
        r"vcd\.alpha must be a number within 0\.\.100, got -1",
    ),
    "wrong type": ({"method": "vcd", "step": 2.5}, OptionError, r"vcd\.step must be a whole number, got 2.5"),
    "no choice": ({"method": "agla", "augment": "x"}, OptionError, r"agla\.augment must be one of given, attention"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_and_named(case, tmp_path):
    decoding, error, match = BAD[case]
    data = {"schema": 1, "name": "x", "interventions": [], "decoding": decoding}
    with pytest.raises(error, match=match):
        Recipe.from_dict(data)
    for name, text in (("r.yaml", yaml.safe_dump(data)), ("r.json", json.dumps(data))):
        (tmp_path / name).write_text(text)
        with pytest.raises(VlmattnError, match=rf"r\.(yaml|json): .*{match}") as caught:
            Recipe.of(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_second_rule_in_a_file_is_refused():
    rules = {"interventions": [{"method": "vcd"}], "decoding": {"method": "m3id"}}
    with pytest.raises(InputError, match="'vcd' is in the wrong place"):
        Recipe.from_dict({"schema": 1, "name": "x", **rules})


@pytest.mark.parametrize(
    "wrong", [{"decodng": {"method": "vcd"}}, {"decoding": {}}, {"decoding": {"method": "pai"}}], ids=str
)
def test_slips_in_a_file_are_refused(wrong):
    """A recipe that does nothing, or something else, because of a slip of the pen."""
    with pytest.raises(VlmattnError):
        Recipe.from_dict({"schema": 1, "name": "x", "interventions": [], **wrong})


# Beside a model


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("spec", ["vcd", "pai+rbd", "dola_low"])
def test_saved_beside_a_model(spec, tmp_path):
    model, inputs = wrapped(spec), prompt("llava")
    wanted = generate(model, inputs)
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE_NAME).is_file()
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    loaded.set_attn_implementation("sdpa")
    vlmattn.wrap(loaded)
    assert loaded.vlmattn.recipe == Recipe.of(spec)
    near(generate(loaded, inputs), wanted)  # weights that lie elsewhere are multiplied in another order
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]


@pytest.mark.usefixtures("no_grad")
def test_a_recipe_that_was_put_beside_a_model_later(tmp_path):
    build("llava").save_pretrained(tmp_path)
    Recipe.of("vcd", alpha=0.5).save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert vlmattn.wrap(loaded).vlmattn.recipe == Recipe.of("vcd", alpha=0.5)


# Made by hand


def test_a_rule_made_by_hand_is_a_recipe():
    rule = by_hand()
    assert Recipe.of(rule).decoding is rule
    assert Recipe.of([rule, PAI()]).interventions == (PAI(),)
    assert Recipe.of([PAI(), rule]).decoding is rule
    assert Recipe.of([PAI(), rule]).name == "pai+contrast"
    assert bind(Recipe.of(rule), SIZES).rule == "contrast"
    with pytest.raises(OptionError, match="need a recipe of one method"):
        Recipe.of(rule, alpha=1)


def test_it_cannot_be_written_down(tmp_path):
    recipe = Recipe.of([PAI(), by_hand()])
    for write in (recipe.to_dict, recipe.to_json, recipe.to_yaml, lambda: recipe.save_pretrained(tmp_path)):
        with pytest.raises(OptionError, match=BY_HAND) as caught:
            write()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("also", [[], [PAI(layers="0:")]], ids=["alone", "with an edit"])
def test_a_model_wrapped_with_it_generates(also):
    model, inputs = wrapped([*also, by_hand()]), prompt("llava")
    found = generate(model, inputs)
    wanted = generate(wrapped([*also] or "none"), inputs, preset=Recipe.of([*also, by_hand()]))
    assert torch.equal(found, wanted)
    assert not torch.equal(found, generate(build("llava"), inputs))
    assert model.vlmattn.report()["fired"]["contrast"] == 4


@pytest.mark.usefixtures("no_grad")
def test_a_model_lent_to_it_generates():
    model = wrapped("pai")
    with record_of(model).temporarily(by_hand()):
        generate(model, prompt("llava"))


@pytest.mark.usefixtures("no_grad")
def test_with_one_call_it_generates():
    model, inputs = wrapped("none"), prompt("llava")
    bare = generate(model, inputs)
    assert not torch.equal(generate(model, inputs, preset=by_hand()), bare)
    assert torch.equal(generate(model, inputs), bare)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("held", [None, "vcd"])
def test_nothing_is_half_written(held, tmp_path):
    """No folder that looks like a model with a recipe: without it, or with another one from before."""
    if held:
        Recipe.of(held).save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OptionError, match=BY_HAND):
        wrapped(by_hand()).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# The life of a model


LIVES = ["vcd", "pai+vcd", "rbd", "dola_low", "m3id", "buckets"]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", LIVES)
def test_on_off_and_back(spec, family):
    model, inputs = build(family), prompt(family)
    bare, attributes = generate(model, inputs), set(model.__dict__)
    vlmattn.wrap(model, spec)
    ruled = generate(model, inputs)
    assert not torch.equal(ruled, bare)
    assert torch.equal(generate(model, inputs, preset="none"), bare)
    model.vlmattn.disable()
    assert not model.vlmattn.enabled
    assert torch.equal(generate(model, inputs), bare)
    assert torch.equal(generate(model, inputs, preset=spec), ruled), "a preset with the call counts"
    model.vlmattn.enable()
    assert torch.equal(generate(model, inputs), ruled)
    assert torch.equal(generate(model, inputs), ruled)
    vlmattn.unwrap(model)
    assert set(model.__dict__) == attributes
    assert torch.equal(generate(model, inputs), bare)
    assert CALL.get() is None
    with vlmattn.applied(model, spec):
        assert torch.equal(generate(model, inputs), ruled)
    assert torch.equal(generate(model, inputs), bare)


@pytest.mark.usefixtures("no_grad")
def test_disabled_it_does_nothing_at_all():
    """No second forward, no refusal, no warning."""
    model, inputs, rows = wrapped("vcd"), prompt("llava"), []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: rows.append(args[0].shape[:2])
    )
    model.vlmattn.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, inputs, new=3)
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2, use_cache=False)
    length = inputs["input_ids"].shape[1]
    hook.remove()
    assert [tuple(shape) for shape in rows] == [(1, length), (1, 1), (1, 1), (1, length), (1, length), (1, length + 1)]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    "recipe",
    [
        VCD(alpha=0, beta=0),
        PAIGuidance(gamma=1),
        M3ID(rate=0, beta=0),
        RBD(text=0, visual=0, beta=0),
        AGLA(alpha=0, beta=0),
    ],
)
def test_a_rule_without_weight_is_the_bare_model(recipe):
    model, inputs = wrapped(recipe), prompt("llava")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(model, inputs), generate(build("llava"), inputs))
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2, use_cache=False)
    assert model.vlmattn.report()["fired"] == {recipe.info.name: 0}


@pytest.mark.usefixtures("no_grad")
def test_another_preset_for_one_call():
    """On a model with an edit, and back."""
    model, inputs = wrapped(PAI(layers="0:")), prompt("llava")
    edited, bare = generate(model, inputs), generate(build("llava"), inputs)
    ruled = generate(model, inputs, preset="vcd")
    assert torch.equal(ruled, generate(wrapped("vcd"), inputs)), "the edit has no part in it"
    assert torch.equal(generate(model, inputs), edited)
    both = Recipe.of([PAI(layers="0:"), VCD()])
    assert torch.equal(generate(model, inputs, preset=both), generate(wrapped(both), inputs))
    assert torch.equal(generate(model, inputs, preset="none"), bare)
    assert torch.equal(generate(model, inputs), edited)
    assert model.vlmattn.recipe == Recipe.of(PAI(layers="0:"))
    assert CALL.get() is None


@pytest.mark.usefixtures("no_grad")
def test_an_edit_for_one_call_of_a_model_with_a_rule():
    model, inputs, edit = wrapped("vcd"), prompt("llava"), PAI(layers="0:")
    ruled = generate(model, inputs)
    assert torch.equal(generate(model, inputs, preset=edit), generate(wrapped(edit), inputs))
    assert torch.equal(generate(model, inputs), ruled)


@pytest.mark.usefixtures("no_grad")
def test_set_puts_another_rule_in_force():
    model, inputs = wrapped("vcd"), prompt("llava")
    generate(model, inputs)
    for spec in ("m3id", "pai+rbd", "none", "dola_low", "vcd"):
        model.vlmattn.set(spec)
        assert set(model.vlmattn.report()["fired"].values()) <= {0}, "starts anew"
        assert torch.equal(generate(model, inputs), generate(wrapped(spec), inputs))
    model.vlmattn.set("vcd", alpha=0.25)
    assert torch.equal(generate(model, inputs), generate(wrapped(VCD(alpha=0.25)), inputs))
    with pytest.raises(OptionError):
        model.vlmattn.set("vcd", alpha=-1)
    assert torch.equal(generate(model, inputs), generate(wrapped(VCD(alpha=0.25)), inputs))


@pytest.mark.usefixtures("no_grad")
def test_lent_rules_leave_nothing():
    model, inputs = wrapped("pai+vcd"), prompt("llava")
    wanted = generate(model, inputs)
    fired, recipe = model.vlmattn.report()["fired"], model.vlmattn.recipe
    with record_of(model).temporarily("dola_low"):
        assert torch.equal(generate(model, inputs), generate(wrapped("dola_low"), inputs))
        assert model.vlmattn.report()["fired"] == {"dola": 4}
    assert model.vlmattn.recipe is recipe
    assert model.vlmattn.report()["fired"] == fired
    with pytest.raises(RuntimeError, match="boom"), record_of(model).temporarily("m3id"):
        raise RuntimeError("boom")
    assert torch.equal(generate(model, inputs), wanted)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("spec", LIVES)
def test_copies_live_apart(spec):
    model, inputs = wrapped(spec), prompt("llava")
    wanted = generate(model, inputs)
    other = copy.deepcopy(model)
    assert torch.equal(generate(other, inputs), wanted)
    other.vlmattn.set("none")
    assert torch.equal(generate(model, inputs), wanted)
    assert torch.equal(generate(other, inputs), generate(build("llava"), inputs))
    vlmattn.unwrap(other)
    assert model.vlmattn.report()["fired"] != {}


# Reports and warnings


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    ("spec", "name"),
    [("vcd", "vcd"), ("vcd_pope", "vcd"), ("dola_low", "dola"), ("m3id", "m3id"), ("pai_guidance_cli", "pai_guidance")],
)
def test_the_report_counts_tokens_of_the_rule(spec, name):
    model, inputs = wrapped(spec), prompt("llava")
    assert model.vlmattn.report()["fired"] == {name: 0}
    generate(model, inputs, new=4)
    assert model.vlmattn.report()["fired"] == {name: 4}
    generate(model, left_padded([inputs, prompt("llava", words=7, seed=2)]), new=3)
    report = model.vlmattn.report()
    assert report["fired"] == {name: 7}
    assert report["recipe"]["decoding"]["method"] == name
    assert json.loads(json.dumps(report)) == report
    model.vlmattn.disable()
    generate(model, inputs)
    assert model.vlmattn.report()["fired"] == {name: 7}
    assert model.vlmattn.report()["enabled"] is False


@pytest.mark.usefixtures("no_grad")
def test_the_report_has_edits_and_the_rule():
    model = wrapped([PAI(layers="0:"), VCD()])
    generate(model, prompt("llava"))
    fired = model.vlmattn.report()["fired"]
    assert sorted(fired) == ["pai", "vcd"]
    assert all(count > 0 for count in fired.values())


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("spec", ["vcd", "rbd", "dola_low", "buckets", "agla_attention"])
def test_a_rule_that_acts_is_not_called_idle(spec):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = wrapped(spec)
        generate(model, prompt("llava"))
        generate(model, prompt("llava"))


@pytest.mark.usefixtures("no_grad")
def test_what_never_fired_is_named():
    edit = vlmattn.VAR(tau=500.0, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0)  # no sink is found
    for recipe, idle in (([edit, VCD()], "var"), ([PAI(layers="0:"), VCD(alpha=0, beta=0)], "vcd")):
        model = wrapped(recipe)
        with pytest.warns(UserWarning, match=f"^vlmattn: {idle} never fired in this generate.. call"):
            generate(model, prompt("llava"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(model, prompt("llava"))  # once is enough


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_direct_forward_is_the_models_own_and_says_so_once(family):
    model, inputs = wrapped("vcd", family), prompt(family)
    wanted = build(family)(**inputs).logits
    with pytest.warns(UserWarning, match=r"the decoding rule of 'vcd' acts in generate\(\) only") as said:
        assert torch.equal(model(**inputs).logits, wanted)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(**inputs).logits, wanted)
        generate(model, inputs)
    model.vlmattn.set("m3id")
    with pytest.warns(UserWarning, match="the decoding rule of 'm3id'"):
        model(**inputs)


@pytest.mark.usefixtures("no_grad")
def test_a_direct_forward_with_an_edit_has_the_edit():
    model, inputs = wrapped([PAI(layers="0:"), VCD()]), prompt("llava")
    with pytest.warns(UserWarning, match="acts in generate"):
        found = model(**inputs).logits
    assert torch.equal(found, wrapped(PAI(layers="0:"))(**inputs).logits)
    assert not torch.equal(found, build("llava")(**inputs).logits)


@pytest.mark.usefixtures("no_grad")
def test_a_cache_of_ones_own_goes_on_by_hand():
    """Forwards outside of generate() are plain ones, cache and all."""
    model, inputs = wrapped("vcd"), prompt("llava")
    with pytest.warns(UserWarning, match="acts in generate"):
        cache = model(**inputs, use_cache=True).past_key_values
    step = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
    bare = build("llava")
    wanted = bare(input_ids=torch.tensor([[5]]), past_key_values=bare(**inputs, use_cache=True).past_key_values).logits
    assert torch.equal(step, wanted)


@pytest.mark.usefixtures("no_grad")
def test_plans_of_calls_do_not_pile_up():
    """A preset by name is bound once."""
    model, inputs = wrapped("none"), prompt("llava")
    for _ in range(3):
        generate(model, inputs, new=1, preset="vcd")
    assert len(record_of(model)._plans) == 2


# Fresh interpreters and the command line


def test_presets_are_known_without_importing_anything_else():
    code = "import vlmattn, json; print(json.dumps({name: info.about for name, info in vlmattn.presets().items()}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    known = json.loads(done.stdout)
    assert set(known) >= EXPECTED
    assert set(known) >= set(RULES), "opera too"
    assert all(known.values())


def test_names_at_the_front_door():
    code = (
        "import vlmattn\n"
        "from vlmattn import AGLA, ICD, M3ID, RBD, VCD, AvisC, Branch, Buckets, Contrast, ContrastiveDecoding, DeCo\n"
        "from vlmattn import Decoding, DoLa, Instead, Noise, PAIGuidance, Recipe\n"
        "assert Recipe.of('pai+vcd').decoding == VCD(), Recipe.of('pai+vcd')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlmattn", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    monkeypatch.setattr(cli.common.console, "width", 200)
    return call


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(make_scene(12, 0)[1]).save(path)
    return str(path)


def test_presets_on_the_command_line(run):
    code, out, _ = run("presets")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for name in RULES:
        assert "decoding" in lines[name]
        assert vlmattn.presets()[name].about in lines[name]
    code, out, _ = run("presets", "--json")
    recipes = {data["name"]: data for data in json.loads(out)}
    for name in RULES:
        assert Recipe.from_dict(recipes[name]) == Recipe.of(name)


@pytest.mark.parametrize("name", RULES)
def test_one_preset_on_the_command_line(run, name, tmp_path):
    code, out, err = run("presets", name)
    assert code == 0, err
    for option in Recipe.of(name).decoding.options():
        assert option in out
    code, out, _ = run("presets", name, "--json")
    (tmp_path / "r.json").write_text(out)
    assert Recipe.of(tmp_path / "r.json") == Recipe.of(name)


@pytest.mark.parametrize("preset", ["vcd", "icd", "pai+m3id", "dola_low"])
def test_ask(run, picture, preset):
    code, out, err = run("ask", picture, "Is there a cup in the image?", "--preset", preset, "--max-new-tokens", "4")
    assert code == 0, err
    assert preset in out
    assert sum(word in line for line in out.splitlines() for word in ("yes", "no ", "no")) >= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "{picture}", "what?", "--preset", "agla"], ["'augmented' needs pixel_values with every call"]),
        (["ask", "{picture}", "what?", "--preset", "vcd+m3id"], ["vcd and m3id conflict"]),
        (["ask", "{picture}", "what?", "--preset", "{tmp}/r.yaml"], ["r.yaml", "vcd.alpha", "0..100", "-1"]),
        (
            ["eval", "--out", "{tmp}/o", "--presets", "vcd,agla", "--scenes", "4", "--suite", "which"],
            ["'agla' needs pixel_values", "leave it out"],
        ),
        (["eval", "--out", "{tmp}/o", "--presets", "vcd+dola_low", "--scenes", "4"], ["vcd and dola conflict"]),
        (["tune", "--out", "{tmp}/o", "--preset", "vcd", "--grid", "alpha=.5,-1"], ["vcd.alpha", "0..100", "-1"]),
        (
            ["tune", "--out", "{tmp}/o", "--preset", "vcd", "--grid", "alfa=1"],
            ["unknown option of 'vcd' 'alfa'", "alpha"],
        ),
        (["tune", "--out", "{tmp}/o", "--preset", "pai+vcd", "--grid", "alpha=1"], ["one method", "has 2"]),
        (
            ["tune", "--out", "{tmp}/o", "--preset", "agla", "--grid", "alpha=1,2", "--scenes", "2", "--shots", "4"],
            ["needs pixel_values", "leave it out"],
        ),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_bad_input_gets_one_line_and_code_two(run, tmp_path, picture, arguments, words):
    (tmp_path / "r.yaml").write_text("schema: 1\nname: x\ninterventions: []\ndecoding: {method: vcd, alpha: -1}\n")
    code, _, err = run(*(a.format(tmp=tmp_path, picture=picture) for a in arguments))
    assert code == 2
    assert "Traceback" not in err
    (line,) = (line for line in err.splitlines() if line.startswith("error:"))
    for word in words:
        assert word in line
    assert not (tmp_path / "o" / "answers.jsonl").exists()


def test_tune(run, tmp_path):
    options = ["--preset", "vcd", "--grid", "alpha=0.5,1", "--suite", "which", "--shots", "6", "--scenes", "6"]
    code, out, err = run("tune", *options, "--out", str(tmp_path / "t"))
    assert code == 0, err
    for name in ("vcd[alpha=0.5]", "vcd[alpha=1.0]"):
        assert name in out
    tuned = Recipe.of(tmp_path / "t" / "tuned.yaml")
    assert tuned.decoding in (VCD(alpha=0.5), VCD(alpha=1.0))
    record = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert record["chosen"] == tuned.name
    assert all(setting["fired"] for setting in record["settings"])


def test_eval_runs_resumes_and_records(run, tmp_path):
    out = tmp_path / "run"
    options = ["eval", "--suite", "which", "--presets", "vcd,pai+m3id", "--scenes", "4", "--out", str(out)]
    code, _, err = run(*options)
    assert code == 0, err
    summary = json.loads((out / "summary.json").read_text())
    for name in ("vcd", "pai+m3id"):
        assert summary["recipes"][name] == Recipe.of(name).to_dict()
        assert Recipe.from_dict(summary["recipes"][name]) == Recipe.of(name)
    assert summary["reports"]["vcd"]["fired"]["vcd"] > 0
    assert list(summary["tables"][0]["rows"]) == ["none", "vcd", "pai+m3id"]
    answers = (out / "answers.jsonl").read_text().splitlines()
    kept = answers[: 2 * len(answers) // 3]
    (out / "answers.jsonl").write_text("\n".join(kept) + "\n")
    code, said, err = run(*options)
    assert code == 0, err
    assert "resuming" in said + err
    again = json.loads((out / "summary.json").read_text())
    assert again["tables"] == summary["tables"]
    assert sorted((out / "answers.jsonl").read_text().splitlines()) == sorted(answers)
    code, _, err = run(*[word if word != "vcd,pai+m3id" else "vcd_pope" for word in options])
    assert code == 2, "another rule is another run"
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.usefixtures("no_grad")
def test_an_eval_cannot_record_a_rule_made_by_hand(tmp_path):
    from vlmattn.evals.runner import evaluate
    from vlmattn.evals.suites import Pope, World

    model, processor = vlmattn.load("embedded")
    suites = [Pope.on_scenes([World("clear", 0.5, 2, 12)])]
    with pytest.raises(OptionError, match=BY_HAND):
        evaluate(model, processor, suites, [Recipe.of(by_hand())], tmp_path / "o", "embedded", say=lambda text: None)
    assert not hasattr(model, "vlmattn")
    assert not (tmp_path / "o").exists()
