"""``vlmattn.cost``: what it predicts is what a prefill takes, and what the sizes of known models give by hand."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from tiny import build, prompt
from transformers import AutoModelForImageTextToText, LlavaConfig
from zoo import ZOO

import vlmattn
from vlmattn import AVL, DuoAttention, FastV, LongHeads, RazorAttention, RecycledAttention
from vlmattn.errors import InputError, OptionError, UnsupportedError
from vlmattn.evals.bench import RANDOM_MODELS

FAMILIES = ("llava", "qwen2_5_vl")  # Qwen3-VL drops no tokens before its third layer
STAGES = dict(layers="1,2,3", keep_ratios=[0.5, 0.25, 0.125], positions="original")
PRUNED = {
    "fastv": vlmattn.Recipe.of("fastv", layer=2),
    "fastv keeps 3": vlmattn.Recipe.of("fastv", layer=1, keep_tokens=3),
    "fastv masks": vlmattn.Recipe.of("fastv", layer=2, mode="mask"),
    "pyramiddrop": vlmattn.Recipe.of("pyramiddrop", **STAGES),
    "sparsevlm": vlmattn.Recipe.of("sparsevlm_plus"),
    "visionzip": vlmattn.Recipe.of("visionzip_positions", dominant=0.5, contextual=0.25),
    "random": vlmattn.Recipe.of("random"),
    "pool": vlmattn.Recipe.of("pool@0.5"),
    "divprune": vlmattn.Recipe.of("divprune@0.5"),
    "cdpruner": vlmattn.Recipe.of("cdpruner@0.5"),
    "vispruner": vlmattn.Recipe.of("vispruner@0.5"),
    "dart": vlmattn.Recipe.of("dart", image_pivots=1, text_pivots=1),
    "prumerge": vlmattn.Recipe.of("prumerge@0.25"),
}
EXACT = (
    "fastv",
    "fastv keeps 3",
    "fastv masks",
    "pyramiddrop",
    "random",
    "pool",
    "divprune",
    "cdpruner",
)  # what the others look at depends on the prompt


def _batch(family: str, kind: str) -> dict[str, torch.Tensor]:
    if kind == "one":
        return tiny.prompt(family)
    return tiny.left_padded([tiny.prompt(family, 2, 3), tiny.prompt(family, 1, 9, seed=2)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["one", "ragged"])
@pytest.mark.parametrize("name", PRUNED)
def test_cache_and_operations_of_a_prefill(family: str, kind: str, name: str) -> None:
    model, inputs = tiny.build(family), _batch(family, kind)
    found = vlmattn.cost(model, inputs, PRUNED[name], measure=True)
    assert found.edited.kv_bytes == found.edited.measured_kv_bytes
    assert found.bare.kv_bytes == found.bare.measured_kv_bytes
    assert found.bare.prefill_flops == found.bare.measured_flops
    if name in EXACT:
        assert found.edited.prefill_flops == found.edited.measured_flops
    with vlmattn.applied(model, PRUNED[name]), torch.inference_mode():
        model(**inputs)
        seen = model.vlmattn.report()["image_tokens"]
    assert seen["per_layer"] == list(found.edited.image_tokens)
    assert seen["equivalent"] == found.edited.equivalent


def test_comparisons_are_counted() -> None:
    model, inputs = tiny.build("llava"), tiny.prompt("llava", 2)
    pairs = {
        "random": 0,
        "divprune": 2 * 2 * 32 * 16 * 16,
        "cdpruner": 2 * 2 * 32 * 16 * 17,
        "dart": 2 * 32 * 32 * 8,
        "fastervlm": 0,
        "vispruner@0.25": 2 * 2 * 32 * (7 * 7 + 4 * 3 + 2 * 1),  # of 16 tokens 2 stay; 14, 7, 3, then 2 are left
    }
    for name, expected in pairs.items():
        assert vlmattn.cost(model, inputs, name).edited.score_flops == expected, name


def test_operations_where_they_matter() -> None:
    """Six layers with heads wider than hidden size / heads, key heads shared, 100 image tokens."""
    text = {**tiny.TEXT, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6, "head_dim": 48}
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=40, patch_size=4, projection_dim=32,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=dict(model_type="llama", **text), vision_config=vision, image_token_index=tiny.IMAGE_TOKEN, image_seq_length=100,
    )  # fmt: skip
    model = tiny.build("llava", config=config)
    ids = torch.tensor([[1, *[tiny.IMAGE_TOKEN] * 100, *range(5, 25)]])
    inputs = dict(input_ids=ids, pixel_values=torch.randn(1, 3, 40, 40))
    for attn in ("sdpa", "eager"):
        model.set_attn_implementation(attn)
        for recipe in ("none", "fastv", vlmattn.Recipe.of("pyramiddrop", layers="2,3,4")):
            found = vlmattn.cost(model, inputs, recipe, measure=True)
            assert found.edited.measured_flops == pytest.approx(found.edited.prefill_flops, rel=0.02)
    assert found.edited.rows == (121, 121, 71, 46, 33, 33)
    attention, looked, mlp = 128 * 48 * (4 + 2 + 2 + 4), 128 * 48 * (4 + 2 + 2), 3 * 128 * 352
    assert found.edited.linear_flops == 2 * (attention + mlp) * sum(found.edited.rows)
    assert found.edited.attention_flops == 4 * 4 * 48 * sum(n * n for n in found.edited.rows)
    assert found.edited.score_flops == sum((2 * looked + 2 * 4 * 48) * n for n in (121, 71, 46))
    assert found.edited.head_flops == 2 * 128 * 100


def test_new_tokens_and_plain_data() -> None:
    model, inputs = tiny.build("llava"), tiny.prompt("llava")
    found = vlmattn.cost(model, inputs, "fastv", new_tokens=5)
    length = inputs["input_ids"].shape[1]
    assert found.edited.rows == (length, length, length - 8, length - 8)
    slots = sum(found.edited.rows) + 4 * 5
    assert found.edited.kv_bytes == 2 * 4 * 2 * 8 * slots  # keys and values, float32, two heads of 8
    weights = 4 * (32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * 64 + 2 * 32) + 32 * 100  # with the two norms of a layer
    assert found.edited.decode_bytes == 4 * weights + found.edited.kv_bytes
    data = found.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["kv_ratio"] == found.kv_ratio
    text = str(found).splitlines()
    assert len(text) == 6
    assert "measured" not in str(found)
    assert "fastv" in text[0]


@pytest.mark.parametrize("recipe", ["var", "pai+var", "none"])
def test_edits_of_attention_are_free(recipe: str) -> None:
    found = vlmattn.cost(tiny.build("llava"), tiny.prompt("llava"), recipe)
    assert (found.prefill_ratio, found.kv_ratio, found.decode_ratio) == (1, 1, 1)


def test_nothing_to_drop() -> None:
    model = tiny.build("llava")
    found = vlmattn.cost(
        model, _batch("llava", "ragged"), vlmattn.Recipe.of("fastv", layer=2, keep_ratio=1.0), measure=True
    )
    assert found.kv_ratio == 1
    assert found.edited.measured_kv_bytes == found.edited.kv_bytes
    text = {name: value for name, value in tiny.prompt("llava", images=0).items() if name != "pixel_values"}
    found = vlmattn.cost(model, text, measure=True)
    assert found.bare.measured_flops == found.bare.prefill_flops
    assert found.bare.equivalent == 0


def test_two_methods_one_after_the_other() -> None:
    """The second would keep more than the first has left."""
    recipe = vlmattn.Recipe.of([vlmattn.FastV(layer=1, keep_ratio=0.25), vlmattn.FastV(layer=3)])
    found = vlmattn.cost(tiny.build("llava"), tiny.prompt("llava"), recipe, measure=True)
    assert found.edited.image_tokens == (16, 4, 4, 4)
    assert found.edited.measured_kv_bytes == found.edited.kv_bytes


def test_wrapped_model_stays_as_it_is() -> None:
    inputs = tiny.prompt("llava")
    model = vlmattn.wrap(tiny.build("llava"), PRUNED["fastv"])
    found = vlmattn.cost(model, inputs, measure=True)
    assert found.recipe == PRUNED["fastv"].name
    assert found.edited.measured_flops == found.edited.prefill_flops < found.bare.measured_flops
    assert model.vlmattn.recipe is PRUNED["fastv"]
    assert not any(model.vlmattn.report()["fired"].values())
    other = vlmattn.cost(model, inputs, "none", measure=True)
    assert other.edited.measured_kv_bytes == other.edited.kv_bytes == other.bare.kv_bytes


def test_mixture_of_experts_counts_what_is_active() -> None:
    config = LlavaConfig(
        text_config=dict(
            model_type="qwen3_moe",
            **tiny.TEXT,
            head_dim=8,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
        ),
        vision_config=tiny.build("llava").config.vision_config,
        image_token_index=tiny.IMAGE_TOKEN,
    )
    model, inputs = tiny.build("llava", config=config), tiny.prompt("llava")
    found = vlmattn.cost(model, inputs)
    layer = 32 * 8 * 12 + 32 * 8 + 2 * 3 * 32 * 16  # attention, router, two experts
    assert found.bare.linear_flops == 2 * 4 * layer * inputs["input_ids"].shape[1]
    many = vlmattn.cost(model, _batch("llava", "ragged"))
    assert many.bare.weight_bytes - found.bare.weight_bytes == 4 * 4 * 2 * 3 * 32 * 16  # two rows ask for up to four


# Ratios of prefill, KV bytes and decode step with one sequence and with 32, computed by hand from the published sizes.
# (model, text tokens, image tokens, keep_ratio) from layer 2 on, bfloat16.
BY_HAND = {
    ("random-llava-7b", 64, 576, 0.5): (0.572, 0.578, 0.989, 0.809),
    ("random-llava-7b", 64, 576, 0.25): (0.362, 0.367, 0.984, 0.714),
    ("random-llava-7b", 64, 2880, 0.25): (0.293, 0.312, 0.927, 0.455),
    ("random-qwen2.5-vl-7b", 64, 576, 0.5): (0.578, 0.582, 0.999, 0.968),
    ("random-qwen2.5-vl-7b", 64, 8192, 0.25): (0.273, 0.309, 0.978, 0.642),
}


@pytest.mark.parametrize("name", ["random-llava-7b", "random-qwen2.5-vl-7b"])
def test_sizes_of_known_models(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(RANDOM_MODELS[name](), dtype=torch.bfloat16)
    for (of, text, image, keep), expected in BY_HAND.items():
        if of == name:
            ids = torch.tensor([[1, *[model.config.image_token_id] * image, *[5] * (text - 1)]])
            recipe = vlmattn.Recipe.of("fastv", keep_ratio=keep)
            one, many = (vlmattn.cost(model, {"input_ids": ids.expand(n, -1)}, recipe) for n in (1, 32))
            ratios = (one.prefill_ratio, one.kv_ratio, one.decode_ratio, many.decode_ratio)
            assert ratios == pytest.approx(expected, abs=0.003)
            assert one.prefill_ratio == pytest.approx(many.prefill_ratio)
    if name == "random-llava-7b":
        found = vlmattn.cost(model, {"input_ids": torch.tensor([[1, *[32000] * 576, *[5] * 63]])}, "fastv")
        assert found.bare.kv_bytes == 320 * 2**20
        assert found.edited.kv_bytes == 185 * 2**20
        assert found.bare.linear_flops == 640 * 32 * 2 * (4 * 4096**2 + 3 * 4096 * 11008)
        assert found.edited.equivalent == (2 * 576 + 30 * 288) / 32


def test_errors() -> None:
    model, inputs = tiny.build("llava"), tiny.prompt("llava")
    with pytest.raises(OptionError, match="new_tokens must be 0 or more"):
        vlmattn.cost(model, inputs, new_tokens=-1)
    with pytest.raises(UnsupportedError, match="'vcd' has the model read more than the prompt"):
        vlmattn.cost(model, inputs, "vcd")
    with pytest.raises(UnsupportedError, match="'opera' has the model read more"):
        vlmattn.cost(model, inputs, "opera")
    with pytest.raises(InputError, match="leave past_key_values out"):
        vlmattn.cost(model, {**inputs, "past_key_values": object()})
    with pytest.raises(InputError, match="attention_mask must be of shape"):
        vlmattn.cost(model, {**inputs, "attention_mask": torch.ones(1, 1, 4, 4)})
    with pytest.raises(InputError, match="no image tokens in the prompt, and 'fastv' drops some"):
        vlmattn.cost(model, {"input_ids": torch.tensor([[5, 6, 7]])}, "fastv")
    with pytest.raises(InputError, match="without input_ids or inputs_embeds"):
        vlmattn.cost(model, {})
    with pytest.raises(OptionError, match="dropped before the layers"):
        vlmattn.cost(model, inputs, vlmattn.Recipe.of("fastv", layer=9))
    right = torch.nn.functional.pad(inputs["attention_mask"], (0, 2))
    ids = torch.nn.functional.pad(inputs["input_ids"], (0, 2))
    with pytest.raises(InputError, match="padded on the left"):
        vlmattn.cost(model, {**inputs, "input_ids": ids, "attention_mask": right}, "fastv")


@pytest.mark.parametrize(
    "policy",
    [
        AVL(keep_secondary=0.25, keep_core=0.1),
        DuoAttention(heads="0.0,1.1", sinks=2, recent=4),
        RazorAttention(heads="0.0,0.1,1.1", sinks=2, recent=4),
        RecycledAttention(keys=8, stride=4),
        LongHeads(tile=2),
    ],
    ids=["avl", "duo", "razor", "recycled", "longheads"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_policies_hold_what_was_said(policy, family):
    model, inputs = build(family), prompt(family, 2)
    found = vlmattn.cost(model, inputs, policy, measure=True)
    assert found.edited.kv_bytes == found.edited.measured_kv_bytes
    assert found.edited.prefill_flops >= found.bare.prefill_flops, "they act after the prompt"
    assert found.edited.kv_read < found.bare.kv_read
    assert found.edited.decode_bytes == found.edited.weight_bytes + found.edited.kv_read


def test_a_policy_beside_dropped_rows():
    found = vlmattn.cost(build("llava"), prompt("llava", 2), [FastV(layer=2, keep_ratio=0.5), AVL()], measure=True)
    assert found.edited.kv_bytes == found.edited.measured_kv_bytes


def test_policies_that_decide_by_the_prompt_are_refused():
    with pytest.raises(UnsupportedError, match="what rounds holds or reads is known only once the prompt is read"):
        vlmattn.cost(build("llava"), prompt("llava", 2), "rounds")


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("qwen3_5", "layers that are no attention"),
        ("mllama", "layers that are no attention"),
        ("gemma3", "sliding windows"),
        ("gemma4_key_value", "sliding windows and heads of several sizes"),
        ("mistral3_small4", "latent attention"),
    ],
)
def test_layers_of_other_kinds_are_refused(family, what):
    model, given = ZOO[family].build(), ZOO[family].prompt(1, 5, 1).inputs
    with pytest.raises(UnsupportedError, match=f"cost\\(\\) does not know {what}, which"):
        vlmattn.cost(model, given)
