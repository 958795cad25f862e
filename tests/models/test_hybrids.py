"""Layers without attention between layers with it: an image-free pass goes through them too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from zoo import ZOO

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
    text = (prompt.images < 0) & torch.tensor([[True]])
    ids = prompt.inputs["input_ids"][text][None]
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    method = VHR(layers=str(layer))
    wanted = method.gains(heads_of(name, prompt.inputs, layer), heads_of(name, words, layer))
    assert (wanted != 1).any()
    vlmattn.wrap(model, method)
    out = model(**prompt.inputs, use_cache=True)
    found = out.past_key_values._vlmattn_request.store(model.vlmattn.recipe.methods[0], layer).rows["gain"]
    torch.testing.assert_close(found, wanted)
