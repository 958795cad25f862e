"""Fewer image tokens while denoising: on a toy denoiser against frozen rows, on a tiny DiffusionGemma against hidden slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from vlmattn.diffusion import Constant, LateStep, LayerSkip, Progressive, evicted, thinned
from vlmattn.errors import OptionError, StateError, UnsupportedError

STEPS, LAYERS, WIDTH, HEADS = 4, 3, 24, 3
SCHEDULES = {
    "constant": Constant(0.5, layer=1),
    "progressive": Progressive(1.0, 0.25),
    "late": LateStep(0.5, 0.25),
    "skip": LayerSkip((1,)),
    "skip_most": LayerSkip((0, 2), share=0.5),
}


class Attention(nn.Module):
    head_dim = WIDTH // HEADS

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden, mask, tables):
        query, key, value = (
            part(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (table[:, None] for table in tables)
        query, key = (part * cos + part.flip(-1) * sin for part in (query, key))
        return self.o_proj(scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.self_attn = nn.LayerNorm(WIDTH), Attention()
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None):
        hidden = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, position_embeddings
        )
        return hidden + self.mlp(hidden)


class Toy(nn.Module):
    """Text, image and masked answer tokens see each other in every step; each step unmasks the surest answer token."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(20, WIDTH), nn.ModuleList(Layer() for _ in range(LAYERS))

    def tables(self, rows):
        angle = torch.arange(rows)[None, :, None] * 0.3 ** torch.arange(WIDTH // HEADS)
        return angle.cos(), angle.sin()

    @torch.no_grad()
    def denoise(self, ids, mask=None, hide=None):
        """Logits of every step; ``hide(step, layer, hidden)`` gives rows that are frozen and hidden: bool ``[batch, rows]``."""
        found, ids = [], ids.clone()
        for step in range(STEPS):
            hidden = self.embed(ids)
            for number, layer in enumerate(self.layers):
                gone = None if hide is None else hide(step, number, hidden)
                seen = mask
                if gone is not None:
                    seen = ~gone[:, None, None] if mask is None else mask & ~gone[:, None, None]
                new = layer(hidden, attention_mask=seen, position_embeddings=self.tables(ids.shape[1]))
                hidden = new if gone is None else torch.where(gone[..., None], hidden, new)
            logits = torch.nn.functional.layer_norm(hidden, (WIDTH,)) @ self.embed.weight.T
            found.append(logits)
            surest = logits.amax(-1).masked_fill((ids != 0) | ~REAL[: len(ids)], float("-inf")).argmax(1)
            ids[torch.arange(len(ids)), surest] = logits[torch.arange(len(ids)), surest, 1:].argmax(-1) + 1
        return torch.stack(found)


@pytest.fixture
def toy():
    torch.manual_seed(0)
    model = Toy().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, 0.4)
    return model


IDS = torch.tensor([[5, 6, 7, *range(9, 17), 8, *[0] * 5], [*[0] * 4, 6, 7, *range(9, 13), 8, 5, *[0] * 5]])
REAL = torch.ones_like(IDS, dtype=torch.bool)
REAL[1, :4] = False
VISUAL = (IDS >= 9) & REAL
MASK = REAL[:, None, None]


def told(schedule, toy, visual, real, select=0):
    """Rows that are gone, told again: scores once, in the first step, from the layer ``select``."""
    scores = {}

    def hide(step, number, hidden):
        if step == 0 and number == select:
            layer = toy.layers[select]
            normed = layer.input_layernorm(hidden)
            query, key = (
                part(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)
            )
            share = (query @ key.transpose(2, 3) * (WIDTH // HEADS) ** -0.5).softmax(-1).mean(1)
            asked = ~visual & real
            scores["all"] = (share * asked[..., None]).sum(1) / asked.sum(1, keepdim=True)
        gone = torch.zeros_like(visual)
        for row in range(len(visual)):
            count = round(schedule.keep(step, STEPS, number, LAYERS) * int(visual[row].sum()))
            if "all" not in scores and count:
                continue
            place = visual[row].nonzero().flatten()
            values = scores["all"][row, place] if "all" in scores else torch.zeros(len(place))
            gone[row, place[values.argsort(descending=True, stable=True)[count:]]] = True
        return gone if bool(gone.any()) else None

    return hide


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("select", [0, 1])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 2)], ids=["one", "padded"])
def test_equals_rows_that_are_hidden_and_frozen(toy, name, select, rows):
    schedule, mask = SCHEDULES[name], None if rows == slice(0, 1) else MASK[rows]
    with thinned(toy.layers, VISUAL[rows], schedule, STEPS, real=REAL[rows], select=select):
        out = toy.denoise(IDS[rows], mask)
    expected = toy.denoise(IDS[rows], mask, told(schedule, toy, VISUAL[rows], REAL[rows], select))
    there = REAL[rows]
    torch.testing.assert_close(out[:, there], expected[:, there], rtol=0, atol=1e-5)
    assert (toy.denoise(IDS[rows], mask)[:, there] - out[:, there]).abs().max() > 0.05


def test_layers_compute_as_many_rows_as_the_schedule_says(toy):
    rows = IDS.shape[1]
    seen = []
    toy.layers[1].self_attn.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with thinned(toy.layers, VISUAL[:1], Progressive(1.0, 0.25), STEPS) as found:
        toy.denoise(IDS[:1])
    wanted = [rows - 8 + round(share * 8) for share in (1.0, 0.75, 0.5, 0.25)]
    assert found.rows == [[count] * LAYERS for count in wanted]
    assert seen == wanted


def test_nothing_dropped_is_nothing_changed_and_hooks_go(toy):
    bare = toy.denoise(IDS, MASK)
    with thinned(toy.layers, VISUAL, LayerSkip((1,), share=1.0), STEPS, real=REAL):
        assert torch.equal(toy.denoise(IDS, MASK), bare)
    with pytest.raises(ZeroDivisionError), thinned(toy.layers, VISUAL, Constant(0.1), STEPS, real=REAL):
        raise ZeroDivisionError
    assert torch.equal(toy.denoise(IDS, MASK), bare)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in toy.layers)


def test_refusals(toy):
    with thinned(toy.layers, VISUAL, Constant(0.5), STEPS, real=REAL):
        toy.denoise(IDS, MASK)
        with pytest.raises(StateError, match="forward 5 of a denoiser of 4 steps"):
            toy.denoise(IDS, MASK)
    plain = nn.Identity()
    with thinned([plain], VISUAL, Constant(0.5), 1), pytest.raises(UnsupportedError, match="give score="):
        plain(torch.zeros(2, IDS.shape[1], 4))
    for wrong in (
        lambda: Constant(1.5),
        lambda: Progressive(0.5, -1),
        lambda: LateStep(2),
        lambda: LayerSkip((1,), share=3),
    ):
        with pytest.raises(OptionError, match=r"must be a share within 0\.\.1"):
            wrong()


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 50), st.integers(1, 40))
def test_schedules_stay_within_their_bounds(a, b, steps, layers):
    for schedule in (Constant(a), Progressive(a, b), LateStep(a, b), LayerSkip((0,), b)):
        shares = [[schedule.keep(step, steps, layer, layers) for layer in range(layers)] for step in range(steps)]
        assert all(-1e-12 <= share <= 1 + 1e-12 for row in shares for share in row)
        if isinstance(schedule, Progressive):
            first = [row[0] for row in shares]
            assert first[0] == a
            assert first == sorted(first, reverse=a >= b)
            assert steps == 1 or first[-1] == pytest.approx(b)


# DiffusionGemma


@pytest.fixture(scope="module")
def gemma():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
        pytest.skip("this transformers has no DiffusionGemma")
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    text = transformers.DiffusionGemmaTextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, global_head_dim=16, num_global_key_value_heads=1, sliding_window=64, layer_types=kinds, num_experts=4,
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
    return model


PROMPTS = torch.tensor([[2, 5, 6, 97, *[99] * 8, 96, 7, 8, 9], [0] * 6 + [2, 97, 99, 99, 99, 99, 96, 7, 8, 9]])


def write(model, ids, **options):
    """Two canvases of four denoising steps each: all logits, tokens, and the cache. Image tokens stand for themselves."""
    found = []
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: found.append(logits))
    torch.manual_seed(0)
    out = model.generate(
        input_ids=ids, attention_mask=(ids != 0).long(), mm_token_type_ids=(ids == 99).int(), max_new_tokens=12,
        max_denoising_steps=4, **options,
    )  # fmt: skip
    hook.remove()
    return torch.stack(found), out


@pytest.mark.parametrize(
    ("attn", "rows"), [("sdpa", 1), ("sdpa", 2), ("eager", 1)]
)  # eager with padding fails in the library
def test_evicted_equals_hidden(gemma, attn, rows):
    gemma.set_attn_implementation(attn)
    ids = PROMPTS[:rows]
    with evicted(gemma, 0.25) as slots:
        dropped, out = write(gemma, ids)
    with evicted(gemma, 0.25, mode="mask") as whole:
        hidden, again = write(gemma, ids)
    assert slots == [(10, 10)], "8 text tokens and 2 of the image"
    assert whole == [(16, 16)]
    torch.testing.assert_close(dropped[:1], hidden[:1], rtol=0, atol=1e-5)
    torch.testing.assert_close(dropped, hidden, rtol=0, atol=1e-2)  # every step feeds on the logits of the one before
    assert torch.equal(out.sequences, again.sequences)
    bare, _ = write(gemma, ids)
    assert (bare[0] - dropped[0]).abs().max() > 0.05
    layers = out.past_key_values.layers  # the first canvas came behind
    assert [layer.keys.shape[-2] for layer in layers] == [10 + 6, 16 + 6, 16 + 6, 10 + 6]
    assert out.past_key_values.get_seq_length() == 16 + 6, "positions count all tokens"


def test_all_kept_is_the_bare_model(gemma):
    gemma.set_attn_implementation("sdpa")
    bare, _ = write(gemma, PROMPTS)
    with evicted(gemma, 1.0):
        kept, _ = write(gemma, PROMPTS)
    assert torch.equal(kept, bare)
    assert torch.equal(write(gemma, PROMPTS)[0], bare)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in gemma.modules())


def test_refused(gemma):
    with pytest.raises(UnsupportedError, match="knows diffusion_gemma models only"), evicted(nn.Linear(1, 1)):
        pass
    with pytest.raises(OptionError, match="mode must be drop or mask"), evicted(gemma, mode="hide"):
        pass
    with evicted(gemma), pytest.raises(UnsupportedError, match="static cache"):
        write(gemma, PROMPTS[:1], cache_implementation="static", disable_compile=True)
