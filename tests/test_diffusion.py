"""Fewer image tokens while denoising: against rows that are frozen and hidden, and slots that are hidden."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from numerics import near
from torch import nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaModel

from vlmattn.diffusion import (
    Constant,
    LateStep,
    LayerSkip,
    Least,
    Look,
    Progressive,
    answer_attention,
    evicted,
    thinned,
)
from vlmattn.errors import InputError, OptionError, StateError, UnsupportedError

STEPS, LAYERS, WIDTH, HEADS = 4, 3, 24, 3
SCHEDULES = {
    "constant": Constant(0.5, layer=1),
    "progressive": Progressive(1.0, 0.25),
    "late": LateStep(0.5, 0.25),
    "late_none": LateStep(0.5, 0.0),
    "skip": LayerSkip((1,)),
    "skip_most": LayerSkip("0,2", share=0.5),
    "late_skip": Least((LateStep(0.5, 0.25), LayerSkip((0,), share=0.5))),
}


# Schedules

shares = st.floats(0, 1)


@given(shares, shares, st.integers(1, 50), st.integers(1, 40), st.data())
def test_schedules_stay_within_their_bounds(a, b, steps, layers, data):
    skipped = data.draw(st.sets(st.integers(0, layers - 1), min_size=1))
    kinds = (Constant(a), Progressive(a, b), LateStep(a, b), LayerSkip(tuple(skipped), b))
    for schedule in (*kinds, Least(kinds)):
        hash(schedule)
        for layer in range(layers):
            row = [schedule.keep(step, steps, layer, layers) for step in range(steps)]
            assert all(0 <= share <= 1 for share in row)
            assert row in (sorted(row), sorted(row, reverse=True)), "monotone in the steps"


@given(shares, shares, st.integers(2, 50), st.integers(1, 40))
def test_what_schedules_say(a, b, steps, layers):
    progressive = [Progressive(a, b).keep(step, steps, 0, layers) for step in range(steps)]
    assert progressive[0] == a
    assert progressive[-1] == pytest.approx(b, abs=1e-15)
    if steps == 3:
        assert progressive[1] == pytest.approx((a + b) / 2)
    late = [LateStep(a, b).keep(step, steps, 0, layers) for step in range(steps)]
    first = late.index(b) if b in late else steps
    assert b == 1 or first == min(max(math.ceil(a * steps - 1e-9), 0), steps)
    skip = LayerSkip("1/2:", b)
    assert [skip.keep(0, steps, layer, layers) for layer in range(layers)] == [
        b if layer >= layers // 2 else 1.0 for layer in range(layers)
    ]
    assert Least((Constant(a), Constant(b))).keep(0, steps, 0, layers) == min(a, b)


def test_late_step_counts_exactly():
    assert [LateStep(0.07, 0).keep(step, 100, 0, 1) for step in (6, 7)] == [1.0, 0], ".07 * 100 is 7.000000000000001"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Constant(1.5),
        lambda: Progressive(0.5, -1),
        lambda: LateStep(2),
        lambda: LayerSkip((1,), share=3),
        lambda: Constant(True),
        lambda: Constant(math.nan),
    ],
)
def test_shares_are_checked(wrong):
    with pytest.raises(OptionError, match=r"must be a share within 0\.\.1"):
        wrong()


def test_layers_are_checked():
    with pytest.raises(OptionError, match="layer 3, but the decoder has layers 0"):
        LayerSkip((3,)).keep(0, 1, 0, 3)
    with pytest.raises(OptionError, match=r"Constant\.layer must be one of the layers 0"):
        Constant(0.5, layer=3).keep(0, 1, 0, 3)
    with pytest.raises(OptionError, match=r"LayerSkip\.layers must look like"):
        LayerSkip("first")
    with pytest.raises(OptionError, match="at least one schedule"):
        Least(())


# A toy denoiser


class Attention(nn.Module):
    head_dim, num_heads = WIDTH // HEADS, HEADS

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def parts(self, hidden, tables):
        query, key, value = (
            part(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        return *(apply_rotary_pos_emb(part, *tables) for part in (query, key)), value

    def forward(self, hidden, mask, tables):
        return self.o_proj(scaled_dot_product_attention(*self.parts(hidden, tables), mask).transpose(1, 2).flatten(2))


def apply_rotary_pos_emb(states, cos, sin):  # found by this name
    one, other = states.chunk(2, -1)
    return states * cos[:, None] + torch.cat([-other, one], -1) * sin[:, None]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.self_attn = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **others):
        normed = self.input_layernorm(hidden_states)
        hidden = hidden_states + self.self_attn(normed, attention_mask, position_embeddings)
        return hidden + self.mlp(hidden)


class Toy(nn.Module):
    """Text, image and masked answer tokens see each other in every step; each step unmasks the surest answer token."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(20, WIDTH), nn.ModuleList(Layer() for _ in range(LAYERS))

    @torch.no_grad()
    def denoise(self, ids, real, hide=None, steps=STEPS, **inputs):
        """Logits of every step; ``hide(step, layer, hidden, tables)``: rows that are frozen and hidden, bool ``[batch, rows]``."""
        found, ids = [], ids.clone()
        position = (real.cumsum(1) - 1).clamp_min(0)
        angle = (position[..., None] * 0.3 ** torch.arange(WIDTH // HEADS // 2)).repeat(1, 1, 2)
        tables = angle.cos(), angle.sin()
        mask = None if bool(real.all()) else real[:, None, None]
        for step in range(steps):
            hidden = self.embed(ids)
            for number, layer in enumerate(self.layers):
                gone = None if hide is None else hide(step, number, hidden, tables)
                seen = mask if gone is None else real[:, None, None] & ~gone[:, None, None]
                new = layer(hidden, attention_mask=seen, position_embeddings=tables, **inputs)
                hidden = new if gone is None else torch.where(gone[..., None], hidden, new)
            logits = layer_norm(hidden, (WIDTH,)) @ self.embed.weight.T
            found.append(logits)
            surest = logits.amax(-1).masked_fill((ids != MASK) | ~real, float("-inf")).argmax(1)
            ids[torch.arange(len(ids)), surest] = logits[torch.arange(len(ids)), surest, 1:].argmax(-1) + 1
        return torch.stack(found)


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    model = Toy().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.4)
    return model


MASK = 0
SHORT = [6, 7, *range(9, 13), 8, 5]  # four image tokens
IDS = {
    "one": torch.tensor([[5, 6, 7, *range(9, 17), 8, *[MASK] * 5]]),
    "padded": torch.tensor([[5, 6, 7, *range(9, 17), 8, *[MASK] * 5], [*[1] * 4, *SHORT, *[MASK] * 5]]),
    "uneven": torch.tensor([[5, 6, 7, *range(9, 17), 8, *[MASK] * 5], [5, 5, 6, 6, *SHORT, *[MASK] * 5]]),
}
batches = pytest.mark.parametrize("batch", IDS)


def given_batch(name):
    """Ids, which of them are image tokens, and which are no padding."""
    ids = IDS[name]
    real = ids != 1
    return ids, (ids >= 9) & real, real


def told(schedule, toy, visual, real, select=0, persist=True):
    """Rows that are gone, told again: row by row, with full attention matrices."""
    scores = {}

    def hide(step, number, hidden, tables):
        if number == select and (step == 0 or not persist):
            layer = toy.layers[select]
            query, key, _ = layer.self_attn.parts(layer.input_layernorm(hidden), tables)
            logits = (query @ key.transpose(2, 3)) * (WIDTH // HEADS) ** -0.5
            share = logits.masked_fill(~real[:, None, None], float("-inf")).softmax(-1).mean(1)
            for row in range(len(visual)):
                scores[row] = share[row, ~visual[row] & real[row]].mean(0)
        gone = torch.zeros_like(visual)
        for row in range(len(visual)):
            place = visual[row].nonzero().flatten()
            count = round(schedule.keep(step, STEPS, number, LAYERS) * len(place))
            if not scores and count:
                continue
            values = scores[row][place] if scores else torch.zeros(len(place))
            gone[row, place[values.argsort(descending=True, stable=True)[count:]]] = True
        return gone if bool(gone.any()) else None

    return hide


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("select", "persist"), [(0, True), (1, True), (1, False)])
@batches
def test_equals_rows_that_are_hidden_and_frozen(toy, name, select, persist, batch):
    schedule, (ids, visual, real) = SCHEDULES[name], given_batch(batch)
    with thinned(toy.layers, visual, schedule, STEPS, real=real, select=select, persist=persist):
        out = toy.denoise(ids, real)
    expected = toy.denoise(ids, real, told(schedule, toy, visual, real, select, persist))
    near(out[:, real], expected[:, real])
    assert (toy.denoise(ids, real)[:, real] - out[:, real]).abs().max() > 0.05


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("batch", ["padded", "uneven"])
def test_a_batch_is_what_its_sequences_are_alone(toy, name, batch):
    ids, visual, real = given_batch(batch)
    with thinned(toy.layers, visual, SCHEDULES[name], STEPS, real=real):
        out = toy.denoise(ids, real)
    for row in range(2):
        there = real[row]
        with thinned(toy.layers, visual[row, there][None], SCHEDULES[name], STEPS):
            alone = toy.denoise(ids[row, there][None], real[row, there][None])
        near(out[:, row, there], alone[:, 0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_layers_compute_as_many_rows_as_the_schedule_says(toy, name):
    (ids, visual, real), seen = given_batch("one"), []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        for layer in toy.layers
    ]
    with thinned(toy.layers, visual, SCHEDULES[name], STEPS) as found:
        toy.denoise(ids, real)
    for hook in hooks:
        hook.remove()
    text = ids.shape[1] - 8
    expected = [
        [text + round(SCHEDULES[name].keep(step, STEPS, layer, LAYERS) * 8) for layer in range(LAYERS)]
        for step in range(STEPS)
    ]
    assert found.rows == expected
    assert seen == [count for row in expected for count in row]


def test_ties_go_to_the_first(toy):
    ids, visual, real = given_batch("one")
    kept = []
    with thinned(toy.layers, visual, Constant(0.25), 1, score=lambda layer, look: torch.zeros(look.hidden.shape[:2])):
        hook = toy.layers[0].register_forward_pre_hook(lambda module, args: kept.append(args[0]))  # the last to look
        toy.denoise(ids, real, steps=1)
    hook.remove()
    places = visual[0].nonzero().flatten()
    expected = [place for place in range(ids.shape[1]) if not visual[0, place] or place in places[:2]]
    assert torch.equal(kept[-1], toy.embed(ids[:, expected]))


@batches
def test_nothing_dropped_is_nothing_changed_and_hooks_go(toy, batch):
    ids, visual, real = given_batch(batch)
    bare = toy.denoise(ids, real)
    for schedule in (LayerSkip((1,), share=1.0), Constant(1.0), LateStep(1.0, 0.0)):
        with thinned(toy.layers, visual, schedule, STEPS, real=real):
            assert torch.equal(toy.denoise(ids, real), bare)
    with pytest.raises(ZeroDivisionError), thinned(toy.layers, visual, Constant(0.1), STEPS, real=real):
        raise ZeroDivisionError
    with pytest.raises(AttributeError), thinned([*toy.layers, None], visual, Constant(0.1), STEPS, real=real):
        pass
    assert torch.equal(toy.denoise(ids, real), bare)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in toy.modules())


def test_a_forward_that_fails_leaves_nothing_behind(toy):
    ids, visual, real = given_batch("one")
    bare = toy.denoise(ids, real, steps=1)

    def fail(module, args):
        raise ZeroDivisionError

    with thinned(toy.layers, visual, Progressive(0.25, 1.0), 2):
        hook = toy.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            toy.denoise(ids, real, steps=1)
        hook.remove()
        assert torch.equal(toy.denoise(ids, real, steps=1), bare), "the second step has all rows"


def test_refusals(toy):
    ids, visual, real = given_batch("padded")
    with thinned(toy.layers, visual, Constant(0.5), STEPS, real=real):
        with pytest.raises(InputError, match="classifier-free guidance"):
            toy.denoise(ids.repeat(2, 1), real.repeat(2, 1))
        toy.denoise(ids, real)
        with pytest.raises(StateError, match="forward 5 of a denoiser of 4 steps"):
            toy.denoise(ids, real)
    for inputs, error in (
        ({"use_cache": True}, "use_cache=False"),
        ({"past_key_values": DynamicCache()}, "use_cache=False"),
        ({"table": torch.zeros(2, ids.shape[1])}, "get table, of which nobody knows the rows"),
        ({}, "without_positions=True"),
        ({"position_ids": torch.zeros(3, 2, ids.shape[1])}, "several positions for a row"),
        ({"position_embeddings": (torch.zeros(2, 1, ids.shape[1]),) * 2}, "several positions for a row"),
    ):
        with thinned(toy.layers, visual, Constant(0.5), 1, real=real), pytest.raises(UnsupportedError, match=error):
            toy.layers[0](torch.zeros(2, ids.shape[1], WIDTH), **inputs)
    for options, error in (
        ({"select": 3}, "select must be one of the layers 0..2"),
        ({"steps": 0}, "steps must count"),
        ({"schedule": LayerSkip((7,))}, "layer 7"),
        ({"schedule": type("Bad", (), {"keep": lambda *args: 2.0})()}, "says 2.0 for step 0 and layer 0"),
    ):
        with (
            pytest.raises(OptionError, match=error),
            thinned(toy.layers, visual, **{"schedule": Constant(), "steps": 1, **options}),
        ):
            pass
    with (
        thinned(toy.layers, visual, Constant(0.5), 1, real=real, score=lambda layer, look: look.hidden),
        pytest.raises(OptionError, match="score must be"),
    ):
        toy.denoise(ids, real)
    plain = nn.Identity()
    with (
        thinned([plain], visual, Constant(0.5), 1, without_positions=True),
        pytest.raises(UnsupportedError, match="give score="),
    ):
        plain(torch.zeros(2, ids.shape[1], 4))
    with pytest.raises(UnsupportedError, match="in the stack twice"), thinned([plain, plain], visual, Constant(), 1):
        pass


# Layers of the library, made bidirectional by their mask


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )  # fmt: skip
    model = LlamaModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.4)
    return model


def read(llama, ids, real, attn, **options):
    """One bidirectional forward."""
    llama.set_attn_implementation(attn)
    seen = real[:, None, None].expand(-1, 1, ids.shape[1], -1)
    if attn == "eager":
        seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return llama(
            inputs_embeds=llama.embed_tokens(ids), attention_mask=seen, position_ids=(real.cumsum(1) - 1).clamp_min(0),
            use_cache=False, **options,
        )  # fmt: skip


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@batches
def test_layers_of_the_library(llama, attn, batch):
    ids, visual, real = given_batch(batch)
    attention = read(llama, ids, real, "eager", output_attentions=True).attentions[1].mean(1)
    with thinned(llama.layers, visual, Constant(0.5, layer=1), 1, real=real, select=1) as found:
        out = read(llama, ids, real, attn).last_hidden_state
    asked = (~visual & real).float()
    torch.testing.assert_close(
        found.scores[real], ((attention * asked[..., None]).sum(1) / asked.sum(1, keepdim=True))[real]
    )
    stay = real & ~visual
    for row in range(len(ids)):
        place = visual[row].nonzero().flatten()
        order = found.scores[row, place].argsort(descending=True)
        stay[row, place[order[: len(place) // 2]]] = True
    hidden = read_by_hand(llama, ids, real, stay)
    near(out[stay], hidden[stay])


def read_by_hand(llama, ids, real, stay):
    """The first layer sees all real rows, later ones those that ``stay``."""
    llama.set_attn_implementation("sdpa")
    with torch.no_grad():
        hidden = llama.embed_tokens(ids)
        tables = llama.rotary_emb(hidden, (real.cumsum(1) - 1).clamp_min(0))
        for number, layer in enumerate(llama.layers):
            seen = stay if number else real
            hidden = layer(hidden, attention_mask=seen[:, None, None], position_embeddings=tables)
        return llama.norm(hidden)


def test_scores_take_a_few_rows_only(llama):
    ids, _, real = given_batch("one")
    answer = torch.zeros_like(real)
    answer[:, -3:] = True
    attention = read(llama, ids, real, "eager", output_attentions=True).attentions[0].mean(1)
    sizes = []
    hook = llama.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[1]))
    hidden = llama.embed_tokens(ids)
    tables = llama.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    look = Look(hidden, answer, real, {"position_embeddings": tables})
    with torch.no_grad():
        scores = answer_attention(llama.layers[0], look)
    hook.remove()
    assert sizes == [3]
    torch.testing.assert_close(scores, attention[:, -3:].mean(1))


# DiffusionGemma

FULL = (0, 3)
PROMPTS = torch.tensor([[2, 5, 6, 97, *[99] * 8, 96, 7, 8, 9], [0] * 6 + [2, 97, 99, 99, 99, 99, 96, 7, 8, 9]])


@pytest.fixture(scope="module")
def gemma():
    if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
        pytest.skip("this transformers has no DiffusionGemma")
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    text = transformers.DiffusionGemmaTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, global_head_dim=16, num_global_key_value_heads=1, sliding_window=12, layer_types=kinds, num_experts=4,
        top_k_experts=2, moe_intermediate_size=16, max_position_embeddings=512, use_bidirectional_attention="vision",
    )  # fmt: skip
    vision = transformers.Gemma4VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, head_dim=8, patch_size=4
    )  # fmt: skip
    config = transformers.DiffusionGemmaConfig(
        text_config=text, vision_config=vision, image_token_id=99, boi_token_id=97, eoi_token_id=96, canvas_length=6
    )
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
    model.set_attn_implementation("sdpa")
    return model


def hooks(model):
    """How many there are; the library leaves some of its own."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def write(model, ids, replay=None, **options):
    """Two canvases of four denoising steps each: all logits, and the answer. Image tokens stand for themselves.

    ``replay``: logits that the sampler gets instead, so that steps can be compared one by one.
    """
    found = []

    def hook(module, args, logits):
        found.append(logits)
        return None if replay is None else replay[len(found) - 1]

    handle = model.lm_head.register_forward_hook(hook)
    torch.manual_seed(0)
    try:
        out = model.generate(
            input_ids=ids, attention_mask=(ids != 0).long(), mm_token_type_ids=(ids == 99).int(), max_new_tokens=12,
            max_denoising_steps=4, **options,
        )  # fmt: skip
    finally:
        handle.remove()
    return torch.stack(found), out


SHARES = {
    "quarter": (0.25, {}),
    "none": (0.0, {}),
    "progressive": (Progressive(0.75, 0.25), {"steps": 4}),
    "late": (LateStep(0.5, 0.25), {"steps": 4}),
    "skip": (LayerSkip((3,)), {"steps": 4}),
}


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize(
    ("attn", "rows"), [("sdpa", 1), ("sdpa", 2), ("eager", 1)]
)  # eager with padding fails in the library
def test_evicted_equals_hidden(gemma, attn, rows, name):
    (share, options), ids = SHARES[name], PROMPTS[:rows]
    gemma.set_attn_implementation(attn)
    with evicted(gemma, share, mode="mask", **options) as whole:
        hidden, again = write(gemma, ids)
    with evicted(gemma, share, **options) as found:
        dropped, out = write(gemma, ids, replay=hidden)
    bare, _ = write(gemma, ids, replay=hidden)
    gemma.set_attn_implementation("sdpa")
    near(dropped, hidden)
    assert torch.equal(out.sequences, again.sequences)
    assert (bare - dropped).abs().max() > 0.05
    assert set(whole.slots[0]) == {16}
    layers = out.past_key_values.layers  # the first canvas came behind
    assert [layer.keys.shape[-2] for layer in layers] == [found.slots[0][0] + 6, 11, 11, found.slots[0][1] + 6]
    assert out.past_key_values.get_seq_length() == 16 + 6, "positions count all tokens"


@pytest.mark.parametrize("name", SHARES)
def test_slots_held_and_read_are_those_of_the_schedule(gemma, name):
    share, options = SHARES[name]
    with evicted(gemma, share, **options) as found:
        write(gemma, PROMPTS[:1])
    schedule = Constant(share) if isinstance(share, float) else share
    kept = [[round(schedule.keep(step, 4, layer, 4) * 8) for layer in FULL] for step in range(4)]
    held = [max(counts) for counts in zip(*kept, strict=True)]
    assert found.slots == [[8 + count for count in held]], "8 text tokens"
    assert found.read == [[8 + canvas * 6 + count for count in counts] for canvas in range(2) for counts in kept]
    token = 2 * 1 * 16 * 4  # bytes of a slot: keys and values, one head of 16
    assert found.bytes == [(2 * 16 * token, sum(8 + count for count in held) * token)]


def hidden_by_hand(model, ids, gone):
    """One denoising step after the prompt, with slots ``gone[layer]`` of full layers hidden from the canvas by its mask."""
    cache = DynamicCache(config=model.config.get_text_config())
    model.model.encoder(input_ids=ids, past_key_values=cache, attention_mask=prompt_masks(model, ids))
    seen = {index: torch.ones(1, 1, 1, 16 + 6, dtype=torch.bool) for index in gone}
    for index, slots in gone.items():
        seen[index][..., slots] = False
    hooks = [
        model.model.decoder.layers[index].register_forward_pre_hook(
            lambda m, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
        )
        for index, mask in seen.items()
    ]
    out = model(past_key_values=cache, decoder_input_ids=CANVAS).logits
    for hook in hooks:
        hook.remove()
    return out


def prompt_masks(model, ids):
    return model.model.encoder.create_masks_for_generate(
        config=model.config, inputs_embeds=torch.empty(*ids.shape, 0), attention_mask=torch.ones_like(ids),
        past_key_values=None, position_ids=torch.arange(ids.shape[1])[None], mm_token_type_ids=(ids == 99).int(),
    )  # fmt: skip


CANVAS = torch.arange(40, 46)[None]


def test_evicts_what_the_last_row_looks_at_least(gemma):
    """Against attention weights and masks of the bare model, without any of our code; the model is called, not generate()."""
    ids = PROMPTS[:1]
    gemma.set_attn_implementation("eager")
    with torch.no_grad():
        masks = {
            kind: mask
            if mask is None or mask.dtype != torch.bool
            else torch.zeros(mask.shape).masked_fill(~mask, -1e30)
            for kind, mask in prompt_masks(gemma, ids).items()
        }
        weights = gemma.model.encoder(input_ids=ids, attention_mask=masks, output_attentions=True).attentions
    gemma.set_attn_implementation("sdpa")
    image = (ids[0] == 99).nonzero().flatten()
    gone = {index: image[weights[index][0, :, -1, image].mean(0).argsort(descending=True)[2:]] for index in FULL}
    with torch.no_grad():
        expected = hidden_by_hand(gemma, ids, gone)
        with evicted(gemma, 0.25) as found:
            out = gemma(input_ids=ids, attention_mask=prompt_masks(gemma, ids), decoder_input_ids=CANVAS)
    assert found.slots == [[10, 10]]
    near(out.logits, expected)


def test_all_kept_is_the_bare_model(gemma):
    bare, _ = write(gemma, PROMPTS)
    before = hooks(gemma)
    with evicted(gemma, 1.0):
        kept, _ = write(gemma, PROMPTS)
    assert torch.equal(kept, bare)
    text = PROMPTS.masked_fill(PROMPTS == 99, 50)
    plain, _ = write(gemma, text)
    with evicted(gemma, LateStep(0.0, 0.0), steps=1) as found:
        assert torch.equal(write(gemma, text)[0], plain), "prompts without images"
    assert found.slots == found.read == []
    with pytest.raises(ZeroDivisionError), evicted(gemma, 0.0):
        raise ZeroDivisionError
    assert torch.equal(write(gemma, PROMPTS)[0], bare)
    assert hooks(gemma) == before


def test_each_prompt_is_evicted_for_itself(gemma):
    alone = []
    for ids in (PROMPTS[:1], PROMPTS[1:, 6:]):
        with evicted(gemma, 0.25):
            alone.append(write(gemma, ids)[0])
    with evicted(gemma, 0.25) as found:
        together = [write(gemma, ids)[0] for ids in (PROMPTS[:1], PROMPTS[1:, 6:])]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert found.slots == [[10, 10], [7, 7]]


def test_images_from_pixels(gemma):
    side = gemma.config.vision_config.pooling_kernel_size
    place = torch.stack(torch.meshgrid(torch.arange(2 * side), torch.arange(4 * side), indexing="xy"), -1).view(
        1, -1, 2
    )
    torch.manual_seed(1)
    image = {"pixel_values": torch.rand(1, place.shape[1], 48), "image_position_ids": place}  # eight tokens
    bare, _ = write(gemma, PROMPTS[:1], **image)
    with evicted(gemma, 0.25, mode="mask"):
        hidden, _ = write(gemma, PROMPTS[:1], **image)
    with evicted(gemma, 0.25) as found:
        dropped, out = write(gemma, PROMPTS[:1], replay=hidden, **image)
        with pytest.raises(UnsupportedError, match="first turn only"):
            write(gemma, PROMPTS[:1], past_key_values=out.past_key_values, **image)
    assert found.slots == [[10, 10]]
    near(dropped, hidden)
    assert (bare[0] - dropped[0]).abs().max() > 0.05


def test_refused(gemma):
    with pytest.raises(UnsupportedError, match="knows diffusion_gemma models only"), evicted(nn.Linear(1, 1)):
        pass
    for options, error in (
        ({"mode": "hide"}, "mode must be drop or mask"),
        ({"keep_ratio": LateStep()}, "needs steps="),
        ({"keep_ratio": LayerSkip((1,)), "steps": 4}, r"sliding layers only, .* full attention: \[0, 3\]"),
        ({"keep_ratio": 2.0}, "must be a share"),
        ({"steps": 0}, "steps must count"),
    ):
        with pytest.raises(OptionError, match=error), evicted(gemma, **options):
            pass
    with evicted(gemma):
        with pytest.raises(UnsupportedError, match="static cache"):
            write(gemma, PROMPTS[:1], cache_implementation="static", disable_compile=True)
        with pytest.raises(UnsupportedError, match="offloaded"):
            write(gemma, PROMPTS[:1], past_key_values=DynamicCache(offloading=True))
        with pytest.raises(InputError, match="padding_side = 'left'"):
            write(gemma, PROMPTS.flip(1))
        with pytest.raises(InputError, match="by input_ids"):
            gemma.model.encoder(inputs_embeds=torch.zeros(1, 3, 32))
        with pytest.raises(StateError, match="in another"), evicted(gemma):
            write(gemma, PROMPTS[:1])
    with evicted(gemma, LateStep(), steps=3), pytest.raises(StateError, match="step 4 of a canvas"):
        write(gemma, PROMPTS[:1])
    gemma.set_attn_implementation("flex_attention")
    with evicted(gemma), pytest.raises(UnsupportedError, match="sdpa and eager"):
        gemma.model.encoder(input_ids=PROMPTS[:1])
    gemma.set_attn_implementation("sdpa")
