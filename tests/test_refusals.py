"""Ways of running that would be silently wrong are refused, with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import build, prompt
from transformers.generation.continuous_batching.cache import PagedAttentionCache

import vlmattn
from vlmattn import PAI, VAR, StateError, UnsupportedError


@torch.no_grad()
def test_packed_sequences():
    model, inputs = vlmattn.wrap(build("llava"), "pai"), prompt("llava")
    ids = inputs["input_ids"].repeat(1, 2)
    length = inputs["input_ids"].shape[1]
    positions = torch.arange(length).repeat(2)[None]
    with pytest.raises(UnsupportedError, match="packed"):
        model(
            input_ids=ids,
            position_ids=positions,
            pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1),
            use_cache=False,
        )


@torch.no_grad()
def test_continuous_batching():
    model, inputs = vlmattn.wrap(build("llava"), "pai"), prompt("llava")
    with pytest.raises(UnsupportedError, match="continuous batching"):
        model(**inputs, cache=object.__new__(PagedAttentionCache))


@torch.no_grad()
def test_a_cache_of_another_batch():
    model, inputs = vlmattn.wrap(build("llava"), "pai"), prompt("llava")
    cache, words = model(**inputs, use_cache=True).past_key_values, torch.tensor([[5], [6]])
    with pytest.raises(StateError, match="a batch of 1 and now meets 2"):
        model(input_ids=words, past_key_values=cache)
    alone = [model(input_ids=word[None], past_key_values=copy.deepcopy(cache)).logits for word in words]
    cache.batch_repeat_interleave(2)  # not a refusal: its rows are known
    torch.testing.assert_close(model(input_ids=words, past_key_values=cache).logits, torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [VAR(tau=2.0, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0), PAI(layers="0:")]
)
def test_a_cropped_cache_and_one_token_by_hand(method):
    """Not a refusal: the slot behind the cut is the new word, not the image that was there."""
    model, inputs = vlmattn.wrap(build("llava"), method), prompt("llava", images=2)
    cache = model(**inputs, use_cache=True).past_key_values
    prefix = 19
    cache.crop(prefix - cache.get_seq_length())
    ids = torch.cat([inputs["input_ids"][:, :prefix], torch.tensor([[5]])], 1)
    fresh = model(input_ids=ids, pixel_values=inputs["pixel_values"][:1]).logits[:, -1]
    torch.testing.assert_close(
        model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1], fresh, rtol=0, atol=2e-5
    )


@torch.no_grad()
def test_a_copied_cache_holds_no_model():
    """Also when the model had a generate of its own before it was wrapped."""
    model, inputs = build("llava"), prompt("llava")
    model.__dict__["generate"] = model.generate
    vlmattn.wrap(model, PAI(layers="0:"))
    cache = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    seen: set[int] = set()

    def walk(thing) -> None:
        if id(thing) in seen or isinstance(thing, (torch.Tensor, type)):
            return
        seen.add(id(thing))
        assert not isinstance(thing, torch.nn.Module)
        children = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else []
        for child in [*children, *getattr(thing, "__dict__", {}).values()]:
            walk(child)

    walk(cache._vlmattn_request)
