"""Assisted decoding: wrapped models that are helped, that help, and that help themselves."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE_TOKEN, build, prompt, windowed
from transformers import PreTrainedModel

import vlmattn
from vlmattn import UnsupportedError
from vlmattn.wrapping import handle_of

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]
GREEDY = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, suppress_tokens=[IMAGE_TOKEN])
RECIPES = ("none", "pai", "vcd", "rbd", "dola_low", "fastv", "visionzip", "sparsevlm", "vhr+vcd", "fastv+deco")
HELPERS = (*RECIPES, "opera", "avl", "recycled", "m3id")


@functools.cache
def model(seed: int) -> PreTrainedModel:
    """A model that answers, or one of other weights that drafts."""
    return build("llava", seed=seed)


def put(one: PreTrainedModel, recipe: str) -> PreTrainedModel:
    if handle_of(one) is not None:
        vlmattn.unwrap(one)
    return vlmattn.wrap(one, recipe) if recipe != "none" else one


def inputs(seed: int) -> dict[str, torch.Tensor]:
    return prompt("llava", 1 + seed % 2, 5, seed)


@given(recipe=st.sampled_from(RECIPES), helper=st.sampled_from((*HELPERS, "itself")), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_an_assistant_never_changes_the_answer(recipe, helper, seed):
    main, given = put(model(0), recipe), inputs(seed)
    wanted = main.generate(**given, **GREEDY)
    assistant = main if helper == "itself" else put(model(1), helper)
    assert torch.equal(main.generate(**given, **GREEDY, assistant_model=assistant), wanted)
    assert torch.equal(main.generate(**given, **GREEDY), wanted), "nothing stays"


@pytest.mark.parametrize("main", ["none", "vcd"])
def test_a_rule_on_the_assistant_rests(main):
    """It drafts bare: as many of its drafts are right as of the bare model's."""
    given, calls = inputs(1), []
    answering, assistant = put(model(0), main), put(build("llava", seed=0), "vcd")
    count = assistant.register_forward_hook(lambda *_: calls.append(1))
    answering.generate(**given, **GREEDY, assistant_model=assistant)
    ruled, calls[:] = len(calls), []
    vlmattn.unwrap(assistant)
    answering.generate(**given, **GREEDY, assistant_model=assistant)
    count.remove()
    assert ruled == len(calls) > 0


def test_sampling_with_an_assistant_runs():
    torch.manual_seed(0)
    options = {**GREEDY, "do_sample": True}
    out = put(model(0), "vcd").generate(**inputs(1), **options, assistant_model=put(model(1), "vcd"))
    assert out.shape[1] == inputs(1)["input_ids"].shape[1] + 8


@pytest.mark.parametrize("recipe", ["vcd", "deco"])
def test_a_rule_cannot_take_drafts_back_from_a_window(recipe):
    main, other = vlmattn.wrap(windowed(8), recipe), windowed(8, seed=1)
    with pytest.raises(UnsupportedError, match=r"^the decoding rule of '\w+' cannot take drafts back .* window of 8"):
        main.generate(**inputs(1), **GREEDY, assistant_model=other)
    assert main.generate(**inputs(1), **GREEDY).shape[1] > 8
