"""Methods that choose before the first layer: the same choice made by hand, only hidden, in batches, on many families."""

from __future__ import annotations

import functools

import pytest
import torch
from numerics import TINY_MODEL, bound
from rows_by_hand import decoder_inputs, generated_by_hand
from tiny import IMAGE_TOKEN, TOKENS_PER_IMAGE, build, left_padded, prompt
from tiny import generate as unrestricted
from torch.nn.functional import normalize
from zoo import ZOO, padded

import vlmattn
from vlmattn import Recipe
from vlmattn.errors import OptionError
from vlmattn.interventions.pruning import choices

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)
NEW = 3
PLACEHOLDERS = [96, 97, 98, 99]
CONTROLS = ("random", "grid", "first", "last", "pool")
METHODS = CONTROLS
FAMILIES = ("llava", "qwen2_5_vl", "llava_next", "qwen3_vl")


@functools.cache
def model_of(family):
    return build(family)


def generate(model, inputs, **options):
    return unrestricted(model, inputs, NEW, suppress_tokens=PLACEHOLDERS, **options)


# --- what each keeps, by hand: indices of one image's tokens [n, hidden], and what becomes of these


def lot(image, count, asked):
    order = torch.rand(len(image), generator=torch.Generator().manual_seed(0)).argsort(descending=True)
    return order[:count].tolist()


def places(image, count, asked):
    return choices.grid(len(image), count, image.device).nonzero().flatten().tolist()


BY_HAND = {
    "random": lot,
    "grid": places,
    "first": lambda image, count, asked: list(range(count)),
    "last": lambda image, count, asked: list(range(len(image) - count, len(image))),
    "pool": places,
}


def pooled(image, stays):
    """Each place becomes the mean of the tokens nearest to it."""
    side, found = round(len(image) ** 0.5), image.clone()
    for place in stays:
        mine = [
            token
            for token in range(len(image))
            if min(stays, key=lambda s: (token // side - s // side) ** 2 + (token % side - s % side) ** 2) == place
        ]
        found[place] = image[mine].mean(0)
    return found


def check_by_hand(family, method, share, inputs):
    model = model_of(family)
    with vlmattn.applied(model, f"{method}@{share}"):
        logits = generate(model, left_padded(inputs))
    for row, one in enumerate(inputs):
        embeds, _ = decoder_inputs(model, one)
        visual = one["input_ids"][0] == IMAGE_TOKEN
        behind = ~visual & (visual.cumsum(0) > 0)
        asked = normalize(embeds[behind], dim=-1).mean(0)
        stay = (~visual).nonzero().flatten().tolist()
        content = {}
        for slots in visual.nonzero().flatten().split(TOKENS_PER_IMAGE[family]):
            image = embeds[slots]
            found = BY_HAND[method](image, round(share * len(slots)), asked)
            stay += slots[torch.tensor(found)].tolist()
            if method == "pool":
                content |= dict(zip(slots.tolist(), pooled(image, found), strict=True))

        def drop(rows, index, stay=stay, content=content, length=len(visual)):
            if index:
                return None
            for slot, value in content.items():
                rows.hidden[slot] = value
            generated = range(length, len(rows.slots))
            return torch.tensor(sorted(stay) + list(generated))

        expected, _ = generated_by_hand(model, one, NEW, drop, False, PLACEHOLDERS)
        assert float((logits[row] - expected).abs().max()) < TOLERANCE


def three(family):
    return [prompt(family, 2, 3, seed=7), prompt(family, 1, 9, seed=5), prompt(family, 1, 4, seed=6)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_what_stays_is_what_stays_by_hand(family, method, share):
    check_by_hand(family, method, share, three(family))


# --- dropped as hidden, in batches, on families


def batch_of(family):
    tiny = ZOO[family]
    prompts = [tiny.prompt(2, 3, seed=7), tiny.prompt(1, 9, seed=5)]
    return tiny.build(), [one.inputs for one in prompts], padded(tiny, prompts)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_tokens_are_as_hidden_ones_and_a_batch_as_each_alone(family, method):
    model, alone, together = batch_of(family)
    if method == "pool" and family == "qwen3_vl":
        with pytest.raises(OptionError, match="adds image features"):
            vlmattn.wrap(model, method)
        return
    bare = generate(model, together)
    with vlmattn.applied(model, f"{method}@0.5"):
        dropped = generate(model, together)
        layers = model.vlmattn.report()["image_tokens"]["per_layer"]
        for row, one in enumerate(alone):
            assert float((generate(model, one)[0] - dropped[row]).abs().max()) < TOLERANCE
    assert layers[-1] <= 0.6 * layers[0] or len(set(layers)) == 1
    with vlmattn.applied(model, Recipe.of(f"{method}@0.5", mode="mask")):
        hidden = generate(model, together)
    assert float((dropped - hidden).abs().max()) < TOLERANCE
    assert float((dropped - bare).abs().max()) > 0.01


def test_another_seed_is_another_lot():
    model, inputs = model_of("llava"), prompt("llava")
    found = []
    for seed in (0, 1):
        with vlmattn.applied(model, Recipe.of("random", seed=seed)):
            found.append(generate(model, inputs))
    assert float((found[0] - found[1]).abs().max()) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_tokens_of_each_image_by_number(method):
    model, inputs = model_of("llava"), prompt("llava", 2)
    with vlmattn.applied(model, Recipe.of(method, keep_tokens=3)):
        generate(model, inputs)
        assert model.vlmattn.report()["image_tokens"]["per_layer"][-1] == 6
