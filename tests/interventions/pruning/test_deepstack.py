"""Qwen3-VL adds image features after its first layers: tokens go from the layer after those on, and policies act as anywhere."""

from __future__ import annotations

import pytest
from numerics import near
from tiny import build, generate, left_padded, prompt

import vlmattn
from vlmattn.errors import OptionError
from vlmattn.interventions import (
    AVL,
    VHR,
    DuoAttention,
    FastV,
    LongHeads,
    PyramidDrop,
    RecycledAttention,
    Rounds,
    SparseVLM,
    VisionZip,
)

NEW = 5
DROPPING = {
    "fastv": FastV(layer=2, keep_ratio=0.5),
    "fastv_last": FastV(layer=3, keep_ratio=0.25),
    "pyramiddrop": PyramidDrop(layers="2,3", keep_ratios=(0.5, 0.25), positions="original"),
    "sparsevlm_plus": SparseVLM(layers="2,3", keep_ratios=(0.5, 0.25), version="2"),
}
POLICIES = {
    "avl": AVL(text_first=2, text_every=2),
    "rounds": Rounds(watershed="1", keep_mass=0.3),
    "recycled": RecycledAttention(keys=6, stride=3),
    "longheads": LongHeads(tile=2, keep=0.2),
    "duo": DuoAttention(heads="0.0,2.1", sinks=2, recent=5),
}
WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "static": {"cache_implementation": "static", "disable_compile": True}}


def prompts():
    return [prompt("qwen3_vl", 2), prompt("qwen3_vl", 1, seed=3, words=7)]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("name", DROPPING)
def test_dropped_equals_hidden_and_padding_is_invisible(name, ways, attn):
    method, found = DROPPING[name], []
    for mode in ("drop", "mask"):
        model = vlmattn.wrap(build("qwen3_vl", attn), type(method)(**{**method.options(), "mode": mode}))
        found.append(generate(model, left_padded(prompts()), NEW, **WAYS[ways]))
    near(*found)
    assert (generate(build("qwen3_vl", attn), left_padded(prompts()), NEW, **WAYS[ways]) - found[0]).abs().max() > 0.05
    if ways != "beams":
        model = vlmattn.wrap(build("qwen3_vl", attn), method)
        for row, single in enumerate(prompts()):
            near(found[0][row], generate(model, single, NEW, **WAYS[ways])[0])


@pytest.mark.parametrize("name", POLICIES)
def test_policies_in_a_padded_batch(name):
    model = vlmattn.wrap(build("qwen3_vl"), POLICIES[name])
    batch = generate(model, left_padded(prompts()), NEW)
    for row, single in enumerate(prompts()):
        near(batch[row], generate(model, single, NEW)[0])
    assert (generate(build("qwen3_vl"), left_padded(prompts()), NEW) - batch).abs().max() > 0.01


def test_beside_an_edit():
    found = []
    for mode in ("drop", "mask"):
        model = vlmattn.wrap(build("qwen3_vl"), [FastV(layer=2, keep_ratio=0.5, mode=mode), VHR(layers="0:")])
        found.append(generate(model, left_padded(prompts()), NEW))
    near(*found)


@pytest.mark.parametrize(
    ("method", "layer"),
    [(FastV(layer=1), 1), (PyramidDrop(layers="1,2,3", positions="original"), 1), (VisionZip(positions="original"), 0)],
)
def test_layers_in_which_features_come_in_are_refused(method, layer):
    with pytest.raises(
        OptionError, match=rf"after its first 2 layers; drop tokens before layer 2 or later, got {layer}"
    ):
        vlmattn.wrap(build("qwen3_vl"), method)
