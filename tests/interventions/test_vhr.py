"""VHR has no golden (no released code was to be had): its definition, and an oracle that shares none of its mechanism."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, IMAGE_TOKEN, build, prompt

import vlmattn
from vlmattn import VHR


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 16), st.booleans(), st.sampled_from([1.0, 2.0]))
def test_heads_are_chosen_by_the_rule(seed, heads, drop, power):
    generator = torch.Generator().manual_seed(seed)
    seeing, blind = (
        torch.randn(1, heads, 3, generator=generator) * torch.rand(1, heads, 1, generator=generator) * 9
        for _ in range(2)
    )
    gains = VHR(drop_outliers=drop, ta_power=power, alpha=3.0).gains(seeing, blind)[0].tolist()
    vhd = [float((seeing[0, i] - blind[0, i]).square().sum().sqrt()) for i in range(heads)]
    loud = [float(blind[0, i].square().sum().sqrt()) ** power for i in range(heads)]

    def limit(values: list[float]) -> float:
        mean = sum(values) / heads
        return mean + (sum((v - mean) ** 2 for v in values) / (heads - 1)) ** 0.5

    if drop:
        high_vhd, high_loud = limit(vhd), limit(loud)
        vhd = [0.0 if v > high_vhd and t > high_loud else v for v, t in zip(vhd, loud, strict=True)]
    median = sorted(vhd)[(heads - 1) // 2]
    assert gains == [3.0 if v > median else 1.0 for v in vhd]


def test_outliers_are_left_out_only_if_both_rules_say_so():
    blind, seeing = torch.zeros(1, 8, 1), torch.arange(8.0).view(1, 8, 1)
    seeing[0, 7] = 50.0
    quiet = VHR().gains(seeing, blind)
    assert quiet[0, 7] == 2, "far off, but not loud without the image"
    blind[0, 7] = 90.0
    assert VHR().gains(seeing, blind)[0, 7] == 1
    assert VHR(drop_outliers=False).gains(seeing, blind)[0, 7] == 2


def test_half_of_the_heads_and_none_without_a_difference():
    seeing = torch.randn(2, 8, 4)
    assert ((VHR(drop_outliers=False).gains(seeing, seeing * 0) == 2).sum(-1) == 4).all()
    assert (VHR().gains(seeing, seeing) == 1).all()


def head_outputs(model, inputs, gains):
    """Logits, and the input of every ``o_proj`` as ``[batch, rows, heads, dim]``, with heads scaled on the way."""
    heads, seen = model.config.get_text_config().num_attention_heads, []

    def scale(layer):
        def hook(_, args):
            out = args[0].unflatten(-1, (heads, -1))
            seen.append(out)
            return ((out * gains[layer][:, None, :, None]).flatten(-2) if layer in gains else args[0],)

        return hook

    with ExitStack() as stack:
        for number, layer in enumerate(model.model.language_model.layers):
            stack.callback(layer.self_attn.o_proj.register_forward_pre_hook(scale(number)).remove)
        logits = model(**inputs).logits
    return logits, seen


@torch.no_grad()
@pytest.mark.parametrize("layers", ["0:", "1,3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_with_and_without_the_image(family, layers):
    """The oracle runs whole forwards of a bare model, once per layer, with the image tokens cut out of the ids."""
    model, inputs, method = build(family), prompt(family, words=6), VHR(layers=layers, alpha=2.5)
    without = inputs["input_ids"][inputs["input_ids"] != IMAGE_TOKEN][None]
    text = {"input_ids": without, "attention_mask": torch.ones_like(without)}
    gains: dict[int, torch.Tensor] = {}
    for layer in [int(n) for n in ("0,1,2,3" if layers == "0:" else layers).split(",")]:
        seeing = head_outputs(model, inputs, gains)[1][layer][:, -1]
        blind = head_outputs(model, text, gains)[1][layer][:, -1]
        gains[layer] = method.gains(seeing, blind)
    exact, _ = head_outputs(model, inputs, gains)
    assert any((gain == 2.5).any() for gain in gains.values())
    with vlmattn.applied(model, method):
        out = model(**inputs)
        torch.testing.assert_close(out.logits, exact, rtol=0, atol=2e-5)
        chosen = {
            layer: gain
            for (_, layer, name), gain in out.past_key_values._vlmattn_request.state.items()
            if name == "gain"
        }
    assert chosen.keys() == gains.keys()
    assert all(torch.equal(chosen[layer], gains[layer]) for layer in gains)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_gain_one_changes_nothing(family):
    model, inputs = build(family), prompt(family)
    bare = model(**inputs).logits
    with vlmattn.applied(model, VHR(alpha=1.0)):
        assert torch.equal(model(**inputs).logits, bare)
