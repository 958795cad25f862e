"""Models of no registered family: served if their attention can be reached and is what it seems, else refused with a remedy."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
from tiny import IMAGE_TOKEN, build, generate, prompt
from transformers import CLIPConfig, CLIPModel, LlavaForConditionalGeneration
from zoo import ZOO

import vlmattn
from vlmattn import PAI, UnsupportedError, compat
from vlmattn.models import find_family, registry
from vlmattn.models.inputs import warn_of_runs
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
        UnsupportedError, match="is not supported: it is an encoder-decoder, which reads the image by cross-attention"
    ):
        vlmattn.wrap(ZOO["florence2"].build(), EDIT)


def side_by_side(between: int = 0) -> dict[str, Any]:
    """A LLaVA prompt of two images with ``between`` words between them."""
    image = [IMAGE_TOKEN] * 16
    ids = torch.tensor([[1, 5, *image, *[6] * between, *image, 7]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    }


def test_images_side_by_side_that_a_family_does_not_tell_apart(unknown):
    """Warned of once per process, where it matters; the remedies work."""
    warn_of_runs.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*side by side")
        vlmattn.wrap(unknown, EDIT)
        generate(unknown, side_by_side(between=1))
        generate(unknown, prompt("llava"))
    with pytest.warns(
        UserWarning, match=r"family of llava does not tell images .* side by side .* put text between"
    ) as told:
        [generate(unknown, side_by_side()) for _ in range(2)]
    assert sum("side by side" in str(one.message) for one in told) == 1
    vlmattn.unwrap(unknown)
    warn_of_runs.cache_clear()

    @vlmattn.register_family
    class Mine(vlmattn.Family):
        model_types = {"llava": "me/mine"}  # noqa: RUF012
        even = True

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*side by side")
        inputs = side_by_side()
        found = Mine().image_numbers(unknown, inputs, Mine().token_types(unknown, inputs["input_ids"]))
    assert found[0].tolist() == [-1, -1, *[0] * 16, *[1] * 16, -1]


def test_tokens_have_no_place_unless_a_family_says_square(unknown):
    class Square(vlmattn.Family):
        square = True

    inputs = side_by_side(between=1)
    assert vlmattn.Family().image_layout(unknown, inputs, 0, 16) == ()
    (piece,) = Square().image_layout(unknown, inputs, 0, 16)
    assert piece.tokens.shape == (4, 4)


def test_families_of_users(unknown):
    """A registered family serves all kinds of methods, without a warning; a model type has one family."""

    class Mine(Llava):
        model_types = {"llava": "me/mine"}  # noqa: RUF012

    vlmattn.register_family(Mine)
    assert isinstance(find_family(unknown), Mine)
    inputs = prompt("llava")
    bare = generate(unknown, inputs)
    assert not torch.equal(generate(vlmattn.wrap(unknown, "vcd"), inputs), bare)
    with pytest.raises(UnsupportedError, match="'llava' is already served by Mine"):
        vlmattn.register_family(Mine)
    with pytest.raises(UnsupportedError, match="names no model types"):
        vlmattn.register_family(vlmattn.Family)
