"""Methods that choose before the first layer: the same choice made by hand, only hidden, in batches, on many families."""

from __future__ import annotations

import functools

import numpy
import pytest
import torch
from numerics import TINY_MODEL, bound
from rows_by_hand import decoder_inputs, generated_by_hand
from tiny import IMAGE_TOKEN, TOKENS_PER_IMAGE, build, left_padded, prompt
from tiny import generate as unrestricted
from torch.nn.functional import normalize
from transformers import DynamicCache
from zoo import ZOO, padded

import vlmattn
from vlmattn import Recipe
from vlmattn.errors import OptionError, UnsupportedError
from vlmattn.interventions.pruning import choices

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)
NEW = 3
PLACEHOLDERS = [96, 97, 98, 99]
CONTROLS = ("random", "grid", "first", "last", "pool")
METHODS = (*CONTROLS, "divprune", "cdpruner", "cdpruner_negative", "vispruner", "fastervlm")
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


def most_apart(image, count, asked):
    """DivPrune, one token after another."""
    unit = normalize(image, dim=-1)
    far = lambda a, b: 1 - float(unit[a] @ unit[b])  # noqa: E731
    every = range(len(image))
    taken = [max(every, key=lambda a: min(far(a, b) for b in every if b != a))]
    while len(taken) < count:
        taken.append(max((a for a in every if a not in taken), key=lambda a: min(far(a, b) for b in taken)))
    return taken


def conditional(image, count, asked, sign=1):
    """CDPruner, by determinants."""
    unit = normalize(image.double(), dim=-1)
    relevance = sign * (unit @ asked.double())
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = relevance[:, None] * (unit @ unit.T) * relevance[None]
    taken = []
    for _ in range(count):
        left = [token for token in range(len(image)) if token not in taken]
        taken.append(max(left, key=lambda a: float(torch.linalg.det(kernel[[*taken, a]][:, [*taken, a]]))))
    return taken


BY_HAND = {
    "divprune": most_apart,
    "cdpruner": conditional,
    "cdpruner_negative": lambda image, count, asked: conditional(image, count, asked, -1),
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

        def drop(rows, index, stay=stay, content=content):
            if index:
                return None
            for slot, value in content.items():
                rows.hidden[slot] = value
            generated = range(rows.prompt, len(rows.slots))
            return torch.tensor(sorted(stay) + list(generated))

        expected, _ = generated_by_hand(model, one, NEW, drop, False, PLACEHOLDERS)
        assert float((logits[row] - expected).abs().max()) < TOLERANCE


def three(family):
    return [prompt(family, 2, 3, seed=7), prompt(family, 1, 9, seed=5), prompt(family, 1, 4, seed=6)]


@pytest.mark.parametrize("method", BY_HAND)
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
    share = 0.25 if family == "llava_next" else 0.5  # its newlines are all the same, and come when others are rare
    with vlmattn.applied(model, f"{method}@{share}"):
        dropped = generate(model, together)
        layers = model.vlmattn.report()["image_tokens"]["per_layer"]
        for row, one in enumerate(alone):
            assert float((generate(model, one)[0] - dropped[row]).abs().max()) < TOLERANCE
    assert layers[-1] <= 0.6 * layers[0] or len(set(layers)) == 1
    with vlmattn.applied(model, Recipe.of(f"{method}@{share}", mode="mask")):
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


# --- by what the tower saw


def tower_of(model, inputs):
    """Of each image: mean attention of the CLS token in the last but one layer, and what the tower says of the patches."""
    tower = model.model.vision_tower
    hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    layer = [module for module in tower.modules() if hasattr(module, "self_attn")][-2]
    attn, entering = layer.self_attn, layer.layer_norm1(hidden[-3])
    query, key = (
        part(entering).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (attn.q_proj, attn.k_proj)
    )
    seen = (query[:, :, :1] @ key.transpose(2, 3) * attn.scale).softmax(-1)[:, :, 0, 1:].mean(1)
    return list(zip(seen, hidden[-2][:, 1:], strict=True))


def vispruner(seen, features, count, important, at_once=8):
    """The released rule on lists."""
    order = sorted(range(len(seen)), key=lambda token: -float(seen[token]))
    first = int(count * important)
    taken, rest, want = order[:first], order[first:], count - first
    unit = normalize(features, dim=-1)
    while want and (gone := min(at_once, len(rest) - want)) > 0:
        even, odd = rest[::2], rest[1::2]
        double = [max(float(unit[a] @ unit[b]) for b in odd) for a in even]
        ranks = sorted(range(len(even)), key=lambda n: -double[n])[gone:]
        rest = [even[n] for n in ranks] + odd
    return sorted(taken + (rest if want else []))


def kept_by(method, inputs, **options):
    """Numbers of the tokens of each image that reach the last layer of the llava."""
    model = model_of("llava")
    with vlmattn.applied(model, Recipe.of(method, **options)):
        cache = DynamicCache()
        model(**inputs, past_key_values=cache)
        request = cache._vlmattn_request
    slots = request.maps[-1].slots[0]
    visual = (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero().flatten()
    return [
        [n for n, slot in enumerate(image.tolist()) if slot in slots.tolist()]
        for image in visual.split(TOKENS_PER_IMAGE["llava"])
    ]


@pytest.mark.parametrize(("share", "important"), [(0.5, 0.5), (0.25, 0.5), (0.5, 0.0), (0.25, 1.0), (0.75, 0.25)])
def test_vispruner_is_the_released_rule(share, important):
    inputs = prompt("llava", 2, 3, seed=7)
    expected = [
        vispruner(seen, said, round(share * len(seen)), important, at_once=2)
        for seen, said in tower_of(model_of("llava"), inputs)
    ]
    assert kept_by("vispruner", inputs, keep_ratio=share, important=important, at_once=2) == expected


def test_fastervlm_is_all_by_attention():
    inputs = prompt("llava", 1, 3, seed=7)
    ((seen, _),) = tower_of(model_of("llava"), inputs)
    assert kept_by("fastervlm", inputs, keep_ratio=0.25) == [sorted(seen.topk(4).indices.tolist())]


# --- PruMerge


def prumerge(model, inputs, ratio, spread, near):
    """Which tokens of each image stay, and what they become in the language model, by the released rule with the mean over heads."""
    tower = model.model.vision_tower
    hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    layer = [module for module in tower.modules() if hasattr(module, "self_attn")][-1]
    attn, entering = layer.self_attn, layer.layer_norm1(hidden[-2])
    query, key = (
        part(entering).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (attn.q_proj, attn.k_proj)
    )
    attended = (query[:, :, :1] @ key.transpose(2, 3) * attn.scale).softmax(-1)[:, :, 0, 1:].mean(1)
    found = []
    for seen, keys, said in zip(attended, key.mean(1)[:, 1:], hidden[-2][:, 1:], strict=True):
        count, share = len(seen), ratio
        if not share:
            low, high = numpy.percentile(seen.numpy(), [25, 75])
            share = float((seen > high + 1.5 * (high - low)).sum()) / count
        chosen = seen.topk(max(int(count * share), 1)).indices.tolist()
        if spread:
            step = int(1 / max(share, 1 / count))
            chosen += [token for token in range(int(step / 6), count - 1, max(int(step / 3), 1)) if token not in chosen]
        unit, content = normalize(keys, dim=-1), {}
        for token in chosen:
            others = [other for other in range(count) if other != token]
            nearest = sorted(others, key=lambda other: -float(unit[token] @ unit[other]))[:near]
            content[token] = said[token] + sum(seen[other] * said[other] for other in nearest)
        gone = [token for token in range(count) if token not in chosen]
        content[gone[-1]] = sum(seen[other] * said[other] for other in gone)
        found.append({token: model.model.multi_modal_projector(value) for token, value in content.items()})
    return found


@pytest.mark.parametrize("near", [2, 32])
@pytest.mark.parametrize(("ratio", "spread"), [(0.0, False), (0.25, False), (0.125, True), (0.0, True)])
def test_prumerge_is_the_released_rule(ratio, spread, near):
    inputs, model = [prompt("llava", 2, 3, seed=7), prompt("llava", 1, 9, seed=5)], model_of("llava")
    with vlmattn.applied(model, Recipe.of("prumerge", keep_ratio=ratio, spread=spread, near=near)):
        logits = generate(model, left_padded(inputs))
    for row, one in enumerate(inputs):
        visual = one["input_ids"][0] == IMAGE_TOKEN
        slots = visual.nonzero().flatten().split(16)
        merged = prumerge(model, one, ratio, spread, near)
        content = {
            int(image[token]): value for image, of in zip(slots, merged, strict=True) for token, value in of.items()
        }
        stay = sorted([*(~visual).nonzero().flatten().tolist(), *content])

        def drop(rows, index, stay=stay, content=content):
            if index:
                return None
            for slot, value in content.items():
                rows.hidden[slot] = value
            return torch.tensor(stay + list(range(rows.prompt, len(rows.slots))))

        expected, _ = generated_by_hand(model, one, NEW, drop, False, PLACEHOLDERS)
        assert float((logits[row] - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prumerge_hides_what_it_drops(family):
    model, alone, together = batch_of(family)
    found = []
    for mode in ("drop", "mask"):
        with vlmattn.applied(model, Recipe.of("prumerge_plus@0.125", mode=mode)):
            found.append(generate(model, together))
    assert float((found[0] - found[1]).abs().max()) < TOLERANCE
    assert float((found[0] - generate(model, together)).abs().max()) > 0.01
    with vlmattn.applied(model, "prumerge"):
        both = generate(model, together)
        for row, one in enumerate(alone):
            assert float((generate(model, one)[0] - both[row]).abs().max()) < TOLERANCE


def test_what_prumerge_keeps_is_not_known_ahead():
    with pytest.raises(UnsupportedError, match="known only once the picture is read"):
        vlmattn.cost(model_of("llava"), prompt("llava"), "prumerge")
    assert vlmattn.cost(model_of("llava"), prompt("llava"), "prumerge@0.25").edited.image_tokens[0] == 5
