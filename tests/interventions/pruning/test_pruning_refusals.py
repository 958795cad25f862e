"""Pruning that would be silently wrong is refused with a remedy; recipes with pruning are read and written like others."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from numerics import near
from tiny import build, generate, left_padded, prompt

import vlmattn
from vlmattn import PAI, VAR, InputError, OptionError, Recipe, StateError, UnknownNameError, UnsupportedError
from vlmattn.anatomy import Anatomy
from vlmattn.binding import bind
from vlmattn.interventions.pruning import FastV, PyramidDrop

no_grad = pytest.mark.usefixtures("no_grad")
family_matrix = pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
SIZES = Anatomy("llava", 32, 32, 32, 128, 4096, ("llama", 4096, 32, 11008), tower_layers=24)
PLACEHOLDERS = [96, 97, 98, 99]
EARLY = FastV(layer=1)


def right_padded(prompts: list[dict]) -> dict:
    length = max(p["input_ids"].shape[1] for p in prompts)
    batch = left_padded(prompts)
    for key in batch.keys() & {"input_ids", "attention_mask", "mm_token_type_ids"}:
        batch[key] = torch.cat([torch.nn.functional.pad(p[key], (0, length - p[key].shape[1])) for p in prompts])
    return batch


# --- at wrap


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("fastv", {"layer": 0}, r"fastv: tokens can be dropped before the layers 1\.\.3 of this model, got 0"),
        ("fastv", {"layer": 4}, r"fastv: tokens can be dropped before the layers 1\.\.3 of this model, got 4"),
        ("fastv", {"layer": -1}, r"fastv\.layer must be a number within 0\.\.10000, got -1"),
        ("fastv", {"layer": 1.5}, r"fastv\.layer must be a whole number, got 1\.5"),
        ("fastv", {"layer": True}, r"fastv\.layer must be a whole number, got True"),
        ("fastv", {"keep_ratio": 1.5}, r"fastv\.keep_ratio must be a number within 0\.\.1, got 1\.5"),
        ("fastv", {"keep_ratio": -0.1}, r"fastv\.keep_ratio must be a number within 0\.\.1, got -0\.1"),
        ("fastv", {"keep_ratio": float("nan")}, r"fastv\.keep_ratio must be a number within 0\.\.1, got nan"),
        ("fastv", {"keep_ratio": "half"}, r"fastv\.keep_ratio must be a number within 0\.\.1, got 'half'"),
        ("fastv", {"keep_tokens": -1}, r"fastv\.keep_tokens must be a number within"),
        ("fastv", {"mode": "hide"}, r"fastv\.mode must be one of drop, mask; got 'hide'"),
        ("pyramiddrop", {"positions": "new"}, r"pyramiddrop\.positions must be one of compact, original; got 'new'"),
        ("pyramiddrop", {"layers": "0,1,2"}, r"before the layers 1\.\.3 of this model, got 0"),
        ("pyramiddrop", {"layers": "1,2,9"}, r"pyramiddrop\.layers names layer 9, but the decoder has layers 0\.\.3"),
        ("pyramiddrop", {"layers": "2,1,3"}, r"pyramiddrop\.layers must ascend, got \[2, 1, 3\]"),
        ("pyramiddrop", {"layers": "1,1,2"}, r"pyramiddrop\.layers must ascend, got \[1, 1, 2\]"),
        ("pyramiddrop", {"layers": "1:"}, r"pyramiddrop\.layers must name one layer for each stage, got '1:'"),
        ("pyramiddrop", {"layers": "one"}, r"pyramiddrop\.layers must look like"),
        (
            "pyramiddrop",
            {"layers": "1,2"},
            r"keep_ratios must have one ratio for each of the 2 layers in pyramiddrop.layers, got 3",
        ),
        ("pyramiddrop", {"keep_ratios": (0.5,)}, r"one ratio for each of the 3 layers in pyramiddrop.layers, got 1"),
        ("pyramiddrop", {"keep_ratios": (0.5, 0.75, 0.25)}, r"keep_ratios must fall and lie within 0\.\.1, got"),
        ("pyramiddrop", {"keep_ratios": (1.5, 0.5, 0.25)}, r"keep_ratios must fall and lie within 0\.\.1, got"),
        ("pyramiddrop", {"keep_ratios": (0.5, float("nan"), 0.2)}, r"keep_ratios must fall and lie within 0\.\.1, got"),
        ("pyramiddrop", {"keep_ratios": (0.5, -0.5, 0.2)}, r"pyramiddrop\.keep_ratios must be a list of positive"),
        ("pyramiddrop", {"keep_ratios": 0.5}, r"pyramiddrop\.keep_ratios must be a list of positive numbers, got 0\.5"),
    ],
)
def test_settings_that_cannot_be(method, options, match):
    model = build("llava")
    with pytest.raises(OptionError, match=match):
        vlmattn.wrap(model, method, **options)
    assert "vlmattn" not in model.__dict__
    assert model.config.get_text_config()._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "pair",
    [
        [FastV(layer=2), FastV(layer=2, keep_ratio=0.25)],
        [FastV(layer=2), PyramidDrop(layers="1,2,3")],
        [PyramidDrop(layers="1,2,3"), FastV(layer=3)],
    ],
    ids=["fastv twice", "fastv in a stage", "in another stage"],
)
def test_two_methods_before_the_same_layer(pair):
    names = [method.info.name for method in pair]
    match = rf"'{names[0]}' and '{names[1]}' conflict: both choose tokens before layer [23]; use one of them"
    with pytest.raises(OptionError, match=match):
        vlmattn.wrap(build("llava"), pair)
    vlmattn.wrap(build("llava"), [FastV(layer=1), FastV(layer=2, keep_ratio=0.25)])


@pytest.mark.parametrize(("layer", "works"), [(1, False), (2, False), (3, True)])
def test_image_features_that_come_in_later(layer, works):
    """DeepStack adds them to the rows of all image tokens after the first layers."""
    sizes = replace(SIZES, deepstack=3)
    for method in (FastV(layer=layer), PyramidDrop(layers=f"{layer},8,16", positions="original")):
        if works:
            bind(Recipe.of(method), sizes)
            continue
        with pytest.raises(
            OptionError, match=rf"image features after its first 3 layers; drop .* or later, got {layer}"
        ):
            bind(Recipe.of(method), sizes)
    bind(Recipe.of(FastV(layer=layer)), SIZES)


def test_positions_of_several_axes_are_not_counted_anew():
    model = build("qwen2_5_vl")
    with pytest.raises(
        OptionError, match=r"pyramiddrop counts positions anew, .* 3 positions each; use positions='original'"
    ):
        vlmattn.wrap(model, "pyramiddrop", layers="1,2,3")
    vlmattn.wrap(model, "pyramiddrop", layers="1,2,3", positions="original")


# --- prompts


@no_grad
@family_matrix
def test_padding_on_the_right(family):
    model = vlmattn.wrap(build(family), EARLY)
    batch = right_padded([prompt(family), prompt(family, words=9, seed=5)])
    with pytest.raises(InputError, match=r"'fastv' drops tokens, .* padded on the left; .*padding_side = 'left'"):
        model(**batch)
    with pytest.raises(InputError, match="padded on the left"):
        generate(model, batch)


@no_grad
def test_a_prompt_that_ends_in_an_image():
    """Also one of a batch; the last token chooses, and it must be there in every layer."""
    model, ends, other = vlmattn.wrap(build("llava"), EARLY), prompt("llava", words=0), prompt("llava", words=2)
    for inputs in (ends, left_padded([other, ends])):
        with pytest.raises(
            InputError, match=r"'fastv' drops image tokens, and a prompt ends in one; .*behind the image"
        ):
            generate(model, inputs)
    generate(model, other)
    generate(vlmattn.wrap(build("qwen2_5_vl"), EARLY), prompt("qwen2_5_vl", words=0))  # a marker follows


@no_grad
@family_matrix
def test_a_prompt_without_images(family):
    """As for edits; a later turn may have none, and so may some sequences of a batch."""
    model, text = vlmattn.wrap(build(family), EARLY), torch.tensor([[1, 5, 6, 7]])
    words = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    found = model(**words).logits, model.generate(**words, max_new_tokens=2)
    vlmattn.unwrap(model)
    assert torch.equal(found[0], model(**words).logits)
    assert torch.equal(found[1], model.generate(**words, max_new_tokens=2))


@no_grad
def test_training():
    model, inputs = vlmattn.wrap(build("llava"), EARLY), prompt("llava")
    logits = model(**inputs).logits[:, -1]
    with pytest.raises(UnsupportedError, match=r"'fastv' drops tokens, .*no loss .*leave labels out"):
        model(**inputs, labels=inputs["input_ids"])
    model.train()
    with pytest.raises(UnsupportedError, match=r"'fastv' drops tokens, which is for inference; call model\.eval\(\)"):
        model(**inputs)
    assert torch.equal(model.eval()(**inputs).logits[:, -1], logits), "refused calls leave no trace"


@no_grad
def test_a_prompt_in_chunks():
    with pytest.raises(UnsupportedError, match="prefill_chunk_size=None"):
        generate(vlmattn.wrap(build("llava"), EARLY), prompt("llava"), prefill_chunk_size=8)


# --- caches


@no_grad
@pytest.mark.parametrize("words", [[40], [40, 41]], ids=["one word", "words"])
def test_a_cache_that_was_cropped_into_the_prompt(words):
    """What lies behind the cut is in other slots of every layer, and some of it is gone."""
    model, inputs = vlmattn.wrap(build("llava"), EARLY), prompt("llava", images=2)
    for kept in (5, 19, inputs["input_ids"].shape[1] - 1):
        for ask in ("directly", "generate"):
            cache = model(**inputs, use_cache=True).past_key_values
            cache.crop(kept - cache.get_seq_length())
            assert cache.get_seq_length() == kept
            more, call = {"input_ids": torch.tensor([words]), "past_key_values": cache}, model
            if ask == "generate":
                ids = torch.cat([inputs["input_ids"][:, :kept], more["input_ids"]], 1)
                more |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                call = partial(model.generate, max_new_tokens=2)
            with pytest.raises(StateError, match=rf"cropped to {kept} tokens, within a prompt .*start a new generate"):
                call(**more)


@no_grad
@pytest.mark.parametrize("method", [EARLY, PyramidDrop(layers="1,2,3")], ids=["fastv", "pyramiddrop"])
@pytest.mark.parametrize("words", [[50], [50, 51, 52]], ids=["one word", "words"])
def test_a_cache_that_was_cropped_behind_the_images(words, method):
    """Not a refusal: another question about the same pruned images, with no token of the old one."""
    model, inputs = vlmattn.wrap(build("llava"), method), prompt("llava", images=2)
    ask = torch.tensor([words])
    cache = model(**inputs, use_cache=True).past_key_values
    expected = model(input_ids=ask, past_key_values=cache).logits
    cache = model(**inputs, use_cache=True).past_key_values
    model(input_ids=torch.tensor([[40, 41, 42, 43]]), past_key_values=cache)
    cache.crop(-4)
    torch.testing.assert_close(model(input_ids=ask, past_key_values=cache).logits, expected, rtol=0, atol=1e-6)


@no_grad
def test_a_cache_of_another_recipe():
    """Its layers hold other tokens."""
    model, inputs, more = vlmattn.wrap(build("llava"), EARLY), prompt("llava"), {"input_ids": torch.tensor([[5, 6]])}
    cache = model(**inputs, use_cache=True).past_key_values
    model.vlmattn.set(FastV(layer=1, keep_ratio=0.25))
    with pytest.raises(StateError, match=r"filled with recipe 'fastv' and cannot go on with 'fastv'.*start a new"):
        model(**more, past_key_values=cache)
    model.vlmattn.disable()
    with pytest.raises(StateError, match="start a new generate"):
        model(**more, past_key_values=cache)


@no_grad
def test_a_method_that_has_nothing_to_drop_says_so():
    model, inputs = vlmattn.wrap(build("llava"), FastV(layer=1, keep_ratio=1.0)), prompt("llava")
    with pytest.warns(UserWarning, match=r"fastv never fired.*model\.vlmattn\.report"):
        generate(model, inputs)


# --- recipes


def test_names_and_options():
    both = Recipe.of("fastv+var")
    assert (both.interventions, both.pruning, both.decoding) == ((VAR(),), (FastV(),), None)
    assert both.names == ("var", "fastv")
    assert Recipe.of([FastV(), VAR()]).pruning == both.pruning
    few = Recipe.of("fastv", keep_tokens=8)
    assert few.pruning == (FastV(keep_tokens=8),)
    assert few.name == "fastv[keep_tokens=8]"
    assert Recipe.of("fastv_k3_r75").pruning == (FastV(layer=3, keep_ratio=0.25),)
    assert Recipe.of("pyramiddrop", keep_ratios=[0.5, 0.5, 0.0]).pruning == (PyramidDrop(keep_ratios=(0.5, 0.5, 0.0)),)
    assert not both.is_none
    assert not Recipe.of(FastV()).is_none
    assert not bind(Recipe.of("fastv"), SIZES).is_identity
    with pytest.raises(OptionError, match="need a recipe of one method; 'fastv\\+var' has 2"):
        Recipe.of("fastv+var", layer=3)
    with pytest.raises(UnknownNameError, match="unknown option of 'fastv' 'keep_rato'; did you mean keep_ratio"):
        Recipe.of("fastv", keep_rato=0.5)
    with pytest.raises(UnknownNameError, match="unknown preset 'fastvv'; did you mean fastv"):
        Recipe.of("fastvv+var")


RECIPES = [
    Recipe.of("fastv"),
    Recipe.of("fastv+var"),
    Recipe.of("pai+pyramiddrop_positions+dola_low"),
    Recipe.of([FastV(layer=3, keep_tokens=7, mode="mask"), PyramidDrop(layers="1,2", keep_ratios=(0.5, 1e-5))]),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_read_back_as_it_was_written(recipe, tmp_path):
    data = recipe.to_dict()
    assert [method["method"] for method in data["pruning"]] == [method.info.name for method in recipe.pruning]
    assert not {"fastv", "pyramiddrop"} & {method["method"] for method in data["interventions"]}
    assert Recipe.from_dict(data) == Recipe.from_dict(json.loads(json.dumps(data))) == recipe
    assert Recipe.from_text(recipe.to_yaml()) == Recipe.from_text(recipe.to_json()) == recipe
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    recipe.save_pretrained(tmp_path)
    assert Recipe.of(tmp_path) == Recipe.from_pretrained(tmp_path) == recipe
    assert hash(Recipe.of(tmp_path)) == hash(recipe)


def test_recipes_without_pruning_do_not_name_it():
    assert "pruning" not in Recipe.of("var").to_dict()


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (InputError, r"unknown key 'prunning'", lambda d: d.update(prunning=d.pop("pruning"))),
        (InputError, r"'fastv' is in the wrong place; it goes to 'pruning'", lambda d: d.update(interventions=d.pop("pruning"))),
        (InputError, r"'pai' is in the wrong place; it goes to 'interventions'", lambda d: d["pruning"].append({"method": "pai"})),
        (InputError, r"every intervention, pruning method and decoding needs a 'method'", lambda d: d["pruning"].append({"layer": 2})),
        (UnknownNameError, r"unknown option of 'fastv' 'ratio'", lambda d: d["pruning"][0].update(ratio=0.5)),
        (UnknownNameError, r"unknown method 'fastw'; did you mean fastv", lambda d: d["pruning"][0].update(method="fastw")),
        (OptionError, r"fastv\.keep_ratio must be a number", lambda d: d["pruning"][0].update(keep_ratio=2)),
    ],
)  # fmt: skip
def test_files_that_are_no_recipes(error, match, change):
    data = Recipe.of("fastv").to_dict()
    change(data)
    with pytest.raises(error, match=match):
        Recipe.from_dict(data)


@no_grad
def test_a_model_that_was_saved_finds_its_pruning(tmp_path):
    model, inputs = build("llava"), prompt("llava")
    vlmattn.wrap(model, [EARLY, PAI(layers="0:")]).save_pretrained(tmp_path)
    expected = generate(model, inputs, suppress_tokens=PLACEHOLDERS)
    again = type(model).from_pretrained(tmp_path).eval()
    plain = generate(again, inputs, suppress_tokens=PLACEHOLDERS)
    vlmattn.wrap(again)
    assert again.vlmattn.recipe == model.vlmattn.recipe
    near(generate(again, inputs, suppress_tokens=PLACEHOLDERS), expected)
    assert (plain - expected).abs().max() > 0.05
    assert again.vlmattn.report()["recipe"]["pruning"] == [{"method": "fastv", **EARLY.options()}]
