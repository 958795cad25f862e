"""Models of no registered family: served if their attention can be reached and is what it seems, else refused with a remedy."""

from __future__ import annotations

import types

import pytest
import torch
from tiny import build, generate, prompt
from transformers import CLIPConfig, CLIPModel, LlavaForConditionalGeneration
from zoo import ZOO

import vlmattn
from vlmattn import PAI, UnsupportedError, compat
from vlmattn.models import find_family, registry
from vlmattn.models.llava import Llava

pytestmark = pytest.mark.usefixtures("no_grad")
EDIT = PAI(alpha=0.9, layers="0:")


@pytest.fixture
def unknown(monkeypatch):
    """A LLaVA that no family knows."""
    monkeypatch.setattr(registry, "_FAMILIES", {name: f for name, f in registry._FAMILIES.items() if name != "llava"})
    return build("llava")


def test_attention_edits_of_an_unknown_model(unknown, monkeypatch):
    inputs = prompt("llava")
    bare = generate(unknown, inputs)
    with pytest.warns(UserWarning, match="no family knows LlavaForConditionalGeneration"):
        vlmattn.wrap(unknown, EDIT)
    found = generate(unknown, inputs)
    assert not torch.equal(found, bare)
    vlmattn.unwrap(unknown)
    assert torch.equal(generate(unknown, inputs), bare)
    monkeypatch.undo()
    assert torch.equal(generate(vlmattn.wrap(unknown, EDIT), inputs), found)


@pytest.mark.parametrize("recipe", ["sofa", "fastv", "vcd"])
def test_other_kinds_of_methods_are_refused(unknown, recipe):
    with pytest.raises(
        UnsupportedError, match=rf"'{recipe}' does not run on llava: no family knows this model; add one"
    ):
        vlmattn.wrap(unknown, recipe)


def swallow(self, hidden_states, **_):
    return torch.zeros_like(hidden_states), None


@pytest.mark.parametrize("code", ["of its own", "of a subclass elsewhere"])
def test_attention_that_does_not_come_to_us(unknown, code, monkeypatch):
    """Also where the model type is a known one and the class is not transformers' own, as with remote code."""
    if code != "of its own":
        monkeypatch.undo()
        unknown.__class__ = type("Mine", (LlavaForConditionalGeneration,), {"__module__": "transformers_modules.mine"})
    attention = unknown.model.language_model.layers[2].self_attn
    attention.forward = types.MethodType(swallow, attention)
    before = set(unknown.__dict__)
    with pytest.raises(UnsupportedError, match=r"layers \[2\] does not go through .* register a family for it"):
        vlmattn.wrap(unknown, EDIT)
    assert set(unknown.__dict__) == before
    assert unknown.config.text_config._attn_implementation == "sdpa"


def test_attention_that_is_no_softmax(unknown, monkeypatch):
    """Scores that the base implementation changes by itself."""
    original = compat.attention_function

    def doubled(name, module):
        found = original(name, module)
        return lambda module, query, *args, **kwargs: found(module, query * 2, *args, **kwargs)

    monkeypatch.setattr(compat, "attention_function", doubled)
    with pytest.raises(UnsupportedError, match="not a plain softmax over keys"):
        vlmattn.wrap(unknown, EDIT)


def test_models_that_are_something_else():
    config = CLIPConfig(
        text_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8),
        vision_config=dict(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8
        ),
    )
    with pytest.raises(UnsupportedError, match=r"it writes no text.*AutoModelForImageTextToText"):
        vlmattn.wrap(CLIPModel(config), EDIT)
    with pytest.raises(
        UnsupportedError, match="is not supported: it is an encoder-decoder: its image tokens are in the encoder"
    ):
        vlmattn.wrap(ZOO["florence2"].build(), EDIT)


def test_families_of_users(unknown):
    """A registered family serves all kinds of methods, without a warning; a model type has one family."""

    class Mine(Llava):
        model_types = {"llava": "me/mine"}  # noqa: RUF012

    vlmattn.register_family(Mine())
    assert isinstance(find_family(unknown), Mine)
    inputs = prompt("llava")
    bare = generate(unknown, inputs)
    assert not torch.equal(generate(vlmattn.wrap(unknown, "vcd"), inputs), bare)
    with pytest.raises(UnsupportedError, match="'llava' is already served by Mine"):
        vlmattn.register_family(Mine())
    with pytest.raises(UnsupportedError, match="names no model types"):
        vlmattn.register_family(vlmattn.Family())
