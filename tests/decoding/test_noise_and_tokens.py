"""Diffusion noise as released with VCD, and the image tokens that branches see, against loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import near
from safetensors.torch import load_file
from torch import Tensor

from vlmattn.decoding import BlindTokens, Noise, TopAttended
from vlmattn.decoding.noise import STEPS
from vlmattn.errors import OptionError

GOLDENS = Path(__file__).parent.parent / "goldens" / "vcd"
COEFFICIENTS = json.loads((GOLDENS / "vcd_goldens.json").read_text())["noise"]["coefficients"]


def pixels(*shape: int, seed: int = 100) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Noise


@pytest.mark.parametrize("step", [int(step) for step in COEFFICIENTS])
def test_noise_is_the_released_one(step):
    golden = load_file(GOLDENS / "vcd_goldens.safetensors")
    signal, noise = Noise(step).coefficients
    wanted = COEFFICIENTS[str(step)]
    assert (signal, noise) == pytest.approx((wanted["signal"], wanted["noise"]), rel=0, abs=1e-6)
    expected = golden[f"noise.{step}"]
    torch.testing.assert_close(signal * golden["noise.x"] + noise * golden["noise.eps"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(Noise(step, seed=7)(golden["noise.x"]), expected, rtol=0, atol=1e-5)


def test_coefficients_follow_the_schedule():
    left = 1.0
    for step in range(STEPS):
        left *= 1 - ((5e-3 - 1e-5) / (1 + math.exp(6 - 12 * step / 999)) + 1e-5)
        if step % 111 == 0:
            assert Noise(step).coefficients == pytest.approx((left**0.5, (1 - left) ** 0.5), abs=2e-5)
    assert step == 999


def test_a_row_has_the_same_noise_whatever_surrounds_it():
    one, other = pixels(1, 3, 8, 8), pixels(1, 3, 8, 8, seed=101)
    noise = Noise(seed=4)
    first = noise(one)
    torch.randn(5), noise(other), noise(pixels(2, 3, 4, 4))
    assert torch.equal(noise(one), first)
    assert torch.equal(Noise(seed=4)(one), first)
    signal, _ = noise.coefficients
    near(first - signal * one, noise(other) - signal * other, terms=8, scale=5.0)


def test_seeds_and_steps_differ():
    x = pixels(3, 16, 16)
    drawn = {(step, seed): Noise(step, seed)(x) for step in (300, 500) for seed in (0, 1, 2**63 - 1)}
    values = list(drawn.values())
    assert all(not torch.allclose(a, b, atol=0.1) for at, a in enumerate(values) for b in values[:at])


def test_noise_is_standard_normal():
    x = pixels(3, 100, 100)
    signal, noise = Noise().coefficients
    eps = (Noise()(x) - signal * x) / noise
    assert abs(float(eps.mean())) < 0.03
    assert float(eps.std()) == pytest.approx(1, abs=0.02)
    assert abs(float((eps * x).mean())) < 0.03


def test_first_and_last_step():
    x = pixels(3, 50, 50)
    torch.testing.assert_close(Noise(0)(x), x, rtol=0, atol=0.03)
    assert torch.corrcoef(torch.stack([Noise(999)(x).flatten(), x.flatten()]))[0, 1] == pytest.approx(0.285, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_noise_keeps_dtype_shape_and_the_callers_state(dtype):
    x = pixels(7, 1176).to(dtype)
    before, state = x.clone(), torch.get_rng_state()
    noised = Noise()(x)
    assert (noised.dtype, noised.shape) == (dtype, x.shape)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(noised, Noise()(x.float()).to(dtype))


@pytest.mark.parametrize("step", [-1, 1000, 1.5, "500", None])
def test_noise_refuses(step):
    with pytest.raises(OptionError, match=r"noise step must be a whole number within 0\.\.999"):
        Noise(step)


# Image tokens


def some_attention(layers: int, batch: int, keys: int, seed: int) -> tuple[Tensor, Tensor]:
    """Attention ``[layer, batch, key]`` (rows sum to 1) and image tokens ``[batch, key]``; no row is without any."""
    generator = torch.Generator().manual_seed(seed)
    attention = (torch.randn(layers, batch, keys, generator=generator) * 1.5).softmax(-1)
    visual = torch.rand(batch, keys, generator=generator) < 0.5
    visual[:, keys // 2] = True
    return attention, visual


def top_attended(attention: np.ndarray, visual: list[list[bool]], share: float) -> list[list[bool]]:
    chosen = []
    for row, image in enumerate(visual):
        keys = [key for key, inside in enumerate(image) if inside]
        mean = {key: sum(layer[row][key] for layer in attention) / len(attention) for key in keys}
        ranked = sorted(keys, key=lambda key: (-mean[key], key))
        kept = ranked[: max(1, math.ceil(share * len(keys)))]
        chosen.append([key in kept for key in range(len(image))])
    return chosen


@st.composite
def attention_with_ties(draw):
    layers, batch, keys = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    count = layers * batch * keys
    eighths = draw(st.lists(st.integers(0, 8), min_size=count, max_size=count))
    visual = draw(st.lists(st.booleans(), min_size=batch * keys, max_size=batch * keys))
    return torch.tensor(eighths).view(layers, batch, keys) / 8, torch.tensor(visual).view(batch, keys)


@given(attention_with_ties(), st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0]), st.integers(0, 3))
def test_top_attended(drawn, share, padding):
    attention, visual = drawn
    choice = TopAttended(share, "0:")
    kept = choice.choose(attention, visual)
    assert kept.tolist() == top_attended(attention.double().numpy(), visual.tolist(), share)
    assert not (kept & ~visual).any()
    assert torch.equal(kept.any(-1), visual.any(-1)), "at least one token of every image"
    for row in range(len(visual)):
        assert torch.equal(choice.choose(attention[:, row : row + 1], visual[row : row + 1])[0], kept[row])
    left = torch.nn.functional.pad
    padded = choice.choose(left(attention, (padding, 0)), left(visual, (padding, 0)))
    assert not padded[:, :padding].any()
    assert torch.equal(padded[:, padding:], kept)
    assert torch.equal(TopAttended(1.0, "0:").choose(attention, visual), visual)


@pytest.mark.parametrize(("share", "count"), [(0.3, 50), (0.3, 100), (0.09, 300)])
def test_top_attended_counts_exactly(share, count):
    attention, visual = some_attention(1, 1, count, 0)
    kept = TopAttended(share, "0:").choose(attention, torch.ones_like(visual))
    assert int(kept.sum()) == round(share * count)


def blind_tokens(attention: np.ndarray, image: list[int], mass: float, deviations: float) -> tuple[np.ndarray, float]:
    """Mean attention of a row's image tokens over the chosen layers, and the threshold. ``attention`` [layer, key]."""
    on_image = [sum(layer[key] for key in image) for layer in attention]
    chosen, reached = [], 0.0
    for layer in sorted(range(len(attention)), key=lambda layer: -on_image[layer]):
        if reached >= mass * sum(on_image):
            break
        chosen.append(layer)
        reached += on_image[layer]
    mean = np.array([np.mean([attention[layer][key] for layer in chosen]) for key in image])
    return mean, mean.mean() + deviations * (mean.std(ddof=1) if len(image) > 1 else 0.0)


@pytest.mark.parametrize("deviations", [-0.5, 0.0, 1.0, 1.7])
@pytest.mark.parametrize("mass", [0.05, 0.5, 0.8, 1.0])
def test_blind_tokens(mass, deviations):
    choice, sizes = BlindTokens(mass, deviations), set()
    for seed in range(6):
        attention, visual = some_attention(5, 3, 24, seed)
        kept = choice.choose(attention, visual)
        for row in range(3):
            image = visual[row].nonzero().flatten().tolist()
            mean, threshold = blind_tokens(attention[:, row].double().numpy(), image, mass, deviations)
            assert np.abs(mean - threshold).min() > 1e-6, "the oracle must be able to tell"
            assert kept[row].nonzero().flatten().tolist() == [
                key for key, value in zip(image, mean, strict=True) if value >= threshold
            ]
            sizes.add(int(kept[row].sum()))
            assert torch.equal(choice.choose(attention[:, row : row + 1], visual[row : row + 1])[0], kept[row])
        left = torch.nn.functional.pad
        padded = choice.choose(left(attention, (3, 0)), left(visual, (3, 0)))
        assert torch.equal(padded, left(kept, (3, 0)))
    assert len(sizes) > 1


def test_blind_tokens_ignore_text_however_loud():
    attention, visual = some_attention(4, 2, 12, 0)
    loud = torch.where(visual, attention, attention + 5)
    for choice in (BlindTokens(0.5, 1.0), BlindTokens(0.5, -10.0), TopAttended(0.5, "0:")):
        assert torch.equal(choice.choose(loud, visual), choice.choose(attention, visual))
        assert not (choice.choose(loud, visual) & ~visual).any()


def test_blind_tokens_look_at_the_layers_that_look_at_the_image():
    """Layer 1 holds 8/9 of the attention on the image, so that layer 0 has no say up to that mass."""
    visual = torch.tensor([[False, True, True, True, True]])
    attention = torch.tensor([[[0.9, 0.1, 0.0, 0.0, 0.0]], [[0.2, 0.1, 0.1, 0.1, 0.5]]])
    assert BlindTokens(0.8, 1.0).choose(attention, visual).tolist() == [[False, False, False, False, True]]
    swapped = attention.flip(0)
    assert BlindTokens(0.8, 1.0).choose(swapped, visual).tolist() == [[False, False, False, False, True]]
    even = torch.tensor([[[0.0, 1.0, 0.0, 0.0, 0.0]], [[0.2, 0.1, 0.1, 0.1, 0.5]]])
    assert BlindTokens(0.8, 1.0).choose(even, visual).tolist() == [[False, True, False, False, False]]


def test_rows_without_an_image_choose_nothing():
    attention, visual = some_attention(3, 2, 8, 0)
    visual[0] = False
    for choice in (BlindTokens(0.5, 1.0), TopAttended(0.5, "0:")):
        kept = choice.choose(attention, visual)
        assert not kept[0].any()
        assert kept[1].any()


def test_blind_tokens_look_at_one_layer_at_least():
    attention, visual = some_attention(4, 1, 24, 0)
    assert torch.equal(
        BlindTokens(0.0, 1.0).choose(attention, visual), BlindTokens(1e-6, 1.0).choose(attention, visual)
    )


def test_layers_that_are_looked_at():
    sizes = SimpleNamespace(layers=6)
    assert TopAttended(0.5, "1/4:3/4").layers(sizes) == (1, 2, 3)
    assert TopAttended(0.5, "-2:").layers(sizes) == (4, 5)
    assert BlindTokens(0.5, 1.0).layers(sizes) == (0, 1, 2, 3, 4, 5)
    assert (TopAttended(0.5, "0:").blank, TopAttended(0.5, "0:", blank=True).blank) == (False, True)
    assert BlindTokens(0.5, 1.0).blank
    with pytest.raises(OptionError, match="layers must look like"):
        TopAttended(0.5, "middle").layers(sizes)
    with pytest.raises(OptionError, match=r"has layers 0\.\.5"):
        TopAttended(0.5, "7").layers(sizes)


def test_no_layer_to_look_at_is_refused():
    with pytest.raises(OptionError):
        TopAttended(0.5, "8:").layers(SimpleNamespace(layers=6))
