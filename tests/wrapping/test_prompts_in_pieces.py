"""``prefill_chunk_size``: a prompt in pieces has the answer that it has in one, or the method that forbids it is named."""

from __future__ import annotations

import pytest
import torch
from tiny import build, left_padded, prompt
from transformers import StaticCache

import vlmattn
from vlmattn import InputError, UnsupportedError

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore")]
PIECES = ("calibration", "heads_amplify_random", "heads_guided", "heads_random_half", "isolate_documents", "isolate_images",
          "knockout_as_many", "knockout_image_last", "knockout_image_text", "knockout_others", "knockout_sinks",
          "knockout_text_image", "pai", "pai_official", "pai_paint", "var", "var_general", "var_official", "var_vision")  # fmt: skip
WHOLE = ("vhr", "sofa", "bidirectional_images", "fastv", "visionzip", "avl", "razor", "vcd", "opera", "paint")


def generate(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=[99], pad_token_id=0, **options,
    )  # fmt: skip


def logits(out):
    return torch.stack(out.logits, 1)


def close(one, other):
    torch.testing.assert_close(logits(one), logits(other), rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("name", PIECES)
def test_in_pieces_as_in_one(name, size):
    model, inputs = vlmattn.wrap(build("llava"), name), prompt("llava")
    found = generate(model, inputs, prefill_chunk_size=size)
    close(found, generate(model, inputs))
    assert model.vlmattn.report()["fired"]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_padded_batches_with_several_images(family):
    """The pieces cut images in two, which stay one image each."""
    model = vlmattn.wrap(build(family), "isolate_images+var")
    inputs = left_padded([prompt(family, 2), prompt(family, 2, words=8, seed=2)])
    bare = generate(build(family), inputs, prefill_chunk_size=9)
    for options in ({}, {"num_beams": 2}):
        found = generate(model, inputs, prefill_chunk_size=9, **options)
        close(found, generate(model, inputs, **options))
    assert (logits(generate(model, inputs, prefill_chunk_size=9)) - logits(bare)).abs().max() > 1e-3


def test_other_caches_and_a_second_turn():
    model, inputs = vlmattn.wrap(build("llava"), "var"), prompt("llava")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    first = generate(model, inputs, prefill_chunk_size=5, past_key_values=cache, disable_compile=True)
    close(first, generate(model, inputs))
    first = generate(model, inputs, prefill_chunk_size=5)
    ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13, 14, 15, 16]])], 1)
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = generate(model, both, past_key_values=first.past_key_values, prefill_chunk_size=4)
    close(found, generate(model, {**both, "pixel_values": inputs["pixel_values"]}))


@pytest.mark.parametrize("name", WHOLE)
def test_who_needs_the_whole_prompt_is_named(name):
    model = vlmattn.wrap(build("llava"), name, **({"heads": "1.0"} if name == "razor" else {}))
    match = rf"{name.partition('_')[0]}\w* must see the whole prompt in one piece; set prefill_chunk_size=None"
    with pytest.raises(UnsupportedError, match=match):
        generate(model, prompt("llava"), prefill_chunk_size=4)


def test_pieces_of_padding_and_embeddings():
    model = vlmattn.wrap(build("llava"), "pai")
    with pytest.raises(InputError, match="padding fills the first 3 tokens of a row"):
        generate(model, left_padded([prompt("llava", words=3), prompt("llava", words=12)]), prefill_chunk_size=3)
    embeds = build("llava").get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    with pytest.raises(InputError, match="prompt in pieces need input_ids"):
        model.generate(inputs_embeds=embeds, prefill_chunk_size=2)
