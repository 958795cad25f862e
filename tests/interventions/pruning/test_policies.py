"""Policies about cached keys and values against a decoder run by hand, and against their own choice hidden by masks."""

from __future__ import annotations

import re

import pytest
import torch
from hand import Hand, causal, check_isolation
from numerics import near
from tiny import IMAGE_TOKEN, build, generate, left_padded, prompt

import vlmattn
from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.interventions import AVL, FastV, LongHeads, RecycledAttention, Rounds
from vlmattn.recipe import Recipe

FAMILIES = ("llava", "qwen2_5_vl")
NEW = 7
POLICIES = {
    "avl": AVL(text_first=2, text_every=2),
    "avl_images": AVL(text_keep=1.0, refresh=2),
    "recycled": RecycledAttention(keys=6, stride=3),
    "recycled_similar": RecycledAttention(keys=6, trigger="similarity", similar=0.3, check=2),
    "rounds": Rounds(watershed="1"),
    "rounds_mass": Rounds(watershed="1", keep_share=0.0, keep_mass=0.3),
    "rounds_read": Rounds(watershed="1", keep_mass=0.3, memory="read"),
    "longheads": LongHeads(tile=2, keep=0.2),
}
EVICTING = ("avl", "avl_images", "rounds", "rounds_mass")
every_policy = pytest.mark.parametrize("name", POLICIES)
every_family = pytest.mark.parametrize("family", FAMILIES)


def answers(family, policy, inputs, attn="sdpa", **options):
    model = vlmattn.wrap(build(family, attn), policy)
    out = generate(model, inputs, NEW, **options)
    return out, model


def images_of(inputs):
    return inputs["input_ids"][0] == IMAGE_TOKEN


def number_of(inputs, family):
    """Which image each token belongs to, -1 for text."""
    visual = images_of(inputs)
    size = int(visual.sum()) // 2
    return torch.where(visual, (visual.cumsum(0) - 1) // size, -1)


def top(scores, among, count):
    """bool: the ``count`` best ones."""
    order = scores.masked_fill(~among, float("-inf")).argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(among).index_fill_(0, order, True) & among


def last_row(query, key, seen=None):
    """Attention ``[heads, keys]`` of the last row of one sequence."""
    scores = torch.einsum("hd,hkd->hk", query[:, -1], key.repeat_interleave(query.shape[0] // key.shape[0], 0))
    return (
        (scores * query.shape[-1] ** -0.5)
        .masked_fill(torch.tensor(False) if seen is None else ~seen, float("-inf"))
        .softmax(-1)
    )


# Each policy told again, on one sequence, from its docstring


class TellAVL:
    def __init__(self, policy, inputs):
        self.policy, self.visual = policy, images_of(inputs)
        self.there, self.core, self.paid = {}, {}, {}

    def grown(self, found, keys, fill):
        return torch.cat([found, torch.full((keys - len(found),), fill, dtype=found.dtype)])

    def see(self, layer, step, query, key):
        keys, policy = key.shape[1], self.policy
        visual = self.grown(self.visual, keys, False)
        if step == 0:
            return self.after(layer, step, query, key, visual, causal(keys, keys)[None])
        there = self.grown(self.there[layer], keys, True)
        full = step % policy.refresh == 0
        seen = there if full else there & (~visual | self.grown(self.core[layer], keys, False))
        self.there[layer] = there
        self.after(layer, step, query, key, visual, there[None, None])
        return seen[None, None]

    def after(self, layer, step, query, key, visual, seen):
        policy, keys = self.policy, key.shape[1]
        s = last_row(query, key, seen[0, -1]).mean(0)
        self.paid[layer] = s + (self.grown(self.paid[layer], keys, 0.0) if step else 0)
        given = int(visual.sum())
        if step == 0:
            secondary = top(s, visual, round(policy.keep_secondary * given))
            self.core[layer] = top(s, secondary, round(policy.keep_core * given))
            self.there[layer] = ~visual | secondary
        elif step % policy.refresh == 0:
            self.core[layer] = top(s, visual & self.there[layer], round(policy.keep_core * given))
        if step and step % policy.text_every == 0 and policy.text_keep < 1:
            text = ~visual & self.there[layer]
            count = int(text.sum())
            stay = min(max(round(policy.text_keep * count), policy.text_first), count)
            number = text.long().cumsum(0)
            value = self.paid[layer] + 1e6 * (number <= policy.text_first) + 1e3 * (number > count - stay // 2)
            self.there[layer] = (self.there[layer] & visual) | top(value, text, stay)
        return seen


class TellRecycled:
    def __init__(self, policy, inputs):
        self.policy, self.held, self.query = policy, {}, {}

    def see(self, layer, step, query, key):
        keys, policy, repeat = key.shape[1], self.policy, query.shape[0] // key.shape[0]
        full = step % policy.stride == 0 and policy.trigger == "stride"
        if policy.trigger == "similarity" and step and step % policy.check == 0:
            full = bool(torch.cosine_similarity(query[:, -1], self.query[layer], dim=-1).mean() < policy.similar)
        if step == 0 or full:
            s = last_row(query, key).view(key.shape[0], repeat, keys).amax(1)
            self.held[layer] = torch.zeros_like(s, dtype=torch.bool)
            self.held[layer].scatter_(1, s.topk(min(policy.keys, keys)).indices, True)
            self.query[layer] = query[:, -1]
            return causal(query.shape[1], keys)[None]
        seen = torch.cat([self.held[layer], torch.ones(len(key), 1, dtype=torch.bool)], 1)
        s = last_row(query, key, seen.repeat_interleave(repeat, 0)).view(key.shape[0], repeat, keys).amax(1)
        worst = s.masked_fill(~seen, 2.0).argmin(1, keepdim=True)
        self.held[layer] = seen.scatter(1, worst, False)
        return seen[:, None]


class TellRounds:
    def __init__(self, policy, inputs):
        self.policy, self.number, self.stay = policy, number_of(inputs, None), None

    def see(self, layer, step, query, key):
        keys, policy = key.shape[1], self.policy
        if step == 0:
            if layer == int(policy.watershed):
                first = int((self.number >= 0).nonzero().max()) + 1  # of the text behind the last image
                seen = causal(keys, keys)
                rows = [last_row(query[:, : n + 1], key, seen[n]).mean(0) for n in range(first, keys)]
                s = torch.stack(rows).sum(0)
                mass = torch.stack([s[self.number == image].sum() for image in range(int(self.number.max()) + 1)])
                chosen, held = [], 0.0
                for image in mass.argsort(descending=True).tolist():
                    if (
                        len(chosen) >= max(1, round(policy.keep_share * len(mass)))
                        and held >= policy.keep_mass * mass.sum()
                    ):
                        break
                    chosen.append(image)
                    held += float(mass[image])
                self.stay = torch.isin(self.number, torch.tensor([-1, *chosen]))
            return causal(keys, keys)[None]
        if layer <= int(self.policy.watershed):
            return torch.ones(1, 1, keys, dtype=torch.bool)
        return torch.cat([self.stay, torch.ones(keys - len(self.stay), dtype=torch.bool)])[None, None]


class TellLongHeads:
    def __init__(self, policy, inputs):
        self.policy, self.visual, self.centres = policy, images_of(inputs), {}
        number = number_of(inputs, None)
        self.tiles = []
        for image in range(int(number.max()) + 1):
            self.tiles += (number == image).nonzero().flatten().split(policy.tile)

    def see(self, layer, step, query, key):
        keys, repeat = key.shape[1], query.shape[0] // key.shape[0]
        if step == 0:
            found = []
            for tile in self.tiles:
                members = key[:, tile]
                share = ((members @ members.mean(1)[..., None])[..., 0] / key.shape[-1] ** 0.5).softmax(-1)
                found.append((share[..., None] * members).sum(1))
            self.centres[layer] = torch.stack(found, 1)  # [kv_heads, tiles, dim]
            return causal(keys, keys)[None]
        scores = torch.einsum("grd,gtd->grt", query[:, -1].view(key.shape[0], repeat, -1), self.centres[layer]).amax(1)
        scores[:, [0, -1]] = float("inf")
        count = min(max(round(self.policy.keep * len(self.tiles)), 2), len(self.tiles))
        seen = torch.cat([~self.visual, torch.ones(keys - len(self.visual), dtype=torch.bool)]).repeat(key.shape[0], 1)
        for head, best in enumerate(scores.topk(count).indices.tolist()):
            for tile in best:
                seen[head, self.tiles[tile]] = True
        return seen[:, None]


TELLERS = {AVL: TellAVL, RecycledAttention: TellRecycled, Rounds: TellRounds, LongHeads: TellLongHeads}


@every_family
@every_policy
def test_equals_the_decoder_run_by_hand(name, family):
    policy, inputs = POLICIES[name], prompt(family, 2)
    expected = Hand(build(family), TELLERS[type(policy)](policy, inputs).see).generate(inputs, NEW)
    out, model = answers(family, policy, inputs)
    near(out[0], expected)
    assert sum(model.vlmattn.report()["fired"].values()) > 0
    assert (generate(build(family), inputs, NEW)[0, 1:] - expected[1:]).abs().max() > 0.05, (
        "the policy does nothing here"
    )


@every_family
@every_policy
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_every_sequence_of_a_padded_batch_gets_what_it_gets_alone(name, family, attn):
    prompts = [prompt(family, 2), prompt(family, 1, seed=3, words=7)]
    batch, _ = answers(family, POLICIES[name], left_padded(prompts), attn)
    for row, single in enumerate(prompts):
        alone, _ = answers(family, POLICIES[name], single, attn)
        near(batch[row], alone[0])


@every_policy
def test_beams(name):
    """A padded batch of beams gives each sequence the beams it gets alone: what a policy keeps follows its beam."""
    inputs = left_padded([prompt("llava", 2), prompt("llava", 1, seed=3, words=7)])
    policy = POLICIES[name]
    options = dict(
        max_new_tokens=NEW,
        num_beams=3,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = vlmattn.wrap(build("llava"), policy).generate(**inputs, **options)
    for row, single in enumerate([prompt("llava", 2), prompt("llava", 1, seed=3, words=7)]):
        alone = vlmattn.wrap(build("llava"), policy).generate(**single, **options)
        assert torch.equal(found.sequences[row, -NEW:], alone.sequences[0, -NEW:])
        near(found.sequences_scores[row], alone.sequences_scores[0])


@every_family
@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_evicted_equals_hidden(name, family, options):
    inputs = left_padded([prompt(family, 2), prompt(family, 1, seed=3, words=7)])
    policy = POLICIES[name]
    dropped, _ = answers(family, policy, inputs, **options)
    hidden, _ = answers(family, type(policy)(**{**policy.options(), "mode": "mask"}), inputs, **options)
    near(dropped, hidden)


@every_policy
def test_reads_agree_with_the_reference(name, monkeypatch):
    inputs = left_padded([prompt("llava", 2), prompt("llava", 1, seed=3, words=7)])
    fast, _ = answers("llava", POLICIES[name], inputs)
    monkeypatch.setenv("VLMATTN_BACKEND", "reference")
    slow, _ = answers("llava", POLICIES[name], inputs)
    near(fast, slow)


def cache_after(policy, inputs, new=1):
    model = vlmattn.wrap(build("llava"), policy)
    return model.generate(
        **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    ).past_key_values


def test_evicted_slots_are_gone():
    inputs = prompt("llava", 2)  # 32 image tokens among 39
    length = inputs["input_ids"].shape[1]
    cache = cache_after(AVL(keep_secondary=0.25, keep_core=0.1), inputs)
    assert [layer.keys.shape[2] for layer in cache.layers] == [length - 32 + 8] * 4
    assert cache.get_seq_length() == length, "the library counts all tokens"
    cache = cache_after(Rounds(watershed="1", keep_mass=0.0), inputs)
    assert [layer.keys.shape[2] for layer in cache.layers] == [length, length, length - 16, length - 16]


def test_text_is_pruned_too():
    inputs = prompt("llava", 1, words=30)
    kept = cache_after(AVL(text_first=4, text_every=4, text_keep=0.5, keep_secondary=0.5), inputs, new=9)
    whole = cache_after(AVL(text_keep=1.0, keep_secondary=0.5), inputs, new=9)
    assert kept.layers[0].keys.shape[2] < whole.layers[0].keys.shape[2] - 12


@every_policy
def test_drafts_are_refused_and_a_second_turn_runs(name):
    model, inputs = vlmattn.wrap(build("llava"), POLICIES[name]), prompt("llava", 2)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    own = re.escape(POLICIES[name].info.name)
    with pytest.raises(UnsupportedError, match=rf"^{own} chooses .* leave prompt_lookup_num_tokens out$"):
        model.generate(**inputs, prompt_lookup_num_tokens=3, **options)
    with pytest.raises(UnsupportedError, match=rf"^{own} chooses .* leave assistant_model out$"):
        model.generate(**inputs, assistant_model=build("llava", seed=1), **options)
    first = model.generate(**inputs, return_dict_in_generate=True, **options)
    more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
    again = model.generate(
        input_ids=more, attention_mask=torch.ones_like(more), past_key_values=first.past_key_values, **options
    )
    assert again.shape[1] == more.shape[1] + 5


@pytest.mark.parametrize("name", EVICTING)
def test_a_second_turn_sees_what_is_left(name):
    """Turn by turn, dropped slots equal hidden ones."""
    policy, found = POLICIES[name], []
    for mode in ("drop", "mask"):
        model = vlmattn.wrap(build("llava"), type(policy)(**{**policy.options(), "mode": mode}))
        inputs = prompt("llava", 2)
        first = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True
        )
        more = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = dict(input_ids=more, attention_mask=torch.ones_like(more), past_key_values=first.past_key_values)
        found.append(generate(model, turn, 4))
    near(*found)


@every_policy
def test_unwrapped_is_as_before_and_threads_do_not_meet(name):
    check_isolation(POLICIES[name], NEW)


def test_beside_fewer_rows():
    """The paper's A-VL filters the prompt first."""
    inputs = left_padded([prompt("llava", 2), prompt("llava", 1, seed=3, words=7)])
    found = []
    for mode in ("drop", "mask"):
        recipe = [FastV(layer=2, keep_ratio=0.5, mode=mode), AVL(text_first=2, text_every=2, mode=mode)]
        found.append(answers("llava", recipe, inputs)[0])
    near(*found)


def test_refusals():
    model = build("llava")
    with pytest.raises(OptionError, match=r"keep_core 0\.6 must not exceed keep_secondary 0\.5"):
        AVL(keep_core=0.6)
    with pytest.raises(OptionError, match=r"'avl' and 'rounds' conflict: both evict in layer 2"):
        vlmattn.wrap(model, [AVL(), Rounds(watershed="1")])
    with pytest.raises(OptionError, match="must name one layer before the last"):
        vlmattn.wrap(model, Rounds(watershed="3"))
    with pytest.raises(OptionError, match="'avl' and 'vcd' conflict"):
        vlmattn.wrap(model, "avl+vcd")
    vlmattn.wrap(model, "avl")
    inputs = prompt("llava")
    with pytest.raises(UnsupportedError, match="avl must know how far a cache is filled"):
        model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(UnsupportedError, match="leave use_cache on"):
        model.generate(**inputs, use_cache=False, max_new_tokens=2)


@pytest.mark.parametrize(
    "name", ["fastv@0.25", "avl@.3", "longheads@0.5", "rounds@.5", "visionzip@.2", "pyramiddrop@.4", "sparsevlm@.4"]
)
def test_budgets_by_name(name):
    recipe = Recipe.of(name)
    assert recipe.name == name
    assert Recipe.from_text(recipe.to_yaml()).methods == recipe.methods


def test_budgets_that_are_none():
    with pytest.raises(OptionError, match="'@2' must name a share"):
        Recipe.of("fastv@2")
    with pytest.raises(OptionError, match="'var' keeps no share of the image tokens"):
        Recipe.of("var@.5")
