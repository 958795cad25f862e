"""A conversation that goes on from a cache: text first, then images; a second question. As in one piece, or refused, or in the docs."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, prompt
from transformers import DynamicCache

import vlmattn
from vlmattn import InputError, StateError

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:va[rf]|vlmattn:UserWarning")]

SYSTEM = torch.tensor([[1, 5, 6]])
DOCS = Path(__file__).parents[2] / "docs" / "turns.md"
ANEW = ("var", "var_official", "sofa", "bidirectional_images", "isolate_images", "knockout_image_text", "knockout_sinks",
        "heads_random_half", "visionzip", "recycled", "rounds", "longheads")  # fmt: skip
OTHERWISE = ("vhr", "pai", "paint", "heads_guided", "bidirectional_prompt", "knockout_image_last", "calibration", "fastv",
             "pyramiddrop", "sparsevlm", "avl")  # fmt: skip


def answer(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, suppress_tokens=[99],
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def logits(out):
    return torch.stack(out.logits, 1)


def close(one, other):
    torch.testing.assert_close(logits(one), logits(other), rtol=0, atol=2e-5)


def behind(ids, family="llava", seed=1):
    """A prompt with an image behind other tokens, as one prompt."""
    own = prompt(family, seed=seed)
    ids = torch.cat([ids, own["input_ids"]], 1)
    found = {**own, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found if family == "llava" else {**found, "mm_token_type_ids": (ids == 99).int()}


def empty(model):
    return DynamicCache(config=model.config.get_text_config())


def read(model):
    return model(input_ids=SYSTEM, past_key_values=empty(model)).past_key_values


TEXT_FIRST = (
    "pai",
    "var",
    "sofa",
    "paint",
    "heads_random_half",
    "heads_guided",
    "fastv",
    "sparsevlm",
    "visionzip",
    "recycled",
)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", TEXT_FIRST)
def test_a_system_prompt_is_read_once_for_many_pictures(name, family):
    if family != "llava":  # with three positions for each token
        name = {"sparsevlm": "sparsevlm_plus", "visionzip": "visionzip_positions"}.get(name, name)
    model = vlmattn.wrap(build(family), name)
    cache = read(model)
    for seed in (1, 2):
        whole = behind(SYSTEM, family, seed)
        close(answer(model, whole, past_key_values=copy.deepcopy(cache)), answer(model, whole))


@pytest.mark.parametrize("name", TEXT_FIRST)
def test_a_first_turn_without_images(name):
    model = vlmattn.wrap(build("llava"), name)
    text = {"input_ids": SYSTEM, "attention_mask": torch.ones_like(SYSTEM)}
    first = answer(model, text, past_key_values=empty(model))
    whole = behind(first.sequences)
    close(answer(model, whole, past_key_values=first.past_key_values), answer(model, whole))


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(TEXT_FIRST), words=st.lists(st.integers(5, 80), min_size=1, max_size=9), data=st.data())
def test_any_text_in_any_pieces(name, words, data):
    """Text before an image may come in as many forwards as one likes."""
    model, text = vlmattn.wrap(build("llava"), name), torch.tensor([[1, *words]])
    cuts = sorted(data.draw(st.sets(st.integers(1, len(words) + 1), min_size=1, max_size=3)))
    cache, whole = empty(model), behind(text)
    for start, stop in pairwise([0, *cuts]):
        cache = model(input_ids=text[:, start:stop], past_key_values=cache).past_key_values
    close(answer(model, whole, past_key_values=cache), answer(model, whole))


def test_a_padded_batch_and_beams_behind_a_text():
    model = vlmattn.wrap(build("llava"), "pai")
    rows = [behind(SYSTEM), behind(torch.tensor([[1, 7]]))]
    width = rows[0]["input_ids"].shape[1]
    padded = [torch.nn.functional.pad(row["input_ids"], (width - row["input_ids"].shape[1], 0)) for row in rows]
    ids = torch.cat(padded)
    mask = torch.tensor([[1] * width, [0] + [1] * (width - 1)])
    whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat([row["pixel_values"] for row in rows])}
    for options in ({}, {"num_beams": 2}):
        text = {
            "input_ids": ids[:, :3],
            "attention_mask": mask[:, :3],
            "position_ids": (mask.cumsum(1) - 1)[:, :3].clamp_min(0),
        }
        cache = model(**text, past_key_values=empty(model)).past_key_values
        if options:
            cache.batch_repeat_interleave(2)
        close(answer(model, whole, past_key_values=cache, **options), answer(model, whole, **options))


@pytest.mark.parametrize("name", ["pai", "sofa", "paint", "heads_guided", "fastv", "sparsevlm", "visionzip"])
def test_text_that_the_bare_model_read(name):
    """``disable()``, as the error about prompts without images advises; then the recipe goes on."""
    model = vlmattn.wrap(build("llava"), name)
    with pytest.raises(InputError, match=r"call model\.vlmattn\.disable\(\)"):
        model(input_ids=SYSTEM)
    model.vlmattn.disable()
    cache = read(model)
    model.vlmattn.enable()
    close(answer(model, behind(SYSTEM), past_key_values=cache), answer(model, behind(SYSTEM)))


def test_text_that_another_recipe_read_without_a_change():
    model = vlmattn.wrap(build("llava"), "pai")
    cache, whole = read(model), behind(SYSTEM)
    model.vlmattn.set("sofa+pai")
    close(answer(model, whole, past_key_values=copy.deepcopy(cache)), answer(model, whole))
    model.vlmattn.disable()
    found = answer(model, whole, past_key_values=cache)
    close(found, answer(vlmattn.unwrap(model), whole))


@pytest.mark.parametrize(
    "name", ["var", "knockout_sinks", "heads_random_half", "recycled", "vhr", "bidirectional_prompt"]
)
def test_text_that_the_recipe_had_to_read_itself(name):
    model = vlmattn.wrap(build("llava"), name)
    model.vlmattn.disable()
    cache, whole = read(model), behind(SYSTEM)
    model.vlmattn.enable()
    match = f"filled without vlmattn, and '{name}' must see every token.*whole conversation, and a new cache"
    with pytest.raises(StateError, match=match):
        answer(model, whole, past_key_values=cache)
    close(answer(model, whole, past_key_values=empty(model)), answer(model, whole))


@pytest.mark.parametrize("name", ["vhr", "avl", "rounds", "bidirectional_prompt"])
def test_recipes_that_read_all_at_once_say_so_at_the_first_text(name):
    model = vlmattn.wrap(build("llava"), name)
    with pytest.raises(InputError, match=f"no image tokens.*'{name}' cannot go on from their cache.*as one prompt"):
        read(model)
    answer(model, behind(SYSTEM))


def test_caches_with_unknown_tokens_or_images():
    model, whole = vlmattn.wrap(build("llava"), "pai"), behind(SYSTEM)
    model.vlmattn.disable()
    cache, seen = read(model), answer(model, whole)
    model.vlmattn.enable()
    with pytest.raises(StateError, match="tokens are not known; start a new generate"):
        model(input_ids=whole["input_ids"][:, 3:], pixel_values=whole["pixel_values"], past_key_values=cache)
    more = torch.cat([seen.sequences, torch.tensor([[7, 8]])], 1)
    both = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    with pytest.raises(StateError, match="filled without vlmattn, with images; start a new generate"):
        answer(model, both, past_key_values=seen.past_key_values)


def second(name):
    """Logits of a second question on the cache, and of the whole conversation."""
    model, inputs = vlmattn.wrap(build("llava"), name), prompt("llava", seed=1)
    first = answer(model, inputs)
    ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13, 14]])], 1)
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    on = answer(model, both, past_key_values=first.past_key_values)
    return logits(on), logits(answer(model, {**both, "pixel_values": inputs["pixel_values"]}))


@pytest.mark.parametrize("name", ANEW)
def test_a_second_question_is_answered_as_in_one_piece(name):
    on, whole = second(name)
    torch.testing.assert_close(on, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_keeps_its_choice_differs(name):
    on, whole = second(name)
    assert (on - whole).abs().max() > 1e-4


def test_the_docs_say_which():
    """A word kept: the page's two lists are those above, by preset."""
    page = DOCS.read_text("utf-8")
    same, otherwise = page.split("## Another answer than in one piece")
    named = lambda text: set(re.findall(r"`([a-z_0-9]+)`", text))  # noqa: E731
    assert set(ANEW) <= named(same.split("## As in one piece")[1])
    assert set(OTHERWISE) <= named(otherwise.split("## ")[0])
    assert "the first question" in vlmattn.interventions.VHR.__doc__
