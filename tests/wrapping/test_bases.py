"""Models that were loaded with flash or flex attention: the base goes on without an edit, and edits are those of sdpa."""

from __future__ import annotations

import pickle

import pytest
import torch
from flash import flash_calls, under_flash
from tiny import build, left_padded, prompt
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, StaticCache, masking_utils
from transformers.integrations import flex_attention as flex
from transformers.masking_utils import AttentionMaskInterface
from zoo import ZOO

import vlmattn
from vlmattn import VCD, FastV, InputError, UnsupportedError
from vlmattn.interventions import VISTA

__all__ = ["flash_calls"]
pytestmark = [pytest.mark.usefixtures("no_grad", "flash_calls"), pytest.mark.filterwarnings("ignore")]
FLASH, KERNEL = "flash_attention_2", "kernels-community/flash-attn2"


@pytest.fixture(autouse=True)
def implementations(monkeypatch):
    """What loading a model with them registers; flex attention without a compiler."""
    AttentionInterface.register(KERNEL, AttentionInterface()[FLASH])
    AttentionMaskInterface.register(KERNEL, AttentionMaskInterface()[FLASH])
    monkeypatch.setattr(
        flex,
        "compile_friendly_flex_attention",
        lambda q, k, v, training=False, **kwargs: flex_attention(q, k, v, **kwargs),
    )
    made = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **kwargs: made(**{**kwargs, "_compile": False}))


def batch(family="llava"):
    return left_padded([prompt(family), prompt(family, words=9, seed=2)])


def generate(model, inputs, **options):
    return model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=[99], pad_token_id=0, **options,
    )  # fmt: skip


def logits(out):
    return torch.stack(out.logits, 1)


BASES = (FLASH, "flash_attention_3", KERNEL, "flex_attention")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_without_an_edit_it_is_the_base_itself(family, base, flash_calls):
    model, inputs = under_flash(build(family), base), batch(family)
    bare = [generate(model, given) for given in (inputs, prompt(family))]
    assert (flash_calls.count > 0) == (base != "flex_attention")
    text = model.config.get_text_config()
    vlmattn.wrap(model, "none")
    assert text._attn_implementation != base
    for given, seen in zip((inputs, prompt(family)), bare, strict=True):
        assert torch.equal(logits(generate(model, given)), logits(seen))
    vlmattn.unwrap(model)
    assert text._attn_implementation == base
    assert torch.equal(logits(generate(model, inputs)), logits(bare[0]))


@pytest.mark.parametrize("base", [FLASH, "flex_attention"])
@pytest.mark.parametrize("name", ["pai", "var", "vhr", "sofa", "bidirectional_image", "knockout_sinks", "fastv", "avl",
                                  "visionzip", "vcd", "opera", "heads_guided", "razor"])  # fmt: skip
def test_edits_are_those_of_sdpa(name, base):
    inputs, options = batch(), {"heads": "1.0,2.1"} if name == "razor" else {}
    models = build("llava"), under_flash(build("llava"), base)
    found = [generate(vlmattn.wrap(model, name, **options), inputs) for model in models]
    torch.testing.assert_close(logits(found[1]), logits(found[0]), rtol=0, atol=1e-4)


def test_layers_without_an_edit_run_the_base(flash_calls):
    model = vlmattn.wrap(under_flash(build("llava")), "pai", layers="1")
    out = model(**batch())
    assert flash_calls.count == 3
    assert model.vlmattn.report()["layers"]["prefill"][f"base:{FLASH}"] == [0, 2, 3]
    assert out.logits.isfinite().all()


@pytest.mark.parametrize("name", ["gemma3_window", "paligemma2", "mistral3_window", "cohere2_window"])
def test_edited_layers_see_what_flash_attention_sees(name):
    """Windows, soft caps, and no image tokens that see each other, in every layer; the edit changes next to nothing."""
    model, inputs = under_flash(ZOO[name].build()), ZOO[name].prompt(2).inputs
    seen = model(**inputs).logits
    vlmattn.wrap(model, "pai", alpha=1e-6, layers="0:")
    torch.testing.assert_close(model(**inputs).logits, seen, rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", [FLASH, "flex_attention"])
@pytest.mark.parametrize("name", ["none", "pai"])
def test_a_static_cache(name, base):
    inputs, found = batch(), []
    for model in (build("llava"), under_flash(build("llava"), base)):
        vlmattn.wrap(model, name)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        found.append(logits(generate(model, inputs, past_key_values=cache, disable_compile=True)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


def test_packed_sequences_go_to_the_base():
    """Positions that start anew, without a mask: flash attention keeps the sequences apart."""
    model = under_flash(build("llava"))
    ids, positions = torch.tensor([[1, 5, 6, 1, 7, 8, 9]]), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    seen = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(seen[:, 3:], model(input_ids=ids[:, 3:]).logits, rtol=0, atol=1e-5)
    vlmattn.wrap(model, "none")
    assert torch.equal(model(input_ids=ids, position_ids=positions, use_cache=False).logits, seen)


def test_beams_and_a_second_turn():
    found = []
    for model in (build("llava"), under_flash(build("llava"))):
        vlmattn.wrap(model, "pai")
        first = generate(model, prompt("llava"))
        ids = torch.cat([first.sequences, torch.tensor([[11, 12]])], 1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        on = generate(model, more, past_key_values=first.past_key_values)
        found.append((generate(model, batch(), num_beams=2).sequences, logits(on)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-4)


def test_a_pickled_model_has_its_base():
    model = vlmattn.wrap(under_flash(build("llava")), "pai")
    again = pickle.loads(pickle.dumps(model))
    seen = model(**prompt("llava")).logits
    assert torch.equal(again(**prompt("llava")).logits, seen)
    assert vlmattn.unwrap(again).config.get_text_config()._attn_implementation == FLASH


def test_what_flash_attention_cannot_do_is_said():
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    inputs = {**prompt("llava"), "attention_mask": mask}
    model = vlmattn.wrap(under_flash(build("llava")), "pai")
    for call in (model, model.generate):
        with pytest.raises(InputError, match=f"'{FLASH}' takes attention masks of two dimensions.*='sdpa'"):
            call(**inputs)
    crossing = under_flash(ZOO["mllama"].build())
    with pytest.raises(UnsupportedError, match=f"cross-attention in .* masks that '{FLASH}' cannot take"):
        vlmattn.wrap(crossing, "pai")
    indexed = vlmattn.wrap(under_flash(ZOO["mistral_large4"].build()), "pai")
    with pytest.raises(UnsupportedError, match=f"indexer chooses keys hand '{FLASH}' the choice"):
        indexed(**ZOO["mistral_large4"].prompt().inputs)
    with pytest.raises(UnsupportedError, match="'of_nobody' is not known to transformers"):
        vlmattn.wrap(under_flash(build("llava"), "of_nobody"), "pai")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "recipe", [[FastV(layer=2, keep_ratio=0.25), VCD()], [VISTA(alpha=0.5)]], ids=["fastv+vcd", "vista"]
)
def test_dropped_branches_and_steering_are_those_of_sdpa(recipe, base):
    inputs = batch()
    wanted = logits(generate(vlmattn.wrap(build("llava"), recipe), inputs)).nan_to_num(neginf=0)
    found = logits(generate(vlmattn.wrap(under_flash(build("llava"), base), recipe), inputs)).nan_to_num(neginf=0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
