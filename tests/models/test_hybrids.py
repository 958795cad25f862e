"""Layers without attention between layers with it: passes and branches go through them too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from zoo import IMG, ZOO, padded

import vlmattn
from vlmattn import VHR
from vlmattn.models import find_family

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]
HYBRIDS = ["lfm2_vl", "qwen3_5", "qwen3_5_moe", "minicpmv4_6", "lfm3_vl", "nemotron_h_omni"]
SEEN: dict[int, Tensor] = {}


def noting(module, query, key, value, mask, **options):
    out, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
    SEEN[module.layer_idx] = out[:, -1]
    return out, weights


AttentionInterface.register("noting_heads", noting)
AttentionMaskInterface.register("noting_heads", sdpa_mask)


def heads_of(name: str, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """What the heads of a layer say at the last row, in the bare model ``[batch, heads, dim]``."""
    model = ZOO[name].build()
    model.set_attn_implementation({"text_config": "noting_heads"})
    SEEN.clear()
    model(**inputs)
    return SEEN[layer].float()


@pytest.mark.parametrize("name", HYBRIDS)
def test_vhr_compares_with_the_text_alone(name):
    prompt = ZOO[name].prompt(2)
    model = ZOO[name].build()
    layer = min(find_family(model).anatomy(model).attending)
    assert layer > 0, "a layer without attention comes first"
    ids = prompt.inputs["input_ids"][prompt.images < 0][None]
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    method = VHR(layers=str(layer))
    wanted = method.gains(heads_of(name, prompt.inputs, layer), heads_of(name, words, layer))
    assert (wanted != 1).any()
    vlmattn.wrap(model, method)
    out = model(**prompt.inputs, use_cache=True)
    found = out.past_key_values._vlmattn_request.store(model.vlmattn.recipe.methods[0], layer).rows["gain"]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("recipe", ["vcd", "m3id", "dola_low", "deco", "pai+vcd"])
@pytest.mark.parametrize("name", ["lfm2_vl", "qwen3_5", "nemotron_h_omni"])
def test_branches_carry_their_states(name, recipe):
    """A row of a batch says what it says alone, also along beams, and a rule says something of its own."""
    given = [ZOO[name].prompt(2, 5, 1), ZOO[name].prompt(1, 9, 2)]
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, suppress_tokens=[IMG])
    options |= dict(return_dict_in_generate=True, output_logits=True)
    model = ZOO[name].build()
    bare = model.generate(**given[0].inputs, **options)
    vlmattn.wrap(model, recipe)
    alone = [model.generate(**prompt.inputs, **options) for prompt in given]
    assert (torch.stack(alone[0].logits) - torch.stack(bare.logits)).abs().nan_to_num(0, 0).max() > 1e-2
    together = padded(ZOO[name], given)
    if "vcd" not in recipe:  # whose noise is drawn for a batch
        both = model.generate(**together, **options)
        assert torch.equal(both.sequences[:, -4:], torch.cat([found.sequences[:, -4:] for found in alone]))
    beams = model.generate(**together, **options, num_beams=2)
    assert beams.sequences.shape == (2, together["input_ids"].shape[1] + 4)
