"""HiRED: a budget for each tile of LLaVA-NeXT, against the released rule on the tower's own tiles."""

from __future__ import annotations

import pytest
import torch
from numerics import TINY_MODEL, bound
from tiny import build, prompt
from tiny import generate as unrestricted
from transformers import DynamicCache
from zoo import IMG, ZOO, padded

import vlmattn
from vlmattn import Recipe
from vlmattn.errors import UnsupportedError
from vlmattn.interventions.pruning.hired import HiRED
from vlmattn.models import find_family
from vlmattn.models.llava_next import features_of
from vlmattn.request import Image

pytestmark = pytest.mark.usefixtures("no_grad")
TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)
NEXT = ZOO["llava_next"]


def answer(model, inputs):
    return unrestricted(model, inputs, 3, suppress_tokens=[IMG])


def tower_of(model, inputs):
    """Attention of the CLS token in each layer, sum over heads, of all tiles that are there: layer -> [tiles, patches]."""
    tower, counts = model.model.vision_tower, list(map(len, features_of(model, inputs["image_sizes"])))
    pixels = torch.cat([image[:count] for image, count in zip(inputs["pixel_values"], counts, strict=True)])
    tower.set_attn_implementation("eager")
    found = tower(pixels, output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    return [layer[:, :, 0, 1:].sum(1) for layer in found], counts


def released(first, last, share, whole):
    """Masks of the tiles of one image, by the released rule; [tiles, patches]."""
    tiles, patches = last.shape
    total = int(tiles * patches * share)
    small = min(int(total * whole), patches)
    rest = min(total - small, (tiles - 1) * patches)
    keep = torch.zeros_like(last, dtype=torch.bool)
    keep[0, last[0].topk(small).indices] = True
    looked = torch.zeros(patches)
    looked[first[0].topk(int(patches * (1 - whole))).indices] = 1
    counts = looked.reshape(tiles - 1, -1).sum(-1)
    for tile, budget in enumerate((counts / counts.sum() * rest).int().tolist(), 1):
        keep[tile, last[tile].topk(min(budget, patches)).indices] = True
    return keep


def packed(model, size, masks):
    """The masks at the tokens of the prompt, without newlines."""
    values = model.model.pack_image_features(
        [masks[..., None].float()], size[None], vision_feature_select_strategy="default", image_newline=torch.zeros(1)
    )[0][0]
    return values[:, 0].bool().nonzero().flatten().tolist()


def kept_of(model, inputs):
    """Numbers of the tokens of each image that reach the last layer."""
    cache = DynamicCache()
    model(**inputs, past_key_values=cache)
    request = cache._vlmattn_request
    numbers = request.images(inputs["input_ids"].shape[1], torch.device("cpu"))[0]
    slots = request.maps[-1].slots[0].tolist()
    images = [(numbers == image).nonzero().flatten().tolist() for image in range(int(numbers.max()) + 1)]
    return [[n for n, slot in enumerate(image) if slot in slots] for image in images]


@pytest.mark.parametrize(("share", "whole"), [(0.4, 0.5), (0.5, 0.25), (0.2, 0.5)])
def test_budgets_of_tiles_are_the_released_ones(share, whole):
    model = NEXT.build()
    model.config.image_grid_pinpoints = [[32, 32]]
    for parameter in model.model.vision_tower.parameters():  # attention far from uniform
        parameter.data *= 3 if parameter.ndim > 1 else 1
    inputs = NEXT.prompt(1, 3, seed=7).inputs
    inputs["image_sizes"] = torch.tensor([[32, 32]])  # four whole tiles, no padding
    inputs["pixel_values"] = torch.randn(1, 5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    tokens = 16 + 8 * 9
    words = inputs["input_ids"][0][inputs["input_ids"][0] != IMG].tolist()
    ids = torch.tensor([[*words[:3], *[IMG] * tokens, *words[3:]]])
    inputs |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    layers, counts = tower_of(model, inputs)
    assert counts == [5]
    vlmattn.wrap(model, Recipe.of("hired", keep_ratio=share, whole=whole))
    expected = packed(model, inputs["image_sizes"][0], released(layers[0], layers[-2], share, whole))
    assert kept_of(model, inputs) == [expected]


def test_the_first_layer_shares_out_and_the_last_but_one_chooses():
    generator = torch.Generator().manual_seed(5)
    first, last = (torch.rand(5, 16, generator=generator) for _ in range(2))
    tiles = torch.arange(5).repeat_interleave(16)
    seen = {0: first.flatten()[None], 22: last.flatten()[None]}
    image = Image(seen, {}, torch.zeros(80, 4), None, lambda features: features, tiles)
    for share, whole in ((0.2, 0.5), (0.5, 0.5), (0.6, 0.25)):
        found = HiRED(keep_ratio=share, whole=whole).of_image(image)
        assert torch.equal(found.view(5, 16), released(first, last, share, whole))


@pytest.mark.parametrize("method", ["hired@0.5", "fastervlm@0.5", "vispruner@0.5", "visionzip_positions"])
def test_dropped_as_hidden_and_alone_as_in_a_batch(method):
    prompts = [NEXT.prompt(2, 3, seed=7), NEXT.prompt(1, 9, seed=5)]
    model, together, found = NEXT.build(), padded(NEXT, prompts), {}
    for mode in ("drop", "mask"):
        with vlmattn.applied(model, Recipe.of(method, mode=mode)):
            found[mode] = answer(model, together)
            alone = [answer(model, one.inputs)[0] for one in prompts]
    for row in range(2):
        assert float((found["drop"][row] - alone[row]).abs().max()) < TOLERANCE
    assert float((found["drop"] - found["mask"]).abs().max()) < TOLERANCE
    assert float((found["drop"] - answer(model, together)).abs().max()) > 0.01


def test_newlines_have_no_tile():
    model, one = NEXT.build(), NEXT.prompt(2).inputs
    numbers = find_family(model).tile_numbers(model, one)
    assert sum(map(len, numbers)) == int((one["input_ids"] == IMG).sum())
    for image in numbers:
        assert image[:16].tolist() == [0] * 16
        assert -1 in image
        assert int(image.max()) > 0


def test_a_picture_that_is_not_cut_keeps_the_most_attended():
    model, inputs = build("llava"), prompt("llava", 2)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    seen = tower(inputs["pixel_values"], output_attentions=True).attentions[-2][:, :, 0, 1:].sum(1)
    tower.set_attn_implementation("sdpa")
    cache = DynamicCache()
    with vlmattn.applied(model, "hired@0.25"):
        model(**inputs, past_key_values=cache)
    slots = cache._vlmattn_request.maps[-1].slots[0].tolist()
    images = (inputs["input_ids"][0] == IMG).nonzero().flatten().split(16)
    expected = [int(image[n]) for image, row in zip(images, seen, strict=True) for n in row.topk(4).indices]
    assert [slot for slot in slots if slot in torch.cat(images).tolist()] == sorted(expected)


def test_what_hired_keeps_is_not_known_ahead():
    with pytest.raises(UnsupportedError, match="known only once the picture is read"):
        vlmattn.cost(build("llava"), prompt("llava"), "hired")
