"""Calibration against its equation in loops, on attention weights of the pooling row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from engine import registered, request_of
from numerics import TINY_MODEL, bound, near
from test_goldens import LAYER, Layer, causal
from test_masks import PAD, SEPARATOR, Token, batch_of, inputs_of, write
from tiny import FAMILIES, build, generate
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import vlmattn
from vlmattn import Calibration, InputError, OptionError
from vlmattn.anatomy import Anatomy
from vlmattn.request import IMAGE, TEXT, Step, number_images

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)  # logits of a random model are smaller
PLACEHOLDERS = [96, 97, 98, 99]
family_matrix = pytest.mark.parametrize("family", FAMILIES)
Segments = Callable[[list[Token]], list]


def pooling(row: list[Token]) -> int:
    return max(n for n, t in enumerate(row) if t.real and not t.generated)


def baskets(size: int) -> Segments:
    """Baskets of real tokens in order; the pooling token is by itself."""

    def of(row: list[Token]) -> list:
        out, count = [], 0
        for n, token in enumerate(row):
            out.append("pool" if n == pooling(row) else count // size if token.real else None)
            count += token.real
        return out

    return of


def by_image(row: list[Token]) -> list:
    """Every image with the text after it, the last without; everything else is one more."""
    last, out, current = max((n for n, t in enumerate(row) if t.image >= 0), default=-1), [], -1
    for n, token in enumerate(row):
        current = max(current, token.image)
        inside = current >= 0 and n <= last
        out.append("pool" if n == pooling(row) else current if inside else "rest" if token.real else None)
    return out


def by_separator(row: list[Token]) -> list:
    """Stretches that a separator ends; the question after the last one is the rest."""
    out, current, left = [], 0, sum(t.id == SEPARATOR for t in row)
    for n, token in enumerate(row):
        out.append("pool" if n == pooling(row) else None if not token.real else current if left else "rest")
        if token.id == SEPARATOR:
            current, left = current + 1, left - 1
    return out


def levelled(weights: Tensor, segments: list, strength: float) -> Tensor:
    """One row ``[keys]`` of attention after the edit."""
    a = weights.double().tolist()
    mass: dict = {}
    for weight, segment in zip(a, segments, strict=True):
        if weight > 0:
            mass[segment] = mass.get(segment, 0.0) + weight
    mean = sum(mass.values()) / len(mass)
    gain = {segment: 1 - strength + strength * mean / found for segment, found in mass.items()}
    edited = [weight * gain[segment] if weight > 0 else 0.0 for weight, segment in zip(a, segments, strict=True)]
    assert abs(sum(edited) - 1) < 1e-5
    return torch.tensor(edited, dtype=weights.dtype)


def by_hand(
    model: PreTrainedModel, rows: list[list[Token]], inputs: dict, segments: Segments, strength: float, layers: range
):
    """Logits of the bare model with the pooling rows of some layers levelled."""

    def attend(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        weights = (query @ key.transpose(-1, -2) * scaling + mask).softmax(-1)
        if module.layer_idx in layers:
            for b, row in enumerate(rows):
                for h in range(weights.shape[1]):
                    weights[b, h, pooling(row)] = levelled(weights[b, h, pooling(row)], segments(row), strength)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("calibration_for_test", attend)
    AttentionMaskInterface.register("calibration_for_test", eager_mask)
    model.set_attn_implementation({"text_config": "calibration_for_test"})
    return model(**inputs).logits


def check(family: str, rows: list[list[Token]], method: Calibration, segments: Segments, layers: range) -> None:
    model = build(family)
    inputs = inputs_of(model, rows)
    bare = model(**inputs).logits
    expected = by_hand(build(family), rows, inputs, segments, method.strength, layers)
    vlmattn.wrap(model, method)
    got = model(**inputs).logits
    for b, row in enumerate(rows):
        last = pooling(row)
        torch.testing.assert_close(got[b, last], expected[b, last], rtol=0, atol=TOLERANCE)
        assert (got - bare)[b, last].abs().max() > 1e-3
    others = torch.tensor([[t.real and n != pooling(row) for n, t in enumerate(row)] for row in rows])
    torch.testing.assert_close(got[others], bare[others], rtol=0, atol=TOLERANCE)
    ran = model.vlmattn.report()["layers"]["prefill"]
    assert sorted(layer for name, found in ran.items() if "base" not in name for layer in found) == list(layers)
    assert model.vlmattn.report()["fired"] == {"calibration": len(rows)}


@pytest.mark.parametrize("layers", ["1/2:", "0:"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("basket", [1, 3, 8, 16])
@family_matrix
def test_baskets_of_tokens(family, basket, strength, layers):
    method = Calibration(strength=strength, basket=basket, layers=layers)
    check(family, [write(family, [1, "img", 5])], method, baskets(basket), range(2 if layers == "1/2:" else 0, 4))


@pytest.mark.parametrize("basket", [3, 8])
@family_matrix
def test_baskets_of_a_padded_batch_begin_with_the_first_real_token(family, basket):
    rows = [
        write(family, [1, "img", 5]),
        write(family, ["img", 2, "img", 3], seed=5),
        write(family, ["img", 1], seed=7),
    ]
    check(family, batch_of(rows), Calibration(basket=basket), baskets(basket), range(2, 4))


@pytest.mark.parametrize("strength", [0.5, 1.0])
@family_matrix
def test_documents_by_image(family, strength):
    rows = [write(family, [2, "img", 3, "img", 1, "img", 4]), write(family, ["img", "img", 5], seed=4)]
    method = Calibration(strength=strength, segments="documents")
    check(family, batch_of(rows), method, by_image, range(2, 4))


@family_matrix
def test_documents_by_separator(family):
    rows = [write(family, [2, "sep", "img", 3, "sep", 4]), write(family, ["img", "sep", 2, "sep", 1, "sep", 2], seed=4)]
    method = Calibration(segments="documents", separator=(SEPARATOR,))
    check(family, batch_of(rows), method, by_separator, range(2, 4))


def test_text_alone_is_welcome():
    """Padded on either side; the pooling row is each sample's last real token."""
    rows = [[Token(1), *[Token(n) for n in range(20, 31)]], [Token(1), *[Token(n) for n in range(40, 46)]]]
    ids = torch.tensor([[t.id for t in row] for row in batch_of(rows)])
    left = dict(input_ids=ids, attention_mask=(ids > 0).long())
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
    model = build("llava")
    expected = by_hand(build("llava"), batch_of(rows), left, baskets(4), 0.5, range(2, 4))
    bare = model(**left).logits
    vlmattn.wrap(model, Calibration(basket=4))
    got = model(**left).logits
    torch.testing.assert_close(got[:, -1], expected[:, -1], rtol=0, atol=TOLERANCE)
    assert (got - bare)[:, -1].abs().amax(-1).min() > 1e-3
    padded = [rows[0], [*rows[1], *[PAD] * 5]]
    ids = torch.tensor([[t.id for t in row] for row in padded])
    right = dict(input_ids=ids, attention_mask=(ids > 0).long())
    got = model(**right).logits
    torch.testing.assert_close(got[0, 11], expected[0, -1], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(got[1, 6], expected[1, -1], rtol=0, atol=TOLERANCE)
    assert model.generate(**left, max_new_tokens=2, pad_token_id=0).shape[0] == 2


@family_matrix
def test_generated_rows_are_not_edited(family):
    rows = batch_of([write(family, [1, "img", 5]), write(family, ["img", 2], seed=5)])
    model = build(family)
    inputs = inputs_of(model, rows, positions=False)
    vlmattn.wrap(model, Calibration(basket=5))
    got = generate(model, inputs, suppress_tokens=PLACEHOLDERS)
    allowed = got.clone()
    allowed[..., [2, *PLACEHOLDERS]] = -torch.inf
    said = allowed.argmax(-1)[:, :-1].tolist()
    longer = [row + [Token(t, generated=True) for t in said[b]] for b, row in enumerate(rows)]
    expected = by_hand(build(family), longer, inputs_of(model, longer), baskets(5), 0.5, range(2, 4))[:, -4:]
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    for options in (dict(use_cache=False), dict(cache_implementation="static")):
        again = generate(model, inputs, suppress_tokens=PLACEHOLDERS, **options)
        torch.testing.assert_close(again, got, rtol=0, atol=TOLERANCE)
    decoded = model.vlmattn.report()["layers"]["decode"]
    assert decoded.keys() == {"base:sdpa"}


# --- Through the registered function


@pytest.mark.parametrize("backend", [None, "eager", "merge", "reference"])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_masses_of_the_pooling_row(strength, backend, monkeypatch):
    """Unit vectors as values tell the weights: strength 1 makes all segments' masses equal."""
    if backend:
        monkeypatch.setenv("VLMATTN_BACKEND", backend)
    length, basket = 21, 6
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, length, length, generator=generator)
    key = torch.randn(1, 4, length, length, generator=generator)
    sizes = Anatomy("llava", LAYER + 2, 4, 4, length, 32, ("llama", 32, LAYER + 2, 64))
    method = Calibration(strength=strength, basket=basket, layers="0:")
    request = request_of(method, sizes)
    types = torch.tensor([[IMAGE if 3 <= n < 9 else TEXT for n in range(length)]], dtype=torch.uint8)
    request.extend(0, types, number_images(types, None), None, None)
    value = torch.eye(length).expand(1, 4, length, length)
    step, mask = Step(request, "sdpa", 0), causal(length, length)
    out = registered(step, Layer(1), query, key, value, mask, scaling=0.5, dropout=0.0)
    weights = out.transpose(1, 2)[0]
    plain = (query @ key.transpose(-1, -2) * 0.5 + causal(length, length)).softmax(-1)[0]
    near(weights[:, :-1], plain[:, :-1])
    segments = ["pool" if n == length - 1 else n // basket for n in range(length)]
    for h in range(4):
        expected = levelled(plain[h, -1], segments, strength)
        near(weights[h, -1], expected)
        masses = [sum(float(w) for w, s in zip(weights[h, -1], segments, strict=True) if s == n) for n in set(segments)]
        if strength == 1:
            assert masses == pytest.approx([1 / 5] * 5, abs=1e-5)
    assert (levelled(plain[0, -1], segments, 1.0) - plain[0, -1]).abs().max() > 0.02


# --- Options


def test_strength_zero_changes_nothing():
    model = build("llava")
    inputs = inputs_of(model, [write("llava", [1, "img", 5])])
    bare = model(**inputs).logits
    with vlmattn.applied(model, Calibration(strength=0.0, basket=4, layers="0:")):
        near(model(**inputs).logits, bare)


@pytest.mark.parametrize("count", [255, 256])
def test_too_many_segments_are_refused(count):
    """One for the pooling token and one for every other token; a byte numbers them."""
    model = build("llava")
    ids = torch.tensor([[1, *[20] * (count - 1)]])
    bare = model(input_ids=ids).logits[:, -1]
    with vlmattn.applied(model, Calibration(basket=1, layers="0:")):
        if count > 255:
            with pytest.raises(InputError, match=r"256 segments.*larger basket"):
                model(input_ids=ids)
        else:
            assert not torch.equal(model(input_ids=ids).logits[:, -1], bare)


@pytest.mark.parametrize(
    "options", [dict(strength=1.1), dict(basket=0), dict(segments="words"), dict(separator=("a",))]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match="calibration"):
        Calibration(**options)
