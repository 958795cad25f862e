"""Layers whose indexer chooses the keys that a row sees: edits act on those."""

from __future__ import annotations

import pytest
import torch
from tiny import generate
from zoo import IMG, ZOO

import vlmattn
from vlmattn import PAI
from vlmattn.models import find_family
from vlmattn.wrapping.prefill import _layer_calls

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]
FEW = {
    "mistral_large4": dict(index_topk=6),
    "minimax_m3_vl": dict(
        index_block_size=4, index_topk_blocks=2, layer_types=["minimax_m3_sparse"] * 4, mlp_layer_types=["dense"] * 4
    ),
    "qwen4_exp": dict(indexer_budget=8),
    "hy_v4_vl": dict(index_topk=6),  # layers share what an indexer chose
}
ONLY_EAGER = ("hy_v4_vl",)
BARE_DIFFERS = ("mistral_large4", "hy_v4_vl")  # cached or not


def build(name: str, attn: str = ""):
    cls, config = ZOO[name].make()
    for field, value in FEW[name].items():
        setattr(config.text_config, field, value)
    torch.manual_seed(0)
    model = cls(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3 if "language_model" in key else 0.15)
    if attn:
        model.set_attn_implementation({"text_config": attn})
    return model


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FEW)
def test_an_edit_of_strength_zero_changes_nothing(name, attn):
    attn = "eager" if name in ONLY_EAGER else attn
    model, inputs = build(name, attn), ZOO[name].prompt(2).inputs
    bare, whole = generate(model, inputs, 3, suppress_tokens=[IMG]), ZOO[name].build()(**inputs).logits
    assert not torch.allclose(model(**inputs).logits, whole, atol=1e-2), "the indexer must leave keys out"
    with vlmattn.applied(model, PAI(alpha=0.0, layers="0:")):
        torch.testing.assert_close(generate(model, inputs, 3, suppress_tokens=[IMG]), bare, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in FEW if name not in BARE_DIFFERS])
def test_cached_decoding_equals_recomputing(name):
    model, inputs = build(name), ZOO[name].prompt(2).inputs
    bare = generate(model, inputs, 3, suppress_tokens=[IMG])
    with vlmattn.applied(model, PAI(alpha=0.9, layers="0:")):
        cached, whole = (generate(model, inputs, 3, suppress_tokens=[IMG], use_cache=use) for use in (True, False))
    torch.testing.assert_close(cached, whole, rtol=0, atol=1e-4)
    assert (cached - bare).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mistral_large4", "hy_v4_vl"])
def test_layers_beside_the_prompt_pass_on_what_an_indexer_chose(name):
    """Layer by layer they say what the decoder's own say: a layer without an indexer takes the choice of the one before."""
    model = build(name, "eager")
    family = find_family(model)
    decoder, wanted = family.decoder(model), []
    inputs = {
        "inputs_embeds": torch.randn(1, 14, 32),
        "attention_mask": torch.ones(1, 14, dtype=torch.long),
        "use_cache": False,
    }
    hooks = [layer.register_forward_hook(lambda _, __, out: wanted.append(out[0])) for layer in decoder.layers]
    decoder(**inputs)
    for hook in hooks:
        hook.remove()
    shares = [getattr(family.attention(layer), "indexer", None) is None for layer in decoder.layers]
    assert any(shares) or name != "hy_v4_vl"
    hidden, calls, _ = _layer_calls(decoder, inputs, family.in_tuples)
    for call, out in zip(calls, wanted, strict=True):
        hidden = call(hidden)
        torch.testing.assert_close(hidden, out)
