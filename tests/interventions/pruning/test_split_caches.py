"""Heads that keep a window in a store of their own, against a decoder run by hand that keeps everything."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hand import Hand, causal, check_isolation, embedded, positions_of
from numerics import TINY_MODEL, bound, near
from tiny import build, generate, left_padded, prompt
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import rotate_half

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError, UnsupportedError
from vlmattn.interventions import AVL, DuoAttention, FastV, HeadProfile, RazorAttention, Rounds
from vlmattn.models import find_family
from vlmattn.request import HeadSplit
from vlmattn.wrapping.cache_layers import SplitLayer

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
        cached = keys - 1 if isinstance(self.policy, DuoAttention) else keys  # whose window does not hold the new token
        near = (places < self.policy.sinks) | (places >= cached - self.policy.window(self.tokens))
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
    near(generate(wrapped(family, policy, attn), inputs, NEW)[0], expected)
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
            near(logits[row], generate(model, single, NEW)[0])


def test_a_window_that_holds_everything_changes_nothing():
    inputs = left_padded([prompt("llava", 2), prompt("llava", 1, seed=3, words=7)])
    out = generate(wrapped("llava", POLICIES["duo_long"]), inputs, NEW)
    near(out, generate(build("llava"), inputs, NEW))


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
    near(*found)
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
    near(*found)


# --- against a decoder in float64 that has no cache: all rows at once, each told what it may see


def told(policy, rows, row, first, prompt_tokens):
    """What a head that keeps a window shows to ``row`` of a block that begins at ``first``: tokens, and those that are a mean."""
    if first == 0:
        return list(range(row + 1)), []
    ends_here = rows == 1 and not isinstance(policy, DuoAttention)
    stop = row + 1 if ends_here else first  # others see the window before them and each other
    window = policy.window(prompt_tokens)
    gone = list(range(policy.sinks, stop - window))
    seen = [token for token in range(row + 1) if token not in gone]
    return seen, gone if policy.compensate else []


def rows_attend(policy, blocks, layer, query, key, value):
    """Head outputs of one sequence, all float64 ``[heads, tokens, dim]``; ``blocks`` are (first, stop) of each forward."""
    out, repeat = torch.empty_like(query), len(query) // len(key)
    for first, stop in blocks:
        for row in range(first, stop):
            for head in range(len(query)):
                keys, values, kv = key[head // repeat], value[head // repeat], head // repeat
                whole = (list(range(row + 1)), [])
                seen, mean = whole if (layer, kv) in FULL else told(policy, stop - first, row, first, blocks[0][1])
                terms = [((query[head, row] @ keys[j]) * query.shape[-1] ** -0.5, values[j]) for j in seen]
                if mean:
                    score = query[head, row] @ keys[mean].mean(0) * query.shape[-1] ** -0.5
                    terms.append((score + torch.tensor(float(len(mean))).double().log(), values[mean].mean(0)))
                weights = torch.stack([score for score, _ in terms]).softmax(0)
                out[head, row] = sum(w * v for w, (_, v) in zip(weights, terms, strict=True))
    return out


@torch.no_grad()
def recomputed(family, policy, inputs, tokens, further=()):
    """Float64 logits of every row of a prompt and ``tokens`` after it; ``further`` are (first, stop) of later prompts."""
    model = build(family).double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    length, total = inputs["input_ids"].shape[1], inputs["input_ids"].shape[1] + len(tokens)
    positions = positions_of(model, inputs)
    later = positions.amax() + 1 + torch.arange(len(tokens))
    positions = torch.cat([positions, later.expand(*positions.shape[:-1], -1)], -1)
    hidden = torch.cat([embedded(model, inputs), model.get_input_embeddings()(tokens)[None]], 1)
    blocks, at = [(0, length)], length
    while at < total:
        blocks.append(next((block for block in further if block[0] == at), (at, at + 1)))
        at = blocks[-1][1]
    decoder = model.model.language_model
    cos, sin = decoder.rotary_emb(hidden, positions)
    for number, layer in enumerate(decoder.layers):
        normed, attn = layer.input_layernorm(hidden), layer.self_attn
        query, key, value = (
            part(normed).view(total, -1, attn.head_dim).transpose(0, 1)
            for part in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        query, key = (part * cos + rotate_half(part) * sin for part in (query, key))
        out = rows_attend(policy, blocks, number, query, key, value)
        hidden = hidden + attn.o_proj(out.transpose(0, 1).flatten(1)[None])
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))[0]


OPTIONS = dict(do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)


def forced(new, **more):
    return dict(max_new_tokens=new, min_new_tokens=new, **OPTIONS, **more)


SINKS = {"llava": 28, "qwen2_5_vl": 18}  # two more than the shorter prompt has tokens
every_kind = pytest.mark.parametrize("name", ["duo", "razor", "razor_share", "late_sinks"])


def policy_of(name, family):
    return (
        POLICIES[name] if name in POLICIES else RazorAttention(heads=HEADS, sinks=SINKS[family], recent=2, fraction=99)
    )


@every_family
@every_kind
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_padded_batch_equals_one_recomputed_in_float64(name, family, attn):
    policy, prompts = policy_of(name, family), [prompt(family, 2), prompt(family, 1, seed=3, words=7)]
    out = wrapped(family, policy, attn).generate(**left_padded(prompts), **forced(NEW))
    bare = build(family, attn).generate(**left_padded(prompts), **forced(NEW))
    differs = 0.0
    for row, inputs in enumerate(prompts):
        length, tokens = inputs["input_ids"].shape[1], out.sequences[row, -NEW:-1]
        found = torch.stack(out.logits, 1)[row]
        expected = recomputed(family, policy, inputs, tokens)[length - 1 :].float()
        near(found, expected)
        differs = max(differs, (torch.stack(bare.logits, 1)[row, 1:] - found[1:]).abs().max().item())
    assert differs > 0.02


@every_family
@pytest.mark.parametrize("name", ["duo", "razor"])
def test_beams_are_worth_what_is_recomputed(name, family):
    policy, prompts = POLICIES[name], [prompt(family, 2), prompt(family, 1, seed=3, words=7)]
    out = wrapped(family, policy).generate(
        **left_padded(prompts), **forced(NEW, num_beams=3, length_penalty=0.0, output_scores=True)
    )
    assert out.beam_indices.diff(dim=1).abs().amax() > 0, "beams change rows"
    for row, inputs in enumerate(prompts):
        length, tokens = inputs["input_ids"].shape[1], out.sequences[row, -NEW:]
        paid = recomputed(family, policy, inputs, tokens[:-1])[length - 1 :].log_softmax(-1)
        off = abs(paid.gather(1, tokens[:, None]).sum() - out.sequences_scores[row])
        assert off < NEW * bound(torch.float32, TINY_MODEL, scale=0.5)  # each logit by its rounding


@every_family
@every_kind
@pytest.mark.parametrize("rows", [[0], [1], [0, 1]], ids=["one", "other", "padded"])
def test_a_second_turn_equals_one_recomputed(name, family, rows):
    """Alone, and of sequences that are padded in both turns."""
    prompts = [[prompt(family, 2), prompt(family, 1, seed=3, words=7)][row] for row in rows]
    later = [[[7, 8, 9, 10, 11], [12, 13]][row] for row in rows]
    policy, batch, wide = policy_of(name, family), left_padded(prompts), max(map(len, later))
    model = wrapped(family, policy)
    first = model.generate(**batch, **forced(4))
    ids = torch.cat([first.sequences, torch.tensor([[0] * (wide - len(t)) + t for t in later])], 1)
    mask = torch.cat([batch["attention_mask"], ids.new_ones(len(rows), 4), (ids[:, -wide:] != 0).long()], 1)
    second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **forced(NEW))
    for row, (inputs, more) in enumerate(zip(prompts, later, strict=True)):
        length = inputs["input_ids"].shape[1]
        tokens = torch.cat([first.sequences[row, -4:], torch.tensor(more), second.sequences[row, -NEW:-1]])
        turn = (length + 3, length + 4 + len(more))  # the last token of an answer is read with the next prompt
        expected = recomputed(family, policy, inputs, tokens, [turn])[turn[1] - 1 :]
        near(torch.stack(second.logits, 1)[row], expected.float())


def test_what_a_further_turn_cannot_ask_for():
    model, prompts = wrapped("llava", POLICIES["razor"]), [prompt("llava", 2), prompt("llava", 1, seed=3, words=7)]
    batch = left_padded(prompts)
    first = model.generate(**batch, **forced(4))
    ids = torch.cat([first.sequences, torch.tensor([[7, 8], [7, 8]])], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    mask[1, -4:-2] = 0  # as if this sequence had ended before
    with pytest.raises(StateError, match=r"hides tokens of the turns before.*one by one"):
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **forced(2))


# --- the layer itself


def words(batch, tokens, first):
    """Keys whose last entry is the number of the token, ``[batch, 3, tokens, 2]``, and values that are twice that."""
    numbers = torch.arange(first, first + tokens).expand(batch, 3, -1)
    keys = torch.stack([torch.full_like(numbers, 1), numbers], -1).double()
    return keys, 2 * keys


def check(layer, split, sequences):
    """``sequences``: numbers of the real tokens of each row."""
    for row, tokens in enumerate(sequences):
        held = layer.near[0][row, 0, :, 1][layer.valid[row]].tolist()
        kept = [n for i, n in enumerate(tokens) if i < split.sinks or i >= len(tokens) - int(layer.window[row])]
        assert held == kept
        assert torch.equal(layer.near[1], 2 * layer.near[0])
        gone = [n for n in tokens if n not in kept]
        if split.compensate:
            assert int(layer.count[row]) == len(gone)
            assert layer.sums[0][row, 0, 1].item() == sum(gone)
            assert layer.sums[1].dtype == torch.float64


@pytest.mark.parametrize("seed", range(8))
def test_a_store_holds_what_it_should_whatever_comes(seed):
    """Padding anywhere in all prompts, sequences shorter than the sinks, windows of several lengths, rows that move."""
    rng = random.Random(seed)
    length, batch = rng.randint(3, 12), 3
    real = torch.ones(batch, length, dtype=torch.bool)
    for row in range(1, batch):
        real[row, rng.sample(range(length), rng.randint(0, length - 1))] = False
    rows = [torch.arange(length)[real[row]].tolist() for row in range(batch)]
    split = HeadSplit(
        (1,), rng.randint(0, 6), tuple(rng.randint(1, 5) for _ in range(batch)), tuple(map(len, rows)), seed % 2 == 0,
        late=seed % 4 > 1,
    )  # fmt: skip
    stock = DynamicLayer()
    stock.update(*words(batch, length, 0))
    layer = SplitLayer(stock, real, split)
    check(layer, split, rows)
    for _ in range(12):
        kind = rng.choice(["token", "token", "token", "turn", "beams", "copy", "twice"])
        count, first = len(rows), layer.get_seq_length()
        if kind == "token":
            layer.update(*words(count, 1, first))
            rows = [[*row, first] for row in rows]
        elif kind == "turn":
            new = rng.randint(2, 7)
            fresh = torch.ones(count, new, dtype=torch.bool)
            for row in range(count):
                fresh[row, : rng.randint(0, new - 1)] = False
            known = [torch.isin(torch.arange(first), torch.tensor(row)) for row in rows]
            layer.expect(torch.cat([torch.stack(known), fresh], 1))
            keys, _ = layer.update(*words(count, new, first))
            assert keys.near.shape[2] >= new
            rows = [row + (first + fresh[i].nonzero()[:, 0]).tolist() for i, row in enumerate(rows)]
        elif kind == "beams":
            order = [rng.randrange(count) for _ in range(count)]
            layer.reorder_cache(torch.tensor(order))
            rows = [rows[i] for i in order]
        elif kind == "twice" and count < 12:
            layer.batch_repeat_interleave(2)
            rows = [row for row in rows for _ in range(2)]
        else:
            layer = copy.deepcopy(layer)
        check(layer, split, rows)
        assert layer.keys[0, 0, :, 1].tolist() == list(range(layer.get_seq_length()))
        assert layer.get_mask_sizes(1) == (layer.get_seq_length() + 1, 0)


def held_by(layer):
    """Bytes of all storages that a layer keeps alive, of keys, values and sums of them."""
    found = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    found += [item for value in vars(layer).values() if isinstance(value, list) for item in value]
    stores = {tensor.untyped_storage().data_ptr(): tensor for tensor in found if tensor.ndim > 2}
    return sum(tensor.untyped_storage().nbytes() for tensor in stores.values())


@pytest.mark.parametrize(("sinks", "recent"), [(2, 5), (20, 5), (64, 256), (1, 1)])
@pytest.mark.parametrize("policy", [DuoAttention, RazorAttention])
def test_bytes_are_as_computed(policy, sinks, recent):
    """To the byte, also of storages, and never more than all heads would keep."""
    inputs, new, size = prompt("llava", 2), 9, 2 * 8 * 4  # keys and values, 8 dims, 4 bytes
    options = {} if policy is DuoAttention else {"fraction": 1000}
    method = policy(heads=HEADS, sinks=sinks, recent=recent, **options)
    cache = cache_of(method, inputs, new).past_key_values
    length = inputs["input_ids"].shape[1] + new - 1
    near = min(length, sinks + recent)
    for number, layer in enumerate(cache.layers):
        full = sum(place[0] == number for place in FULL)
        expected = size * (full * length + (2 - full) * (near + policy.compensate))
        assert held_by(layer) == layer.nbytes == expected
        assert layer.nbytes <= size * 2 * (length + policy.compensate)


def test_layers_are_freed_one_after_another():
    model, kinds = wrapped("llava", POLICIES["duo"]), []

    def note(module, args, kwargs):
        kinds.append([type(layer).__name__ for layer in kwargs["past_key_values"].layers])

    model.model.language_model.layers[3].register_forward_pre_hook(note, with_kwargs=True)
    model.generate(**prompt("llava", 2), **forced(1))
    assert kinds[0][:3] == ["SplitLayer"] * 3
    assert "SplitLayer" not in kinds[0][3:]


def test_a_cache_that_was_reset_is_as_new():
    model, inputs, cache = wrapped("llava", POLICIES["razor"]), prompt("llava", 2), DynamicCache()
    expected = model.generate(**inputs, **forced(4))
    model.generate(**prompt("llava", 1, seed=3), past_key_values=cache, **forced(4))
    cache.reset()
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 4
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **forced(4)).sequences, expected.sequences)
    cache.reset()
    vlmattn.unwrap(model)
    bare = model.generate(**inputs, **forced(4))
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **forced(4)).sequences, bare.sequences)


@pytest.mark.parametrize("images", [False, True])
def test_a_second_turn_beside_dropped_rows(images):
    """Drop equals mask; what needs attention to tokens that are gone is refused."""
    found, later = [], prompt("llava", 1, seed=5)
    for mode in ("drop", "mask"):
        model = wrapped("llava", [FastV(layer=2, mode=mode), POLICIES["razor"]])
        batch = left_padded([prompt("llava", 2), prompt("llava", 1, seed=3, words=7)])
        first = model.generate(**batch, **forced(4))
        more = later["input_ids"].expand(2, -1) if images else torch.tensor([[0, 7, 8], [7, 8, 9]])
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.long), (more != 0).long()], 1)
        turn = dict(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **forced(5))
        if images:
            with pytest.raises(UnsupportedError, match="must measure attention to all tokens in layer 1"):
                model.generate(**turn, pixel_values=later["pixel_values"].repeat(2, 1, 1, 1))
            return
        found.append(torch.stack(model.generate(**turn).logits, 1))
    near(*found)


def test_methods_that_look_at_a_layer_before():
    """A policy of the layers above measures in one whose heads are apart by the second turn."""
    model = wrapped("llava", [RazorAttention(heads="0.0,1.0", layers="0:2", recent=3, sinks=2), Rounds(watershed="1")])
    first = model.generate(**prompt("llava", 2), **forced(4))
    ids = torch.cat([first.sequences, torch.tensor([[7, 8]])], 1)
    with pytest.raises(UnsupportedError, match="must measure attention to all tokens in layer 1"):
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **forced(2)
        )


@pytest.mark.parametrize("method", [POLICIES["razor"], AVL()], ids=["razor", "avl"])
def test_caches_and_rules_that_do_not_fit(method):
    name, model = method.info.name, build("llava")
    for rule in ("deco", "dola_low", "vcd", "opera"):
        with pytest.raises(OptionError, match=f"'{name}' and '.*' conflict: the decoding rule needs whole caches"):
            vlmattn.wrap(model, vlmattn.Recipe.of([method, vlmattn.Recipe.of(rule).decoding]))
    vlmattn.wrap(model, method)
    cache = DynamicCache()
    cache.offloading = True
    with pytest.raises(UnsupportedError, match="a quantized or an offloaded one keeps elsewhere"):
        model.generate(**prompt("llava"), past_key_values=cache, max_new_tokens=2)


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


def test_gates_as_released(tmp_path):
    """The heads whose gate is at least the quantile keep everything."""
    gates, file = torch.rand(4, 2, generator=torch.Generator().manual_seed(3)) * 1.2 - 0.1, tmp_path / "gates.tsv"
    file.write_text("".join("\t".join(map(repr, row)) + "\n" for row in gates.tolist()))
    sizes = find_family(build("llava")).anatomy(build("llava"))
    bound = DuoAttention(gates=str(file), share=0.25).bind(sizes)
    best = gates.clamp(0, 1).flatten().sort(descending=True).indices[:2].sort().values.tolist()
    assert bound.heads == ",".join(f"{place // 2}.{place % 2}" for place in best)
    model, inputs = wrapped("llava", DuoAttention(gates=str(file), share=0.25, sinks=2, recent=5)), prompt("llava", 2)
    named = wrapped("llava", DuoAttention(heads=bound.heads, sinks=2, recent=5))
    assert torch.equal(generate(model, inputs, NEW), generate(named, inputs, NEW))


@pytest.mark.parametrize(
    ("text", "words"), [("0.5\tx\n", "not a table of gates"), ("1\t1\n", "gates of 1 layers of 2 KV")]
)
def test_tables_that_are_no_gates_of_this_model(tmp_path, text, words):
    file = tmp_path / "gates.tsv"
    file.write_text(text)
    with pytest.raises(InputError, match=words):
        vlmattn.wrap(build("llava"), DuoAttention(gates=str(file)))


def test_razor_takes_the_union_of_induction_and_echo(tmp_path):
    sizes = find_family(build("llava")).anatomy(build("llava"))  # 4 layers, 4 heads, 2 KV heads
    flat = [[0.0] * 4 for _ in range(4)]
    induction, echo = [row[:] for row in flat], [row[:] for row in flat]
    induction[1][3] = induction[2][0] = 1.0
    echo[3][2] = 1.0
    scores = {"retrieval": flat, "induction": induction, "echo": echo}
    profile = HeadProfile(fingerprint=sizes.fingerprint, scores={k: tuple(map(tuple, v)) for k, v in scores.items()})
    path = str(profile.save(tmp_path))
    assert RazorAttention(profile=path, share=0.27).bind(sizes).heads == "1.1,2.0,3.1"
    assert RazorAttention(profile=path, share=0.13, score="echo").bind(sizes).heads == "3.1"
