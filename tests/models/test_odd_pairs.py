"""Families whose images, positions or layers are unlike the others', under methods that look at just these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import ZOO, padded

import vlmattn
from vlmattn import Recipe, UnsupportedError

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]


def logits(name: str, recipe: Any, inputs: dict[str, Tensor], new: int = 3, **more: Any) -> Tensor:
    """Of every token, ``[token, row, vocabulary]``, of an answer that has no placeholders."""
    tiny = ZOO[name]
    with vlmattn.applied(tiny.build(), recipe) as model:
        options = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0) | more
        out = model.generate(
            **inputs, **options, suppress_tokens=[tiny.image_token], return_dict_in_generate=True, output_logits=True
        )
    return torch.stack(out.logits)


@pytest.mark.parametrize("recipe", ["paint", "visionzip_positions"])
@pytest.mark.parametrize("name", ["llava", "vipllava", "paligemma", "qwen2_5_vl"])
def test_rows_that_are_there_several_times_have_their_own_images(name, recipe):
    """One and two images, so that the tower's images are not one for each row."""
    inputs = padded(ZOO[name], [ZOO[name].prompt(2, 4, 1), ZOO[name].prompt(1, 6, 2), ZOO[name].prompt(2, 3, 3)])
    once = logits(name, recipe, inputs, 1)[0]
    sampled = logits(name, recipe, inputs, 1, do_sample=True, num_return_sequences=3)[0]
    torch.testing.assert_close(sampled, once.repeat_interleave(3, 0), rtol=0, atol=2e-4)
    beams = logits(name, recipe, inputs, 1, num_beams=2)[0]
    torch.testing.assert_close(beams, once.repeat_interleave(2, 0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("recipe", ["sparsevlm", "sparsevlm_64", "pyramiddrop", "visionzip"])
@pytest.mark.parametrize("name", ["paligemma", "vipllava"])
def test_positions_that_are_counted_anew_begin_where_the_model_begins(name, recipe):
    """PaliGemma counts from 1: after the prompt as within it."""
    inputs = padded(ZOO[name], [ZOO[name].prompt(1, 4, 1), ZOO[name].prompt(1, 7, 2)])
    cached = logits(name, recipe, inputs, 4)
    torch.testing.assert_close(logits(name, recipe, inputs, 4, use_cache=False), cached, rtol=0, atol=2e-4)


def test_features_of_several_layers_are_projected_together():
    """VipLLaVA projects two layers side by side; all tokens kept and none merged, it is the bare model."""
    inputs = ZOO["vipllava"].prompt(2, 5, 1).inputs
    whole = Recipe.of("visionzip_positions", dominant=1.0, contextual=0.0)
    torch.testing.assert_close(logits("vipllava", whole, inputs), logits("vipllava", "none", inputs))


def test_a_branch_beside_layers_that_read_the_keys_of_others():
    """Gemma 3n. A branch that sees all image tokens says what the main prompt says, whatever its weight."""
    inputs = ZOO["gemma3n"].prompt(1, 5, 1).inputs
    wanted = logits("gemma3n", Recipe.of("rbd", visual=0.0), inputs)
    found = logits("gemma3n", Recipe.of("rbd", share=1.0), inputs)
    finite = wanted.isfinite()
    assert torch.equal(finite, found.isfinite())
    torch.testing.assert_close(found[finite], wanted[finite], rtol=0, atol=2e-4)
    assert not torch.equal(logits("gemma3n", Recipe.of("rbd", share=0.1), inputs), found)


@pytest.mark.parametrize("recipe", ["pyramiddrop_positions", "pyramiddrop"])
def test_latent_attention_is_asked_before_the_layer_runs(recipe):
    """Values of Kimi K2.5 are shorter than its keys. All tokens kept, it is the bare model."""
    inputs = ZOO["kimi_k25"].prompt(2, 5, 1).inputs
    whole = Recipe.of(recipe, keep_ratios=(1.0, 1.0, 1.0))
    torch.testing.assert_close(logits("kimi_k25", whole, inputs), logits("kimi_k25", "none", inputs))
    cached = logits("kimi_k25", recipe, inputs)
    torch.testing.assert_close(logits("kimi_k25", recipe, inputs, use_cache=False), cached, rtol=0, atol=2e-4)


@pytest.mark.parametrize("recipe", ["rbd", "avisc", "agla_attention", "opera"])
def test_attention_to_images_that_are_not_in_the_sequence_guides_nothing(recipe):
    model = ZOO["mllama"].build()
    with pytest.raises(UnsupportedError, match=r"^'\w+' does not run on mllama: .*; use one .* like vcd$"):
        vlmattn.wrap(model, recipe)
    assert "vlmattn" not in model.__dict__
    assert logits("mllama", "vcd", ZOO["mllama"].prompt(1, 5, 1).inputs).isfinite().any()
