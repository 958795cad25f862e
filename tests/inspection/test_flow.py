"""Rollout and flow against the bare eager model's attention, smallest cuts by trying all, and the maximum flow of scipy."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import left_padded
from torch import Tensor
from zoo import IMG, ZOO

import vlmattn
from vlmattn import PAI, VCD, VHR, FastV, InputError, Knockout, OptionError, UnsupportedError
from vlmattn.inspection import attention_flow, flow, rollout
from vlmattn.interventions import Bidirectional, Heads
from vlmattn.models import find_family

pytestmark = pytest.mark.usefixtures("no_grad")

REFUSED = {
    "mllama": "no attention over the tokens", "mllama_tiles": "no attention over the tokens", "lfm2_vl": "no attention over the tokens",
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "nemotron_h_omni", "lfm3_vl", "qwen4_exp"), "no attention over the tokens"),
    "blip2": "before the tokens", "instructblip": "before the tokens", "instructblipvideo": "before the tokens", "florence2": "encoder-decoder",
}  # fmt: skip
HEADS = 4


def asked(images: int = 1, words: int = 4) -> dict[str, Tensor]:
    return ZOO["llava"].prompt(images, words).inputs


def mixed(attention: Tensor, residual: float) -> Tensor:
    """A' of each layer ``[layer, query, key]``, from ``[layer, head, query, key]``."""
    found = (1 - residual) * attention.mean(1) + residual * torch.eye(attention.shape[-1])
    return found / found.sum(-1, keepdim=True)


def of_eager(name: str, inputs: dict[str, Tensor]) -> Tensor:
    """Attention of the bare eager model ``[layer, head, query, key]``."""
    return torch.cat(ZOO[name].build("eager")(**inputs, output_attentions=True, use_cache=False).attentions)


def product(layers: Tensor) -> Tensor:
    found = torch.eye(layers.shape[-1])
    for one in layers:
        found = one @ found
    return found


# Rollout


@pytest.mark.parametrize("name", [name for name in ZOO if name not in REFUSED])
def test_rollout_is_the_product_of_the_bare_models_layers(name):
    inputs = ZOO[name].prompt(1 if ZOO[name].single_image else 2).inputs
    attention = of_eager(name, inputs)
    found = rollout(ZOO[name].build(), inputs)
    assert found.axes == ("query", "key")
    torch.testing.assert_close(found.values, product(mixed(attention, 0.5)), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.values.sum(-1), torch.ones(len(found.values)))


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_be_followed_are_refused(name):
    inputs = ZOO[name].prompt(1).inputs
    for measure in (rollout, attention_flow):
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            measure(ZOO[name].build(), inputs)


@pytest.mark.parametrize("residual", [0.0, 0.3, 1.0])
def test_the_share_of_the_residual_stream(residual):
    inputs = asked()
    found = rollout(ZOO["llava"].build(), inputs, residual=residual).values
    torch.testing.assert_close(found, product(mixed(of_eager("llava", inputs), residual)), rtol=0, atol=1e-5)
    assert torch.equal(found, torch.eye(len(found))) == (residual == 1)


def test_rows_are_taken_in_pieces(monkeypatch):
    inputs = asked()
    whole = rollout(ZOO["llava"].build(), inputs).values
    for some in (1, 3 * HEADS * len(whole), 7 * HEADS * len(whole) + 1):
        monkeypatch.setattr(flow, "_CHUNK", some)
        torch.testing.assert_close(rollout(ZOO["llava"].build(), inputs).values, whole, rtol=0, atol=1e-6)


def test_heads_with_sinks_of_their_own_are_brought_back_to_one():
    """gpt-oss: rows of attention sum to less than 1."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from zoo import CLIP, ROPE, TEXT

    text = dict(TEXT, model_type="gpt_oss", num_local_experts=2, num_experts_per_tok=2, rope_parameters=ROPE)
    config = LlavaConfig(text_config=text, vision_config=CLIP, image_token_index=IMG, image_seq_length=16)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.model.language_model.parameters():
        parameter.data.normal_(0, 0.3)
    model.set_attn_implementation({"text_config": "eager"})
    inputs = asked()
    attention = torch.cat(model(**inputs, output_attentions=True, use_cache=False).attentions)
    assert attention.sum(-1).max() < 0.999
    torch.testing.assert_close(rollout(model, inputs).values, product(mixed(attention, 0.5)), rtol=0, atol=1e-5)


def under(recipe: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Rollout by what each row attends to in a look at all rows, head gains included."""
    from vlmattn.inspection import look

    decode = lambda ids, **_: str(ids[0])  # noqa: E731
    processor = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=dict, decode=decode))
    count = inputs["input_ids"].shape[1]
    trace = look(ZOO["llava"].build(), processor, inputs, recipe, max_new_tokens=1, rows=range(count))
    rows = [trace.attention(row).values[..., :count] * trace.gains[row][..., None] for row in range(count)]
    return product(mixed(torch.stack(rows, 2), 0.5))


@pytest.mark.parametrize(
    "recipe",
    [
        PAI(alpha=0.9, layers="0:"),
        VHR(layers="0:"),
        Knockout(layers="1:"),
        Bidirectional(),
        Heads(heads="1.2,2.0", rows="all"),
    ],
    ids=["pai", "vhr", "knockout", "bidirectional", "heads"],
)
def test_a_recipes_attention_is_rolled_out(recipe):
    inputs = asked(2)
    model = ZOO["llava"].build()
    found = rollout(model, inputs, recipe).values
    torch.testing.assert_close(found, under(recipe, inputs), rtol=0, atol=1e-5)
    bare = rollout(model, inputs).values
    assert not torch.allclose(found, bare, atol=1e-3)
    with vlmattn.applied(model, recipe):
        assert torch.equal(rollout(model, inputs).values, found)
        assert torch.equal(rollout(model, inputs, "none").values, bare)
        model.vlmattn.disable()
        assert torch.equal(rollout(model, inputs).values, bare)
    assert "vlmattn" not in model.__dict__


def test_a_blocked_head_has_no_share():
    """Nothing but head 3 of each layer is left: rollout of this head, whatever it does to later layers."""
    inputs, model = asked(), ZOO["llava"].build()
    recipe = Heads(heads=",".join(f"{layer}.{head}" for layer in range(4) for head in range(3)), rows="all")
    only = ZOO["llava"].build("eager")
    for layer in find_family(only).layers(only):

        def cut(_: Any, args: Any) -> tuple[Tensor]:
            out = args[0].clone()
            out[..., : 3 * 8] = 0
            return (out,)

        layer.self_attn.o_proj.register_forward_pre_hook(cut)
    seen = torch.cat(only(**inputs, output_attentions=True, use_cache=False).attentions)[:, 3]
    one = 0.5 * seen / HEADS + 0.5 * torch.eye(seen.shape[-1])
    found = rollout(model, inputs, recipe).values
    torch.testing.assert_close(found, product(one / one.sum(-1, keepdim=True)), rtol=0, atol=1e-5)


def test_a_decoding_rule_has_no_part_in_it():
    inputs, model = asked(), ZOO["llava"].build()
    with pytest.warns(UserWarning, match="acts in generate"):
        found = rollout(model, inputs, VCD()).values
    assert torch.equal(found, rollout(model, inputs).values)


def hooks(model: Any) -> int:
    """Take it after a first forward: transformers hangs hooks of its own on vision towers."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_as_before():
    inputs, model = ZOO["qwen2_5_vl"].prompt(2).inputs, ZOO["qwen2_5_vl"].build()
    before = model(**inputs).logits
    count, attributes, rope = hooks(model), sorted(model.__dict__), model.model.rope_deltas
    rollout(model, inputs, "pai")
    attention_flow(model, inputs, keys=[0], progress=False)
    stop = model.model.language_model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout(model, inputs)
    stop.remove()
    assert (hooks(model), sorted(model.__dict__)) == (count, attributes)
    assert model.model.rope_deltas is rope
    assert torch.equal(model(**inputs).logits, before)


# Flow


def cut(layers: Tensor, row: int, key: int) -> float:
    """The smallest cut of a small graph, over all ways to part its inner nodes."""
    depth, nodes = len(layers), layers.shape[-1]
    inner = [(layer, node) for layer in range(1, depth) for node in range(nodes)]
    others = [(0, node) for node in range(nodes) if node != key]  # nothing leaves them
    best = math.inf
    for near in itertools.product((False, True), repeat=len(inner)):
        side = dict(zip(inner, near, strict=True)) | dict.fromkeys(others, True) | {(depth, row): True, (0, key): False}
        total = 0.0
        for layer in range(depth):
            for query, end in itertools.product(range(nodes), range(nodes)):
                if side.get((layer + 1, query), False) and not side[(layer, end)]:
                    total += float(layers[layer, query, end])
        best = min(best, total)
    return best


def flows(monkeypatch: Any, made: Tensor, **options: Any) -> Tensor:
    """``attention_flow`` of made-up A' ``[layer, query, key]``; ``images``: number of the image of each token, 0 for text."""
    tokens = made.shape[-1]
    images = options.pop("images", [0] * tokens)
    family = SimpleNamespace(
        anatomy=lambda _: SimpleNamespace(layers=len(made), causal=True),
        image_lengths=lambda *_: [images.count(number) for number in dict.fromkeys(images) if number],
    )
    types = torch.tensor([[int(number > 0) for number in images]], dtype=torch.uint8)

    def each(model: Any, inputs: Any, recipe: Any, residual: Any, processor: Any, use: Any) -> None:
        for one in made:
            for start in range(0, tokens, 2):
                use(start, one[start : start + 2])

    with monkeypatch.context() as patch:
        patch.setattr(flow, "prompt_of", lambda *_: (family, {}, types))
        patch.setattr(flow, "_each_layer", each)
        return attention_flow(None, {}, progress=False, **options).values


def test_flow_of_two_layers_written_out(monkeypatch):
    """From token 2 to token 0: 0.5 + 0.2 + 0.3 leave it for tokens 0, 1, 2, of which 1, 0.4 and 0.1 go on to token 0."""
    first = torch.tensor([[1.0, 0, 0], [0.4, 0.6, 0], [0.1, 0.2, 0.7]])
    second = torch.tensor([[1.0, 0, 0], [0.3, 0.7, 0], [0.5, 0.2, 0.3]])
    layers = torch.stack([first, second])
    assert flows(monkeypatch, layers).tolist() == pytest.approx([0.5 + 0.2 + 0.1, 0.2 + 0.2, 0.3])
    assert flows(monkeypatch, layers, row=1).tolist() == pytest.approx([0.3 + 0.4, 0.6, 0])
    assert flows(monkeypatch, layers, row=0).tolist() == pytest.approx([1, 0, 0])
    assert flows(monkeypatch, layers, layers=1).tolist() == pytest.approx([0.5, 0.2, 0.3])
    assert flows(monkeypatch, layers, keys=[-1, 0])[[0, 2]].tolist() == pytest.approx([0.8, 0.3])
    assert flows(monkeypatch, layers, keys=[-1, 0])[1].isnan()


def test_tokens_that_count_as_one_written_out(monkeypatch):
    """Tokens 1 and 2 are one node: capacities are mean over rows, sum over keys."""
    layers = torch.tensor([[[1.0, 0, 0, 0], [0.4, 0.6, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]]])
    wanted = [0.1, 0.5, 0.5, 0.4]
    assert flows(monkeypatch, layers, images=[0, 1, 1, 0], merge=2).tolist() == pytest.approx(wanted)
    wanted = [0.3, 0.7, 0.7, 0]  # from the node
    assert flows(monkeypatch, layers, images=[0, 1, 1, 0], merge=2, row=1).tolist() == pytest.approx(wanted)
    for apart in ([0, 1, 2, 0], [0, 1, 0, 0]):  # of two images, or one is text
        assert flows(monkeypatch, layers, images=apart, merge=2).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_nodes_of_tokens():
    images = [-1, -1, 0, 0, 0, 0, 0, -1, 0, 0, 1, 1, 1, -1]
    assert flow._nodes(images, 1).tolist() == list(range(14))
    assert flow._nodes(images, 2).tolist() == [0, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7, 7, 8, 9]
    assert flow._nodes(images, 99).tolist() == [0, 1, 2, 2, 2, 2, 2, 3, 4, 4, 5, 5, 5, 6]


@st.composite
def graphs(draw):
    """A' of few layers and tokens, causal or not, rows sum to 1; some edges are missing."""
    depth, tokens = draw(st.sampled_from([(1, 4), (2, 3), (3, 3), (2, 5)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    score = torch.randn(depth, tokens, tokens, generator=generator) * draw(st.sampled_from([0.1, 1, 4]))
    if draw(st.booleans()):
        score = score.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
    gone = torch.rand(score.shape, generator=generator) < draw(st.sampled_from([0, 0.3]))
    score = score.masked_fill(gone & ~torch.eye(tokens).bool(), -math.inf)
    return score.softmax(-1)


@settings(max_examples=40)
@given(graphs(), st.integers(0, 4), st.integers(0, 4))
def test_flow_is_the_smallest_cut(layers, row, key):
    row, key = row % layers.shape[-1], key % layers.shape[-1]
    found = flows(pytest.MonkeyPatch(), layers, row=row, keys=[key])[key]
    assert float(found) == pytest.approx(cut(layers, row, key), abs=1e-5)


@settings(max_examples=40)
@given(graphs())
def test_flow_is_at_least_rollout_and_at_most_what_enters_the_key(layers):
    """What is rolled out is one flow: it fits through every edge."""
    found = flows(pytest.MonkeyPatch(), layers)
    assert bool((found <= 1 + 1e-5).all())
    assert bool((found <= layers[0].sum(0) + 1e-5).all())
    assert bool((found >= product(layers)[-1] - 1e-5).all())


@settings(max_examples=40)
@given(graphs())
def test_one_layer_is_attention_itself(layers):
    torch.testing.assert_close(flows(pytest.MonkeyPatch(), layers, layers=1), layers[-1, -1], rtol=0, atol=1e-6)


def by_scipy(layers: Tensor, row: int, key: int) -> float:
    """Maximum flow by another library, on capacities in whole millionths."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_flow

    depth, nodes = len(layers), layers.shape[-1]
    matrix = np.zeros(((depth + 1) * nodes,) * 2, dtype=np.int32)
    for layer, one in enumerate(layers):
        rows, columns = slice((layer + 1) * nodes, (layer + 2) * nodes), slice(layer * nodes, (layer + 1) * nodes)
        matrix[rows, columns] = (one.numpy() * 1e6).round()
    return maximum_flow(csr_matrix(matrix), depth * nodes + row, key).flow_value / 1e6


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "paligemma", "gemma3_window"])
def test_flow_in_a_model(name):
    """PaliGemma's and Gemma's tokens see ahead, so their rows reach later tokens."""
    inputs = ZOO[name].prompt(1).inputs
    layers = mixed(of_eager(name, inputs), 0.5)
    tokens = layers.shape[-1]
    for row in (-1, tokens // 2):
        keys = [0, tokens // 3, tokens // 2, tokens - 1]
        found = attention_flow(ZOO[name].build(), inputs, row, keys=keys, progress=False)
        assert found.axes == ("key",)
        wanted = [by_scipy(layers, row % tokens, key) for key in keys]
        assert found.values[keys].tolist() == pytest.approx(wanted, abs=1e-4)
        assert int(found.values.isnan().sum()) == tokens - len(keys)


def test_flow_under_a_recipe_and_of_merged_tokens():
    inputs, model = asked(2), ZOO["llava"].build()
    recipe = Knockout(layers="0:")  # text rows do not see the image
    visual = inputs["input_ids"][0] == IMG
    found = attention_flow(model, inputs, recipe=recipe, progress=False).values
    assert bool((found[visual] == 0).all())
    assert bool((found[~visual] > 0).all())
    bare = attention_flow(model, inputs, progress=False).values
    assert bool((bare > 0).all())
    layers = mixed(of_eager("llava", inputs), 0.5)
    joined = torch.zeros(len(visual), 11)  # 3 words, 2 images of 16 in blocks of 8, 4 words
    joined[range(len(visual)), [0, 1, 2, *[3] * 8, *[4] * 8, *[5] * 8, *[6] * 8, 7, 8, 9, 10]] = 1
    small = (joined.T @ layers @ joined) / joined.sum(0)[:, None]
    merged = attention_flow(model, inputs, merge=8, progress=False).values
    wanted = torch.tensor([by_scipy(small, 10, node) for node in range(11)], dtype=torch.float32)
    torch.testing.assert_close(merged, joined @ wanted, rtol=0, atol=1e-4)


def test_the_bar_can_be_silent(capsys):
    attention_flow(ZOO["llava"].build(), asked(), keys=[3], progress=False)
    assert capsys.readouterr().err == ""
    attention_flow(ZOO["llava"].build(), asked(), keys=[3])
    assert "flow: 100%" in capsys.readouterr().err


# Refusals


def test_what_cannot_be_followed_is_said(monkeypatch):
    inputs, model = asked(), ZOO["llava"].build()
    tokens = inputs["input_ids"].shape[1]
    text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    for error, match, given_inputs, options in (
        (InputError, "no image tokens", text, {}),
        (InputError, "one prompt without padding", left_padded([inputs, inputs]), {}),
        (OptionError, "residual must be within 0..1, got 1.5", inputs, {"residual": 1.5}),
        (OptionError, "residual", inputs, {"residual": -0.1}),
        (UnsupportedError, "'fastv' drops tokens before layer 2", inputs, {"recipe": FastV(layer=2, keep_ratio=0.5)}),
        (UnsupportedError, "'visionzip' drops tokens before layer 0", inputs, {"recipe": "visionzip"}),
        (UnsupportedError, "'avl' changes what an answer sees", inputs, {"recipe": "avl"}),
    ):
        for measure in (rollout, attention_flow):
            with pytest.raises(error, match=match):
                measure(model, given_inputs, **options)
    edges = 4 * tokens * (tokens + 1) // 2
    for error, match, options in (
        (
            InputError,
            rf"token {tokens} is out of range: the prompt has {tokens} \(0 to {tokens - 1}\)",
            {"row": tokens},
        ),
        (InputError, "out of range", {"keys": [0, -tokens - 1]}),
        (OptionError, "layers must be within 1..4, got 0", {"layers": 0}),
        (OptionError, "layers must be within 1..4, got 5", {"layers": 5}),
        (OptionError, "merge must be at least 1, got 0", {"merge": 0}),
    ):
        with pytest.raises(error, match=match):
            attention_flow(model, inputs, **options)
    monkeypatch.setattr(flow, "_EDGES", edges - 1)
    with pytest.raises(
        InputError, match=rf"would have {edges:,} edges \(4 layers, {tokens} nodes; at most {edges - 1:,}\)"
    ):
        attention_flow(model, inputs)
    for options in ({"merge": 2}, {"layers": 3}):  # what the message says helps
        attention_flow(model, inputs, keys=[0], progress=False, **options)
    monkeypatch.setattr(flow, "_EDGES", edges)
    attention_flow(model, inputs, keys=[0], progress=False)
