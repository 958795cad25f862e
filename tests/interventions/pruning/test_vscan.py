"""VScan's two stages, against the released rules on lists and on a decoder run by hand."""

from __future__ import annotations

import pytest
import torch
from numerics import TINY_MODEL, bound
from rows_by_hand import best_rows, generated_by_hand
from tiny import IMAGE_TOKEN, build, left_padded, prompt
from tiny import generate as unrestricted
from torch.nn.functional import normalize
from zoo import ZOO, padded

import vlmattn
from vlmattn import Recipe
from vlmattn.errors import OptionError
from vlmattn.interventions.pruning.vscan import VScan
from vlmattn.request import Image

pytestmark = pytest.mark.usefixtures("no_grad")
TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)
NEW = 3
PLACEHOLDERS = [96, 97, 98, 99]


def generate(model, inputs):
    return unrestricted(model, inputs, NEW, suppress_tokens=PLACEHOLDERS)


def scanned(shallow, deep, count, windows):
    """Tokens of a square image that stay, by the released rule."""
    side = round(len(deep) ** 0.5)
    wide, each, taken = side // windows, int(count * 0.5) // windows**2, []
    for i in range(windows):
        for j in range(windows):
            window = [y * side + x for y in range(i * wide, (i + 1) * wide) for x in range(j * wide, (j + 1) * wide)]
            taken += sorted(window, key=lambda token: -float(shallow[token]))[:each]
    others = [token for token in range(len(deep)) if token not in taken]
    return sorted(taken + sorted(others, key=lambda token: -float(deep[token]))[: count - len(taken)])


@pytest.mark.parametrize("windows", [1, 2, 4])
@pytest.mark.parametrize("count", [16, 32, 96])
def test_windows_and_the_whole(windows, count):
    generator = torch.Generator().manual_seed(count)
    shallow, deep = torch.rand(2, 144, generator=generator)
    image = Image({5: shallow[None], 22: deep[None]}, {}, torch.zeros(144, 2), None, lambda found: found)
    found = VScan(keep_tokens=count, windows=windows).of_image(image)
    assert found.nonzero().flatten().tolist() == scanned(shallow, deep, count, windows)
    assert int(found.sum()) == count


def attended(model, pixels):
    """Mean attention of the CLS token in the last but one layer of the tower."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    found = tower(pixels, output_attentions=True).attentions[-2][:, :, 0, 1:].mean(1)
    tower.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize(("share", "middle"), [(0.5, 0.5), (0.75, 0.25)])
def test_both_stages_by_hand(share, middle):
    model, inputs = build("llava"), [prompt("llava", 2, 3, seed=7), prompt("llava", 1, 9, seed=5)]
    method = VScan(keep_ratio=share, middle="2", middle_ratio=middle, windows=2)
    with vlmattn.applied(model, method):
        logits = generate(model, left_padded(inputs))
    for number, one in enumerate(inputs):
        slots = (one["input_ids"][0] == IMAGE_TOKEN).nonzero().flatten().split(16)
        picked = [scanned(seen, seen, round(share * 16), 2) for seen in attended(model, one["pixel_values"])]

        def drop(rows, index, slots=slots, picked=picked):
            if index == 0:
                gone = set()
                for image, stay in zip(slots, picked, strict=True):
                    tokens, unit = rows.hidden[image], normalize(rows.hidden[image], dim=-1)
                    others = [token for token in range(16) if token not in stay]
                    goes = {token: max(stay, key=lambda s: float(unit[token] @ unit[s])) for token in others}
                    for token in stay:
                        mine = [token, *(other for other in others if goes[other] == token)]
                        rows.hidden[image[token]] = tokens[mine].mean(0)
                    gone |= {int(image[token]) for token in others}
                return torch.tensor([slot for slot in range(len(rows.slots)) if slot not in gone])
            if index == 2:
                weights, _ = rows.attention(rows.decoder.layers[2])
                return best_rows(rows, weights[:, rows.last].mean(0), round(middle * len(rows.image_rows)))
            return None

        expected, _ = generated_by_hand(model, one, NEW, drop, False, PLACEHOLDERS)
        assert float((logits[number] - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
def test_dropped_as_hidden_and_alone_as_in_a_batch(family):
    tiny = ZOO[family]
    prompts, model, found = [tiny.prompt(2, 3, seed=7), tiny.prompt(1, 9, seed=5)], tiny.build(), {}
    for mode in ("drop", "mask"):
        with vlmattn.applied(model, Recipe.of("vscan@0.5", mode=mode)):
            found[mode] = generate(model, padded(tiny, prompts))
            alone = [generate(model, one.inputs)[0] for one in prompts]
    assert float((found["drop"] - found["mask"]).abs().max()) < TOLERANCE
    for row in range(2):
        assert float((found["drop"][row] - alone[row]).abs().max()) < TOLERANCE
    assert float((found["drop"] - generate(model, padded(tiny, prompts))).abs().max()) > 0.01


def test_what_it_costs():
    model, inputs = build("llava"), prompt("llava")
    found = vlmattn.cost(model, inputs, Recipe.of("vscan@0.5", middle="2", middle_ratio=0.5), measure=True)
    assert found.edited.image_tokens == (8, 8, 4, 4)
    assert found.edited.kv_bytes == found.edited.measured_kv_bytes


def test_what_is_refused():
    with pytest.raises(OptionError, match="one layer"):
        VScan(middle="1:3")
    with pytest.raises(OptionError, match="behind the first"):
        vlmattn.wrap(build("llava"), VScan(middle="0"))
    with pytest.raises(OptionError, match="adds image features"):
        vlmattn.wrap(build("qwen3_vl"), "vscan")
