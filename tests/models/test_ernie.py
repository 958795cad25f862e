"""ERNIE 4.5 VL: prompts without images, and branches with other prompts, send tokens to the experts the model would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from zoo import CLOSE, FAKE, IMG, OPEN, ROW, VID, ZOO

import vlmattn
from vlmattn import VHR
from vlmattn.models import find_family

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]
ERNIE, LAYER = ZOO["ernie4_5_vl_moe"], 2
SEEN: dict[int, Tensor] = {}


def noting(module, query, key, value, mask, **options):
    out, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
    SEEN[module.layer_idx] = out[:, -1]
    return out, weights


AttentionInterface.register("noting_experts", noting)
AttentionMaskInterface.register("noting_experts", sdpa_mask)


def heads_of(inputs: dict[str, Tensor]) -> Tensor:
    """What the heads of a layer say at the last row, in the bare model ``[batch, heads, dim]``."""
    model = ERNIE.build()
    model.set_attn_implementation({"text_config": "noting_experts"})
    SEEN.clear()
    model(**inputs)
    return SEEN[LAYER].float()


def test_the_kinds_of_other_prompts_are_those_of_the_processor():
    ids = torch.tensor([[1, OPEN, IMG, IMG, CLOSE, 5, FAKE, VID, VID, ROW, 7]])
    kinds = {"mm_token_type_ids": torch.zeros(1, 1).int(), "moe_mm_token_type_ids": torch.zeros(1, 1).int()}
    model = ERNIE.build()
    found = find_family(model).retyped(model, {"input_ids": ids, **kinds})
    assert found["moe_mm_token_type_ids"].tolist() == [[0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0]]
    assert found["mm_token_type_ids"].tolist() == [[0, 0, 1, 1, 0, 0, 0, 2, 2, 0, 0]]


def test_vhr_compares_with_text_read_by_the_same_experts():
    prompt = ERNIE.prompt(2, seed=2)
    ids = prompt.inputs["input_ids"][prompt.images < 0][None]
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sent = {"moe_mm_token_type_ids": prompt.inputs["moe_mm_token_type_ids"][prompt.images < 0][None]}
    method = VHR(layers=str(LAYER))
    whole, text, astray = heads_of(prompt.inputs), heads_of(words | sent), heads_of(words)
    assert not torch.equal(method.gains(whole, text), method.gains(whole, astray)), "experts matter"
    model = vlmattn.wrap(ERNIE.build(), method)
    out = model(**prompt.inputs, use_cache=True)
    found = out.past_key_values._vlmattn_request.store(model.vlmattn.recipe.methods[0], LAYER).rows["gain"]
    torch.testing.assert_close(found, method.gains(whole, text))
