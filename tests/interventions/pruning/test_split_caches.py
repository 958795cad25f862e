"""Heads that keep a window in a store of their own, against a decoder run by hand that keeps everything."""

from __future__ import annotations

import copy

import pytest
import torch
from hand import Hand, causal, check_isolation
from tiny import build, generate, left_padded, prompt

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError, UnsupportedError
from vlmattn.interventions import DuoAttention, FastV, HeadProfile, RazorAttention
from vlmattn.models import find_family

FAMILIES, NEW = ("llava", "qwen2_5_vl"), 7
FULL = {(0, 0), (1, 1), (2, 0)}  # of 4 layers x 2 KV heads
HEADS = ",".join(f"{layer}.{head}" for layer, head in sorted(FULL))
POLICIES = {
    "duo": DuoAttention(heads=HEADS, sinks=2, recent=5),
    "razor": RazorAttention(heads=HEADS, sinks=2, recent=3, fraction=100),
    "razor_share": RazorAttention(heads=HEADS, sinks=1, recent=2, fraction=4),
    "duo_long": DuoAttention(heads=HEADS, sinks=2, recent=500),
}
every_policy = pytest.mark.parametrize("name", [name for name in POLICIES if name != "duo_long"])
every_family = pytest.mark.parametrize("family", FAMILIES)


def wrapped(family, policy, attn="sdpa"):
    return vlmattn.wrap(build(family, attn), policy)


class Teller(Hand):
    """Every head keeps everything and is told what it may see; what it may not see weighs as its mean, if the policy says so."""

    def __init__(self, model, policy, tokens):
        super().__init__(model, self.shown)
        self.policy, self.tokens = policy, tokens

    def shown(self, layer, step, query, key):
        keys = key.shape[1]
        if step == 0:
            return causal(keys, keys)[None]
        places = torch.arange(keys)
        near = (places < self.policy.sinks) | (places >= keys - self.policy.window(self.tokens))
        whole = torch.ones(keys, dtype=torch.bool)
        return torch.stack([whole if (layer, head) in FULL else near for head in range(key.shape[0])])[:, None]

    def attend(self, query, key, value, seen):
        if not self.policy.compensate or query.shape[1] > 1:
            return super().attend(query, key, value, seen)
        gone = ~seen[:, 0, :, None]
        count = gone.sum(1).clamp_min(1)
        means = [((states * gone).sum(1) / count)[:, None] for states in (key, value)]
        key, value = (torch.cat([states, mean], 1) for states, mean in zip((key, value), means, strict=True))
        scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
        bias = torch.where(gone.any(1), gone.sum(1).clamp_min(1).float().log(), float("-inf"))
        scores = scores.masked_fill(~torch.cat([seen, torch.ones(len(seen), 1, 1, dtype=torch.bool)], 2), float("-inf"))
        scores[..., -1] += bias
        return scores.softmax(-1) @ value


@every_family
@every_policy
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_equals_the_decoder_run_by_hand(name, family, attn):
    policy, inputs = POLICIES[name], prompt(family, 2)
    expected = Teller(build(family), policy, inputs["input_ids"].shape[1]).generate(inputs, NEW)
    torch.testing.assert_close(generate(wrapped(family, policy, attn), inputs, NEW)[0], expected, rtol=0, atol=1e-5)
    assert (generate(build(family), inputs, NEW)[0, 1:] - expected[1:]).abs().max() > 0.05


@every_family
@every_policy
@pytest.mark.parametrize("ways", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_every_sequence_of_a_padded_batch_gets_what_it_gets_alone(name, family, ways):
    prompts, model = [prompt(family, 2), prompt(family, 1, seed=3, words=7)], wrapped(family, POLICIES[name])
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **ways)
    batch = model.generate(**left_padded(prompts), **options)
    for row, single in enumerate(prompts):
        assert torch.equal(batch[row, -NEW:], model.generate(**single, **options)[0, -NEW:])
    if not ways:
        logits = generate(model, left_padded(prompts), NEW)
        for row, single in enumerate(prompts):
            torch.testing.assert_close(logits[row], generate(model, single, NEW)[0], rtol=0, atol=1e-5)


def test_a_window_that_holds_everything_changes_nothing():
    inputs = left_padded([prompt("llava", 2), prompt("llava", 1, seed=3, words=7)])
    out = generate(wrapped("llava", POLICIES["duo_long"]), inputs, NEW)
    torch.testing.assert_close(out, generate(build("llava"), inputs, NEW), rtol=0, atol=1e-5)


def cache_of(policy, inputs, new=5):
    model = vlmattn.wrap(build("llava"), policy) if policy else build("llava")
    options = dict(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    return model.generate(**inputs, **options)


def test_memory_is_saved_and_not_masked():
    inputs = prompt("llava", 2)
    length, size = (
        inputs["input_ids"].shape[1] + 4,
        8 * 4,
    )  # after 5 tokens the fifth is not in the cache; 8 dims of 4 bytes
    cache = cache_of(POLICIES["duo"], inputs).past_key_values
    assert [layer.nbytes for layer in cache.layers[:3]] == [2 * size * (length + 2 + 5)] * 3
    assert cache.layers[3].nbytes == 2 * size * 2 * (2 + 5), "no head of the last layer keeps everything"
    bare = cache_of(None, inputs).past_key_values
    assert sum(layer.nbytes for layer in cache.layers) < 0.6 * sum(2 * layer.keys.nbytes for layer in bare.layers)
    assert cache.get_seq_length() == bare.get_seq_length() == length
    razor = cache_of(POLICIES["razor"], inputs).past_key_values.layers[0]
    assert razor.nbytes == 2 * size * (length + 2 + 3) + 2 * 8 * 4, "and a sum in float32"


def test_a_second_turn():
    """Its rows see what is stored and each other; a window that holds everything gives what the bare model says."""
    found = []
    for policy in (POLICIES["duo_long"], None):
        model = vlmattn.wrap(build("llava"), policy) if policy else build("llava")
        inputs = prompt("llava", 2)
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        first = model.generate(**inputs, **options)
        more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
        found.append(
            generate(
                model,
                dict(input_ids=more, attention_mask=torch.ones_like(more), past_key_values=first.past_key_values),
                4,
            )
        )
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    model, inputs = wrapped("llava", POLICIES["razor"]), prompt("llava", 2)
    first = model.generate(**inputs, **options)
    more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
    kept = copy.deepcopy(first.past_key_values)
    turn = dict(input_ids=more, attention_mask=torch.ones_like(more))
    once = generate(model, {**turn, "past_key_values": first.past_key_values}, 4)
    assert torch.equal(generate(model, {**turn, "past_key_values": kept}, 4), once), (
        "a copy of the cache is a cache of its own"
    )


def test_beside_dropped_rows():
    """Streaming heads keep the last of the tokens that are left."""
    inputs = left_padded([prompt("llava", 2), prompt("llava", 1, seed=3, words=7)])
    found = [
        generate(wrapped("llava", [FastV(layer=2, mode=mode), POLICIES["razor"]]), inputs, NEW)
        for mode in ("drop", "mask")
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@every_policy
def test_unwrapped_is_as_before_and_threads_do_not_meet(name):
    check_isolation(POLICIES[name], NEW)


def test_heads_come_from_a_profile(tmp_path):
    model = build("llava")
    anatomy = find_family(model).anatomy(model)
    scores = tuple(
        tuple(float(layer == 3 and head in (0, 1)) + 0.1 * (head == 2) for head in range(4)) for layer in range(4)
    )
    path = tmp_path / "heads.json"
    HeadProfile(fingerprint=anatomy.fingerprint, scores={"retrieval": scores}).save(path)
    bound = DuoAttention(profile=str(path), share=0.25).bind(anatomy)
    assert bound.heads == "0.1,3.0", "of 8 KV heads two; a KV head is as good as the best of its two query heads"
    with pytest.raises(OptionError, match="the profile has no score 'echo'"):
        DuoAttention(profile=str(path), score="echo").bind(anatomy)


def test_refusals():
    model = build("llava")
    with pytest.raises(OptionError, match=r"duo\.heads must look like"):
        DuoAttention(heads="3")
    with pytest.raises(OptionError, match="which heads keep everything"):
        vlmattn.wrap(model, "duo")
    with pytest.raises(OptionError, match="names KV head 2 of layer 0, but the model has 4 layers of 2 KV heads"):
        vlmattn.wrap(model, DuoAttention(heads="0.2"))
    with pytest.raises(OptionError, match="'duo' keeps the heads of a layer apart, where 'pai' cannot act"):
        vlmattn.wrap(model, [DuoAttention(heads="0.0"), vlmattn.PAI(layers="0:")])
    with pytest.raises(OptionError, match="has no mode 'mask'"):
        DuoAttention(heads="0.0", mode="mask")
    vlmattn.wrap(model, DuoAttention(heads="0.0", sinks=1, recent=2))
    inputs = prompt("llava")
    with pytest.raises(UnsupportedError, match="static one does not tell"):
        model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
    with pytest.raises((UnsupportedError, ValueError), match=r"drafts of assisted decoding|crop|assisted"):
        model.generate(**inputs, prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False, pad_token_id=0)
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    vlmattn.unwrap(model)
    more = torch.cat([out.sequences, torch.tensor([[7]])], 1)
    with pytest.raises((StateError, InputError), match="only a wrapped model can read"):
        model.generate(
            input_ids=more, attention_mask=torch.ones_like(more), past_key_values=out.past_key_values, max_new_tokens=2
        )
