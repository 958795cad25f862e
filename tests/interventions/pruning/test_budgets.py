"""Policies that hold a share of all tokens against a decoder run by hand, and against their own choice hidden."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hand import Hand, causal, check_isolation
from numerics import near
from safetensors.torch import load_file
from tiny import build, generate, left_padded, prompt
from torch.nn.functional import pad
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmattn
from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.interventions import H2O, TOVA, VAR, KVRandom, LookM, PyramidKV, SnapKV, StreamingLLM, VLCache
from vlmattn.recipe import Recipe

FAMILIES = ("llava", "qwen2_5_vl")
NEW = 7
POLICIES = {
    "snapkv": SnapKV(keep_ratio=0.3, window=4, kernel=3),
    "pyramidkv": PyramidKV(keep_ratio=0.5, window=2, kernel=3, beta=4.0),
    "h2o": H2O(keep_ratio=0.3),
    "h2o_mean": H2O(keep_ratio=0.3, recent=0.0, by="mean"),
    "tova": TOVA(keep_ratio=0.3),
    "streaming": StreamingLLM(keep_ratio=0.3),
    "kv_random": KVRandom(keep_ratio=0.3),
    "lookm": LookM(keep_ratio=0.3),
    "lookm_average": LookM(keep_ratio=0.5, merge="average", recent=0.2),
    "lookm_drop": LookM(keep_ratio=0.5, merge="none"),
    "vlcache": VLCache(keep_ratio=0.3, p=0.3, recent=0.2),
}
BY_HEAD = {"snapkv", "pyramidkv", "h2o", "h2o_mean", "vlcache", "lookm", "lookm_average", "lookm_drop"}
every_policy = pytest.mark.parametrize("name", POLICIES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family):
    return [prompt(family, 2), prompt(family, 1, seed=3, words=7)]


def hidden(policy):
    return type(policy)(**{**policy.options(), "mode": "mask"})


class Teller:
    """Each policy told again from its docstring, on one sequence, with every key in sight."""

    def __init__(self, policy, layers):
        self.policy, self.layers = policy, layers
        self.there, self.paid, self.rows, self.held = {}, {}, {}, {}

    def see(self, layer, step, query, key):
        heads, keys = key.shape[:2]
        if step == 0:
            seen = causal(keys, keys)[None].expand(heads, -1, -1)
        else:
            seen = pad(self.there[layer], (0, 1), value=True)[:, None]
        repeat = query.shape[0] // heads
        scores = query @ key.repeat_interleave(repeat, 0).transpose(1, 2) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen.repeat_interleave(repeat, 0), float("-inf")).softmax(-1)
        if step == 0:
            self.held[layer] = self.budget(layer, keys)
        if step == 0 or self.policy.stepwise:
            there = torch.ones(heads, keys, dtype=torch.bool) if step == 0 else seen[:, 0]
            self.there[layer] = self.choose(layer, step, weights.view(heads, repeat, -1, keys), there)
        else:
            self.there[layer] = seen[:, 0]
        return seen

    def budget(self, layer, n):
        policy = self.policy
        c = policy.keep_ratio * n
        if isinstance(policy, PyramidKV):
            last = c / policy.beta
            first = 2 * c - last
            if first > n - policy.window:
                first, last = n - policy.window, 2 * c - n + policy.window
            assert last >= policy.window, "the test is about a pyramid"
            return round(first + (last - first) * layer / (self.layers - 1))
        return round(c)

    def choose(self, layer, step, weights, there):
        """bool ``[kv_heads, keys]`` from attention ``[kv_heads, repeat, rows, keys]``."""
        policy, held, keys = self.policy, self.held[layer], weights.shape[-1]
        must = torch.zeros_like(there)
        if isinstance(policy, SnapKV):
            value = weights[:, :, -policy.window :, : -policy.window].mean(2)
            half = policy.kernel // 2
            wide = pad(value, (half, half))
            value = torch.stack([wide[..., j : j + policy.kernel].mean(-1) for j in range(value.shape[-1])], -1)
            value = pad(value.mean(1), (0, policy.window))
            must[:, -policy.window :] = True
        elif isinstance(policy, H2O):
            before = pad(self.paid[layer], (0, 1)) if step else 0
            self.paid[layer] = value = before + weights.sum(2).mean(1)
            if policy.by == "mean":
                value = value / torch.arange(keys, 0, -1)
            for head in range(len(there)):
                alive = there[head].nonzero().flatten()
                must[head, alive[len(alive) - round(policy.recent * held) :]] = True
        elif isinstance(policy, LookM):
            value = weights.sum(2).mean(1)
            value = torch.where(self.visual, value, value + value.amax(1, keepdim=True))
            must[:, keys - round(policy.recent * held) :] = True
        elif isinstance(policy, TOVA):
            value = weights[:, :, -1].mean((0, 1))[None].repeat(len(there), 1)
            must[:, -1] = True
        elif isinstance(policy, StreamingLLM):
            value = torch.arange(keys).float().repeat(len(there), 1)
            must[:, : policy.sinks] = True
        else:
            value = torch.rand(keys + 1, generator=torch.Generator().manual_seed(layer))[1:].repeat(len(there), 1)
        value = value.masked_fill(must, math.inf).masked_fill(~there, -math.inf)
        kept = value.argsort(descending=True, stable=True)[:, : min(held, int(there[0].sum()))]
        return torch.zeros_like(there).scatter_(1, kept, True)


class Merging(Hand):
    """As ``Hand``, and after the prompt what goes joins what stays, slot by slot."""

    def __init__(self, model, teller):
        super().__init__(model, teller.see)
        self.teller = teller

    def run(self, hidden, positions):
        logits = super().run(hidden, positions)
        if self.step == 1 and self.teller.policy.merge != "none":
            for layer, there in self.teller.there.items():
                for head, stays in enumerate(there):
                    self.merge(layer, head, stays)
        return logits

    def merge(self, layer, head, stays):
        keys, values = self.keys[layer][0, head], self.values[layer][0, head]
        own, joins = keys.clone(), {}
        for gone in (~stays).nonzero().flatten().tolist():
            likeness = torch.cosine_similarity(own[gone][None], own, dim=-1).masked_fill(~stays, -2.0)
            joins.setdefault(int(likeness.argmax()), []).append(gone)
        for states in (keys, values):
            before = states.clone()
            for slot, others in joins.items():
                parts = [
                    before[e] if self.teller.policy.merge == "average" else (before[e] + before[slot]) / 2
                    for e in others
                ]
                states[slot] = torch.stack([before[slot], *parts]).mean(0)


class TellVLCache(Teller):
    """Slots go after the first step, once all layers are known."""

    def __init__(self, policy, layers, first):
        super().__init__(policy, layers)
        self.first, self.dense = first, {}  # the first row behind the last image

    def see(self, layer, step, query, key):
        heads, keys = key.shape[:2]
        seen = causal(keys, keys)[None].expand(heads, -1, -1) if step == 0 else torch.ones(heads, 1, keys).bool()
        if step > 1:
            seen = pad(self.there[layer], (0, 1), value=True)[:, None]
            self.there[layer] = seen[:, 0]
        if step == 0:
            repeat = query.shape[0] // heads
            scores = query @ key.repeat_interleave(repeat, 0).transpose(1, 2) * query.shape[-1] ** -0.5
            rows = scores.masked_fill(~seen[0], float("-inf")).softmax(-1)[:, self.first :]
            shares = [
                float((row[: i + 1] >= self.policy.p * row.max()).sum()) / (i + 1)
                for head in rows
                for i, row in enumerate(head, self.first)
            ]
            self.dense[layer] = sum(shares) / len(shares)
            self.paid[layer] = rows.sum(1).view(heads, repeat, keys).mean(1)
        if step == 1:
            n, policy = keys - 1, self.policy
            held = round(policy.keep_ratio * n * self.dense[layer] * self.layers / sum(self.dense.values()))
            value = self.paid[layer].clone()
            value[:, n - round(policy.recent * held) :] = math.inf
            kept = value.argsort(descending=True, stable=True)[:, : min(held, n)]
            self.there[layer] = pad(torch.zeros(heads, n).bool().scatter_(1, kept, True), (0, 1), value=True)
        return seen


def answers(family, policy, inputs, attn="sdpa", **options):
    model = vlmattn.wrap(build(family, attn), policy)
    return generate(model, inputs, NEW, **options), model


@every_family
@every_policy
def test_equals_the_decoder_run_by_hand(name, family):
    policy, inputs = POLICIES[name], prompt(family, 2)
    model = build(family)
    layers = len(model.model.language_model.layers)
    first = int((inputs["input_ids"][0] == 99).nonzero().max()) + 1
    teller = TellVLCache(policy, layers, first) if name == "vlcache" else Teller(policy, layers)
    teller.visual = inputs["input_ids"][0] == 99
    hand = Merging(model, teller) if isinstance(policy, LookM) else Hand(model, teller.see)
    expected = hand.generate(inputs, NEW)
    out, wrapped = answers(family, policy, inputs)
    near(out[0], expected)
    assert sum(wrapped.vlmattn.report()["fired"].values()) > 0
    assert (generate(build(family), inputs, NEW)[0, 1:] - expected[1:]).abs().max() > 0.05, "it does nothing here"


@every_family
@every_policy
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_every_sequence_of_a_padded_batch_gets_what_it_gets_alone(name, family, attn):
    batch, _ = answers(family, POLICIES[name], left_padded(pair(family)), attn)
    for row, single in enumerate(pair(family)):
        near(batch[row], answers(family, POLICIES[name], single, attn)[0][0])


@every_policy
def test_beams(name):
    options = dict(max_new_tokens=NEW, num_beams=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_scores=True)  # fmt: skip
    found = vlmattn.wrap(build("llava"), POLICIES[name]).generate(**left_padded(pair("llava")), **options)
    for row, single in enumerate(pair("llava")):
        alone = vlmattn.wrap(build("llava"), POLICIES[name]).generate(**single, **options)
        assert torch.equal(found.sequences[row, -NEW:], alone.sequences[0, -NEW:])
        near(found.sequences_scores[row], alone.sequences_scores[0])


@every_family
@every_policy
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_evicted_equals_hidden(name, family, options):
    inputs = left_padded(pair(family))
    near(answers(family, POLICIES[name], inputs, **options)[0], answers(family, hidden(POLICIES[name]), inputs, **options)[0])  # fmt: skip


def test_wide_layers_hold_more_and_all_hold_the_share():
    policy, inputs = POLICIES["vlcache"], prompt("llava", 2)
    held = [layer.keys.shape[2] - 4 for layer in cache_after(policy, inputs, 5).layers]
    assert len(set(held)) > 1
    assert abs(sum(held) - 4 * 0.3 * inputs["input_ids"].shape[1]) <= 2  # to rounding


def cache_after(policy, inputs, new):
    model = vlmattn.wrap(build("llava"), policy)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return model.generate(**inputs, return_dict_in_generate=True, **options).past_key_values


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "vlcache"])
def test_slots_are_gone_and_the_library_counts_all(name):
    policy, inputs = POLICIES[name], prompt("llava", 2)
    length = inputs["input_ids"].shape[1]
    teller = Teller(policy, 4)
    more = 0 if policy.stepwise else 4
    cache = cache_after(policy, inputs, 5)
    assert [layer.keys.shape[2] for layer in cache.layers] == [teller.budget(n, length) + more for n in range(4)]
    assert cache.get_seq_length() == length + 4


@every_policy
def test_a_second_turn(name):
    """Dropped slots equal hidden ones turn by turn; where heads hide for themselves, hiding is for one prompt."""
    found, policy = [], POLICIES[name]
    for method in (policy, hidden(policy)):
        model = vlmattn.wrap(build("llava"), method)
        first = model.generate(**prompt("llava", 2), max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)  # fmt: skip
        more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = dict(input_ids=more, attention_mask=torch.ones_like(more), past_key_values=first.past_key_values)
        if method is not policy and name in BY_HEAD:
            with pytest.raises(UnsupportedError, match="hides slots from steps only"):
                generate(model, turn, 4)
            return
        found.append(generate(model, turn, 4))
    near(*found)


@every_policy
def test_text_alone(name):
    inputs = {"input_ids": torch.arange(20, 60)[None], "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    bare = generate(build("llava"), inputs, NEW)
    assert (answers("llava", POLICIES[name], inputs)[0] - bare).abs().max() > 0.01


@every_policy
def test_threads_do_not_meet(name):
    check_isolation(POLICIES[name], NEW)


@pytest.mark.parametrize(
    "name", ["snapkv@0.2", "pyramidkv@0.3", "h2o@0.2", "tova@0.1", "streaming@0.25", "kv_random@0.5"]
)
def test_budgets_by_name(name):
    recipe = Recipe.of(name)
    assert recipe.name == name
    assert recipe.interventions[0].keep_ratio == float(name.split("@")[1])


def test_another_seed_draws_others():
    inputs = prompt("llava", 2)
    one, other = (answers("llava", KVRandom(keep_ratio=0.3, seed=seed), inputs)[0] for seed in (0, 1))
    assert (one - other).abs().max() > 0.01


def test_refusals():
    with pytest.raises(OptionError, match="kernel must be odd, got 4"):
        SnapKV(kernel=4)
    conflict = "'snapkv' keeps the heads of a layer apart, where 'var' cannot act"
    with pytest.raises(OptionError, match=re.escape(conflict)):
        vlmattn.wrap(build("llava"), [SnapKV(), VAR(layers="0:", dims=(3, 17), tau=2.0)])
    model = vlmattn.wrap(build("llava"), SnapKV())
    with pytest.raises(UnsupportedError, match="leave prompt_lookup_num_tokens out"):
        model.generate(**prompt("llava"), prompt_lookup_num_tokens=3, max_new_tokens=4)


def test_tokens_in_all_heads_alike_go_with_edits():
    inputs = left_padded(pair("llava"))
    found = [
        answers("llava", [TOVA(keep_ratio=0.5, mode=mode), VAR(layers="0:", dims=(3, 17), tau=1.0)], inputs)[0]
        for mode in ("drop", "mask")
    ]
    near(*found)


# --- the slots that kvpress' presses keep on the same text model (tools/kvpress_goldens.py)

GOLDEN = Path(__file__).parents[2] / "goldens" / "kvpress" / "slots.safetensors"
AS_KVPRESS = {
    "snapkv": SnapKV(keep_ratio=0.25, window=6, kernel=5),
    "pyramidkv": PyramidKV(keep_ratio=0.5, window=4, kernel=3, beta=4.0),
    "tova": TOVA(keep_ratio=0.25),
    "h2o_mean": H2O(keep_ratio=0.25, recent=0.0, by="mean"),
    "streaming": StreamingLLM(keep_ratio=0.25),
}


def text_model():
    """A LLaVA whose language model is that of the golden file, and the file's tensors."""
    found = load_file(GOLDEN)
    text = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    ).eval()
    own = {name.removeprefix("model.model."): found[name] for name in found if name.startswith("model.model.")}
    model.model.language_model.load_state_dict(own)
    return model, found


@pytest.mark.parametrize("name", AS_KVPRESS)
def test_the_slots_that_kvpress_keeps(name):
    model, found = text_model()
    tokens = found["tokens"]
    with torch.no_grad():
        whole = model(tokens, use_cache=True).past_key_values
        vlmattn.wrap(model, AS_KVPRESS[name])
        kept = model(tokens, use_cache=True).past_key_values
    for index, (every, some) in enumerate(zip(whole.layers, kept.layers, strict=True)):
        expected = found[f"{name}.{index}"]
        assert expected.shape[1] < tokens.shape[1]
        near(some.keys[0], every.keys[0].gather(1, expected[..., None].expand(-1, -1, every.keys.shape[-1])))
