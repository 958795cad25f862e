"""Recipes bound to the sizes of a model: what the plan says, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmattn import PAI, VHR, OptionError, Recipe, UnsupportedError
from vlmattn.anatomy import Anatomy
from vlmattn.binding import bind

SIZES = Anatomy("llava", 32, 32, 32, 128, 4096, ("llama", 4096, 32, 11008), tower_layers=24)


def test_binding_puts_methods_into_their_layers():
    plan = bind(Recipe.of([PAI(layers="0,-1"), VHR(layers="1:3")]), SIZES)
    assert [tuple(m.info.name for m in methods) for methods in plan.by_layer] == [
        ("pai",),
        ("vhr",),
        ("vhr",),
        *[()] * 28,
        ("pai",),
    ]
    assert [m.info.name for m in plan.before_prefill] == ["vhr"]
    assert not any(plan.on_hidden_states)
    var = bind(Recipe.of("var"), SIZES)
    assert [bool(methods) for methods in var.on_hidden_states] == [2 <= layer < 31 for layer in range(32)]
    assert var.by_layer[2][0].dims == (1415, 2533), "looked up by the language model"


def test_what_a_plan_says_of_text():
    """VHR reads the text of the prompt by itself before the prompt is read."""
    facts = {name: bind(Recipe.of(name), SIZES) for name in ("none", "pai", "vhr", "mma", "fastv")}
    assert [name for name, plan in facts.items() if plan.text_first] == ["none", "pai", "mma", "fastv"]
    assert [name for name, plan in facts.items() if plan.edits_text] == ["vhr"]
    assert not any(plan.texts for plan in facts.values())


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [("sofa", "masks"), ("sofa", "opening"), ("pai", "edits"), ("fastv", "pruning"), ("avl", "pruning"), ("gift", "turns"),
     ("vcd", "decoding"), ("opera", "decoding"), ("opera", "looking"), ("rbd", "looking"), ("buckets", "rotating"), ("m3id", "dropping")],
)  # fmt: skip
def test_kinds_that_a_family_refuses(recipe, kind):
    bind(Recipe.of(recipe), replace(SIZES, refused=(("other", "no"),)))
    name = Recipe.of(recipe).names[0]
    with pytest.raises(UnsupportedError, match=f"'{name}' does not run on llava: no room"):
        bind(Recipe.of(recipe), replace(SIZES, refused=((kind, "no room"),)))


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("fastv+opera", "'fastv' and 'opera' conflict: the decoding rule needs all image tokens in every layer"),
        ("fastv+fastv", "'fastv' and 'fastv' conflict: both choose tokens before layer 2"),
        ("avl+vcd", "'avl' and 'vcd' conflict: the decoding rule needs whole caches"),
        ("avl+opera", "'avl' and 'opera' conflict: the decoding rule needs whole caches"),
        ("pai+pai", "'pai' is in the recipe twice for the same layers"),
    ],
)
def test_conflicts(recipe, why):
    with pytest.raises(OptionError, match=why):
        bind(Recipe.of(recipe), SIZES)


def test_an_idle_rule_is_none():
    assert bind(Recipe.of("vcd", alpha=0.0, beta=0.0), SIZES).decoding is None
    assert bind(Recipe.of("vcd", alpha=0.0, beta=0.0), SIZES).branch_names == ("noised",)
