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
    """Text read after ``disable()``, or before a cache was promised; then the recipe goes on."""
    model = vlmattn.wrap(build("llava"), name)
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
def test_recipes_that_read_all_at_once_say_so_at_the_image(name):
    model = vlmattn.wrap(build("llava"), name)
    cache, whole = read(model), behind(SYSTEM)
    with pytest.raises(StateError, match=f"read bare, and '{name}' must see every token.*the whole conversation"):
        answer(model, whole, past_key_values=cache)
    answer(model, whole)


TEXT = {"input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
ABOUT_IMAGES = ("pai", "var", "vhr", "avl", "fastv", "visionzip", "knockout_sinks", "vcd", "agla", "pai+dola_low")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", ABOUT_IMAGES)
def test_text_alone_is_answered_by_the_bare_model(name, family):
    name = {"sparsevlm": "sparsevlm_plus", "visionzip": "visionzip_positions"}.get(name, name)
    model, bare = vlmattn.wrap(build(family), name), build(family)
    with pytest.warns(UserWarning, match=f"a prompt without image tokens: '{re.escape(name)}' is about images") as said:
        found, later = answer(model, TEXT), answer(model, TEXT, num_beams=2)
    assert len([one for one in said if "without image tokens" in str(one.message)]) == 1
    assert torch.equal(logits(found), logits(answer(bare, TEXT)))
    assert torch.equal(later.sequences, answer(bare, TEXT, num_beams=2).sequences)
    more = torch.cat([found.sequences, torch.tensor([[9], [9]])], 1)  # a second question without an image
    more = {"input_ids": more, "attention_mask": torch.cat([TEXT["attention_mask"], torch.ones(2, 5).long()], 1)}
    assert torch.equal(
        logits(answer(model, more, past_key_values=found.past_key_values)),
        logits(answer(bare, more, past_key_values=answer(bare, TEXT).past_key_values)),
    )
    changed = answer(model, prompt(family), **({"branch_inputs": PIXELS[family]} if name == "agla" else {}))
    assert not torch.equal(logits(changed), logits(answer(bare, prompt(family))))


PIXELS = {
    "llava": {"augmented": {"pixel_values": torch.zeros(1, 3, 16, 16)}},
    "qwen2_5_vl": {"augmented": {"pixel_values": torch.zeros(16, 96)}},
}


@pytest.mark.parametrize("name", ["pai", "var", "vhr", "avl", "fastv"])
def test_text_alone_token_by_token(name):
    """Forwards of one's own; an image may follow where the recipe need not have seen the text."""
    model, bare, caches = vlmattn.wrap(build("llava"), name), build("llava"), [None, None]
    for part in (SYSTEM, torch.tensor([[7]]), torch.tensor([[8, 9]])):
        outs = [one(input_ids=part, past_key_values=cache) for one, cache in zip((model, bare), caches, strict=True)]
        assert torch.equal(outs[0].logits, outs[1].logits)
        caches = [out.past_key_values for out in outs]
    whole = behind(torch.tensor([[1, 5, 6, 7, 8, 9]]))
    image = {"input_ids": whole["input_ids"][:, 6:], "pixel_values": whole["pixel_values"]}
    if name in ("pai", "fastv"):
        there = model(**image, past_key_values=caches[0]).logits[:, -1]
        torch.testing.assert_close(there, model(**whole).logits[:, -1], rtol=0, atol=2e-5)
        assert (there - bare(**whole).logits[:, -1]).abs().max() > 1e-4
    else:
        with pytest.raises(StateError, match=f"'{name}' must see every token"):
            model(**image, past_key_values=caches[0])


def test_pictures_without_a_place_are_no_text():
    model, inputs = vlmattn.wrap(build("llava"), "pai"), {**TEXT, "pixel_values": prompt("llava")["pixel_values"]}
    for call in (model, model.generate):
        with pytest.raises(InputError, match="no image tokens in the prompt; put the image placeholder into it"):
            call(**inputs)


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
