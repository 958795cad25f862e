"""DART against the released rule on a decoder run by hand."""

from __future__ import annotations

import pytest
import torch
from numerics import TINY_MODEL, bound
from rows_by_hand import generated_by_hand, turned
from tiny import build, left_padded, prompt
from tiny import generate as unrestricted
from torch.nn.functional import normalize
from zoo import ZOO, padded

import vlmattn
from vlmattn import Recipe
from vlmattn.errors import OptionError
from vlmattn.interventions import DART

pytestmark = pytest.mark.usefixtures("no_grad")
TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)
NEW = 3
PLACEHOLDERS = [96, 97, 98, 99]


def generate(model, inputs):
    return unrestricted(model, inputs, NEW, suppress_tokens=PLACEHOLDERS)


def released(layer, ratio, image_pivots, text_pivots):
    """What goes on to ``layer``: pivots by the L1 norm of the keys of the layer before, then the least alike of each in turn."""
    sizes = {}

    def drop(rows, index):
        if index == layer - 1:
            attn = rows.decoder.layers[index].self_attn
            cos, sin = rows.decoder.rotary_emb(rows.hidden[None], rows.positions)
            normed = rows.decoder.layers[index].input_layernorm(rows.hidden)
            key = attn.k_proj(normed).view(len(normed), -1, attn.head_dim).transpose(0, 1)
            sizes["of"] = (key * cos[0] + turned(key) * sin[0]).abs().sum((0, 2))
        if index != layer:
            return None
        images = rows.image_rows.tolist()
        # text between images is text behind the first one
        text = [row for row in range(images[0], rows.prompt) if not rows.visual[row]]
        largest = lambda slots, count: sorted(sorted(slots, key=lambda s: -float(sizes["of"][s]))[:count])  # noqa: E731
        pivots, asked = largest(images, image_pivots), largest(text, text_pivots)
        stay, left = set(pivots), [row for row in images if row not in pivots]
        unit = normalize(rows.hidden, dim=-1)
        for pivot in pivots + asked:
            ranked = sorted(left, key=lambda row: float(unit[row] @ unit[pivot]))
            stay |= set(ranked[: int(len(images) * ratio / (image_pivots + text_pivots))])
            left = [row for row in left if row not in stay]
        others = (~rows.visual[rows.slots]).nonzero().flatten().tolist()
        return torch.tensor(sorted([*others, *stay]))

    return drop


@pytest.mark.parametrize(("pivots", "ratio"), [((1, 1), 0.5), ((2, 2), 0.25), ((2, 1), 0.4), ((1, 0), 0.25)])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_dart_is_the_released_rule(family, pivots, ratio):
    inputs = [prompt(family, 2, 3, seed=7), prompt(family, 1, 9, seed=5), prompt(family, 1, 4, seed=6)]
    model = build(family)
    with vlmattn.applied(model, DART(keep_ratio=ratio, image_pivots=pivots[0], text_pivots=pivots[1])):
        logits = generate(model, left_padded(inputs))
    for row, one in enumerate(inputs):
        expected, _ = generated_by_hand(model, one, NEW, released(2, ratio, *pivots), False, PLACEHOLDERS)
        assert float((logits[row] - expected).abs().max()) < TOLERANCE
        bare = generate(model, one)[0]
        assert float((logits[row] - bare).abs().max()) > 0.01


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next", "qwen3_vl"])
def test_dropped_as_hidden(family):
    tiny = ZOO[family]
    together, model = padded(tiny, [tiny.prompt(2, 3, seed=7), tiny.prompt(1, 9, seed=5)]), tiny.build()
    method = DART(keep_ratio=0.4, image_pivots=1, text_pivots=1)
    if family == "qwen3_vl":  # features come in until layer 2
        method = DART(layer=3, keep_ratio=0.4, image_pivots=1, text_pivots=1)
    found = []
    for mode in ("drop", "mask"):
        with vlmattn.applied(model, Recipe.of(method, mode=mode)):
            found.append(generate(model, together))
    assert float((found[0] - found[1]).abs().max()) < TOLERANCE
    assert float((found[0] - generate(model, together)).abs().max()) > 0.01


def test_how_many_stay():
    assert DART().kept(2, (576,), 576) == 124  # released: 4 pivots, 8 times int(576 * .222 / 8)
    assert Recipe.of("dart@1.0").pruning[0].kept(2, (16,), 16) >= 16
    with pytest.raises(OptionError):
        vlmattn.wrap(build("llava"), DART(layer=0))
