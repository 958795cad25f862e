"""Dropping image tokens from a layer on: against a decoder run by hand, against the same choice that is only hidden, and by count."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from choices import Choices
from numerics import TINY_MODEL, bound
from rows_by_hand import fastv, generated_by_hand, longer, pyramiddrop
from tiny import FAMILIES, IMAGE_TOKEN, TEXT, TOKENS_PER_IMAGE, build, left_padded, prompt
from tiny import generate as unrestricted
from torch import Tensor
from transformers import DynamicCache, LlavaConfig, PreTrainedModel, StaticCache

import vlmattn
from vlmattn import Recipe
from vlmattn.interventions.pruning import FastV, Pruning, PyramidDrop
from vlmattn.models import find_family

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)  # logits of a random model are smaller
ACTS = 0.05  # logits are about 1
NEW = 4
PLACEHOLDERS = [96, 97, 98, 99]
MODELS = (*FAMILIES, "llava_qwen2")
METHODS = ("fastv", "fastv_quarter", "pyramid", "pyramid_compact")
model_matrix = pytest.mark.parametrize("name", MODELS)
method_matrix = pytest.mark.parametrize("method", METHODS)
attn_matrix = pytest.mark.parametrize("attn", ["sdpa", "eager"])


def family_of(name: str) -> str:
    return "llava" if name == "llava_qwen2" else name


def fresh(name: str, attn: str = "sdpa") -> PreTrainedModel:
    config = None
    if name == "llava_qwen2":
        vision = build("llava").config.vision_config
        text = dict(model_type="qwen2", **TEXT)
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, image_seq_length=16)
    model = build(family_of(name), attn, config=config)
    model.lm_head.weight.data *= 8 if name == "qwen3_vl" else 4  # there two layers at most have fewer tokens
    return model


@functools.cache
def model_of(name: str, attn: str = "sdpa") -> PreTrainedModel:
    return fresh(name, attn)


def method_of(name: str, method: str) -> Pruning:
    """The method, from the first layer on whose input may lack tokens."""
    model = model_of(name)
    sizes = find_family(model).anatomy(model)
    first = max(1, sizes.deepstack)
    if method == "fastv":
        return FastV(layer=first)
    if method == "fastv_quarter":
        return FastV(layer=first + 1, keep_ratio=0.25)
    if method == "pyramid_last":  # the last of METHODS that the model can have
        method = "pyramid" if sizes.axes > 1 else "pyramid_compact"
    if method == "pyramid_compact" and sizes.axes > 1:
        pytest.skip("refused: tokens with several positions")
    layers = list(range(first, sizes.layers))[-3:]
    return PyramidDrop(
        layers=",".join(map(str, layers)),
        keep_ratios=(0.75, 0.5, 0.25)[-len(layers) :],
        positions="compact" if method == "pyramid_compact" else "original",
    )


def generate(model: PreTrainedModel, inputs: dict, new: int = NEW, **options) -> Tensor:
    return unrestricted(model, inputs, new, **{"suppress_tokens": PLACEHOLDERS, **options})


def answer(model: PreTrainedModel, inputs: dict, new: int = NEW, **options):
    """All that generate() says."""
    return model.generate(
        **inputs, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=PLACEHOLDERS, **{"do_sample": False, **options},
    )  # fmt: skip


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def three(name: str) -> list[dict[str, Tensor]]:
    """Prompts of different lengths; the first has two images."""
    family = family_of(name)
    return [prompt(family, 2, 3, seed=7), prompt(family, 1, 9, seed=5), prompt(family, 1, 4, seed=6)]


def without_image(name: str, words: int = 5) -> dict[str, Tensor]:
    ids = torch.arange(20, 20 + words)[None]
    found = dict(prompt(family_of(name)), input_ids=ids, attention_mask=torch.ones_like(ids))
    for key in found.keys() & {"pixel_values", "image_grid_thw"}:
        found[key] = found[key][:0]
    return found | {"mm_token_type_ids": torch.zeros_like(ids).int()} if "mm_token_type_ids" in found else found


# --- against a decoder run by hand

BY_HAND = ("llava", "qwen2_5_vl", "llava_qwen2")
hand_matrix = pytest.mark.parametrize("name", BY_HAND)


def check_by_hand(name: str, attn: str, method: Pruning, drop: Callable, inputs: list[dict[str, Tensor]]) -> None:
    """Each prompt by hand against all of them in a left-padded batch; then the bare model, which says something else."""
    model = model_of(name, attn)
    with vlmattn.applied(model, method):
        out = answer(model, left_padded(inputs))
    logits, tokens = torch.stack(out.logits, 1), out.sequences[:, -NEW:]
    for row, one in enumerate(inputs):
        found, chosen = generated_by_hand(model_of(name), one, NEW, drop, method.compact, PLACEHOLDERS)
        assert tokens[row].tolist() == chosen
        assert apart(logits[row], found) < TOLERANCE
        bare, _ = generated_by_hand(model_of(name), one, NEW, lambda rows, layer: None, False, PLACEHOLDERS)
        assert apart(bare, generate(model_of(name), one)[0]) < TOLERANCE, "the premise: by hand is right"
        assert apart(logits[row], bare) > ACTS


@pytest.mark.parametrize(("layer", "ratio"), [(1, 0.5), (2, 0.25), (3, 0.5), (1, 0.0)])
@attn_matrix
@hand_matrix
def test_fastv_is_what_it_is_by_hand(name, attn, layer, ratio):
    check_by_hand(name, attn, FastV(layer=layer, keep_ratio=ratio), fastv(layer, ratio), three(name))


@pytest.mark.parametrize("positions", ["original", "compact"])
@attn_matrix
@hand_matrix
def test_pyramiddrop_is_what_it_is_by_hand(name, attn, positions):
    if positions == "compact" and name == "qwen2_5_vl":
        pytest.skip("refused: tokens with several positions")
    method = PyramidDrop(layers="1,2,3", keep_ratios=(0.75, 0.5, 0.25), positions=positions)
    check_by_hand(name, attn, method, pyramiddrop([1, 2, 3], [0.75, 0.5, 0.25]), three(name))


# --- against the same choice that is only hidden


def greedy(model: PreTrainedModel, name: str) -> list[Tensor]:
    return [generate(model, prompt(family_of(name), 2))]


def ragged(model: PreTrainedModel, name: str) -> list[Tensor]:
    return [generate(model, left_padded(three(name)))]


def one_without_image(model: PreTrainedModel, name: str) -> list[Tensor]:
    """A text that is short, and one that is longer than the others once they are pruned."""
    rows = [prompt(family_of(name), 2), without_image(name), without_image(name, words=40)]
    found = generate(model, left_padded(rows))
    assert apart(found[1:], generate(model_of(name), left_padded(rows))[1:]) < TOLERANCE, "nothing to drop in a text"
    return [found[0]]


def static(model: PreTrainedModel, name: str) -> list[Tensor]:
    found = []
    for inputs in (prompt(family_of(name)), left_padded(three(name))):
        found.append(generate(model, inputs, cache_implementation="static", disable_compile=True))
        roomy = StaticCache(config=model.config.get_text_config(), max_cache_len=150)
        found.append(generate(model, inputs, past_key_values=roomy, disable_compile=True))
        assert apart(found[-1], found[-2]) < TOLERANCE
    return found


def recomputed(model: PreTrainedModel, name: str) -> list[Tensor]:
    found = [generate(model, left_padded(three(name)), use_cache=False)]
    assert apart(found[0], ragged(model, name)[0]) < TOLERANCE
    return found


def beams(model: PreTrainedModel, name: str) -> list[Tensor]:
    found = []
    for count in (2, 3):
        out = answer(model, left_padded(three(name)), num_beams=count, output_scores=True, length_penalty=0.0)
        found += [out.sequences[:, -NEW:], out.sequences_scores, torch.stack(out.logits)]
    return found


def sampled(model: PreTrainedModel, name: str) -> list[Tensor]:
    torch.manual_seed(3)
    out = answer(model, left_padded(three(name)), do_sample=True, num_return_sequences=3)
    return [out.sequences[:, -NEW:], torch.stack(out.logits)]


def drafted(model: PreTrainedModel, name: str) -> list[Tensor]:
    """Prompt lookup: several tokens at once, wrong ones are cut off; already the first forward has drafts."""
    found = []
    for before in (0, 2):
        inputs = longer(prompt(family_of(name)), [5, 6, 7, 8] * 4 + [5, 6])
        for key in inputs.keys() & {"input_ids", "attention_mask", "mm_token_type_ids"}:
            inputs[key] = torch.nn.functional.pad(inputs[key], (before, 0))
        plain = answer(model, inputs, new=12)
        for few in (3, 8):
            out = answer(model, inputs, new=12, prompt_lookup_num_tokens=few)
            assert torch.equal(out.sequences, plain.sequences)
            assert apart(torch.stack(out.logits), torch.stack(plain.logits)) < TOLERANCE
        found.append(torch.stack(plain.logits))
    return found


def second_turn_of_text(model: PreTrainedModel, name: str) -> list[Tensor]:
    """Through generate(), with generated tokens between the turns; another turn has as many tokens as the first prompt."""
    found = []
    for prompts, words in ((three(name), 3), (three(name), 0), (three(name)[:1], 3)):
        inputs = left_padded(prompts)
        words = words or inputs["input_ids"].shape[1] - 1
        first = answer(model, inputs)
        told = [*first.sequences[:, inputs["input_ids"].shape[1] :].unbind(1)]
        ids = torch.cat([first.sequences, torch.arange(20, 20 + words).expand(len(told[0]), -1)], 1)
        more = dict(input_ids=ids, past_key_values=first.past_key_values)
        mask = inputs["attention_mask"]
        more["attention_mask"] = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        if "mm_token_type_ids" in inputs:
            more["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
        found += [torch.stack(first.logits), torch.stack(answer(model, more).logits)]
    return found


def conversation(name: str) -> tuple[dict, dict]:
    """Two parts with an image each, for direct calls; with positions of the whole where tokens have several."""
    family, model = family_of(name), model_of(name)
    first, second = prompt(family, 2, 3, seed=3), prompt(family, 1, 5, seed=4)
    del first["attention_mask"], second["attention_mask"]
    if "image_grid_thw" in first:
        ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
        grid = torch.cat([first["image_grid_thw"], second["image_grid_thw"]])
        positions, _ = model.model.get_rope_index(
            input_ids=ids, mm_token_type_ids=(ids == IMAGE_TOKEN).int(), image_grid_thw=grid
        )
        cut = first["input_ids"].shape[1]
        first["position_ids"], second["position_ids"] = positions[..., :cut], positions[..., cut:]
    return first, second


def words(name: str, ids: list[int], after: dict) -> dict:
    """Some more text by hand."""
    found = {"input_ids": torch.tensor([ids])}
    if "position_ids" in after:
        begin = int(after["position_ids"].max()) + 1
        found["position_ids"] = torch.arange(begin, begin + len(ids)).expand(3, 1, -1)
    return found


def second_turn_with_an_image(model: PreTrainedModel, name: str) -> list[Tensor]:
    """Direct calls: an image, some words, one token, an image, some words, one token."""
    first, second = conversation(name)
    cache, found = DynamicCache(), []
    for part in (first, second, words(name, [30, 31, 32], second)):
        found.append(model(**part, past_key_values=cache).logits[:, -1])
    after = words(name, [33], {"position_ids": words(name, [1, 2, 3], second).get("position_ids", torch.zeros(1))})
    if "position_ids" not in second:
        del after["position_ids"]
    found.append(model(**after, past_key_values=cache).logits[:, -1])
    return found


def second_turn_with_an_image_in_a_batch(model: PreTrainedModel, name: str) -> list[Tensor]:
    """Through generate(): a new image for each sequence, everything else is about the whole conversation."""
    inputs, new = left_padded(three(name)), prompt(family_of(name), 1, 5, seed=4)
    first = answer(model, inputs)
    ids = torch.cat([first.sequences, new["input_ids"].expand(3, -1)], 1)
    mask = inputs["attention_mask"]
    more = dict(input_ids=ids, past_key_values=first.past_key_values)
    more["attention_mask"] = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    more["pixel_values"] = torch.cat([new["pixel_values"] * (row + 1) for row in range(3)])
    if "image_grid_thw" in new:
        pytest.skip("the library itself counts positions of all images, and is given one")
    return [torch.stack(first.logits), torch.stack(answer(model, more).logits)]


def forwards(model: PreTrainedModel, name: str) -> list[Tensor]:
    """Direct calls with a cache: the prompt, one token after another, several at once."""
    first, _ = conversation(name)
    found, cache, after = [], None, first
    for part in (first, [30], [31], [32, 33, 34], [35]):
        if not isinstance(part, dict):
            part = after = words(name, part, after)
        out = model(**part, past_key_values=cache, use_cache=True)
        found.append(out.logits[:, -1])
        cache = out.past_key_values
    return found


def copied(model: PreTrainedModel, name: str) -> list[Tensor]:
    """Two questions about one prefix: the cache is copied, and repeated."""
    first, _ = conversation(name)
    cache = model(**first, use_cache=True).past_key_values
    other = copy.deepcopy(cache)
    ask = words(name, [30, 31, 32], first)
    found = [model(**ask, past_key_values=cache).logits, model(**ask, past_key_values=other).logits]
    assert torch.equal(*found)
    again = words(name, [40, 41], ask)
    found.append(model(**again, past_key_values=cache).logits)
    other.batch_repeat_interleave(2)
    twice = {key: value.repeat_interleave(2, -2) for key, value in again.items()}
    found.append(model(**twice, past_key_values=other).logits)
    assert apart(found[-1], found[-2]) < TOLERANCE
    return found


def cropped_behind_the_prompt(model: PreTrainedModel, name: str) -> list[Tensor]:
    """Another answer: what was generated is cut off, and the next words come behind the prompt."""
    inputs = prompt(family_of(name), 2)
    cache = answer(model, inputs).past_key_values
    cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())
    more = longer(inputs, [40, 41, 42])
    kept = {key: more[key] for key in more.keys() & {"input_ids", "attention_mask", "mm_token_type_ids"}}
    return [generate(model, dict(kept, past_key_values=cache))]


WAYS = [
    greedy, ragged, one_without_image, static, recomputed, beams, sampled, drafted, second_turn_of_text,
    second_turn_with_an_image, second_turn_with_an_image_in_a_batch, forwards, copied, cropped_behind_the_prompt,
]  # fmt: skip


@functools.cache
def bare(name: str, attn: str, way: Callable) -> list[Tensor]:
    return way(model_of(name, attn), name)


MATRIX = [
    *((name, "sdpa", "fastv_quarter") for name in FAMILIES),
    *((name, "eager", "pyramid_last") for name in FAMILIES),
    ("llava", "sdpa", "pyramid_compact"),
    ("qwen2_5_vl", "sdpa", "pyramid"),
    ("llava_qwen2", "eager", "fastv"),
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("name", "attn", "method"), MATRIX)
def test_dropped_tokens_are_as_hidden_ones(name, attn, method, way):
    model, dropping = model_of(name, attn), method_of(name, method)
    with vlmattn.applied(model, dropping):
        dropped = way(model, name)
    with vlmattn.applied(model, replace(dropping, mode="mask")):
        hidden = way(model, name)
    plain = bare(name, attn, way)
    for found, expected, other in zip(dropped, hidden, plain, strict=True):
        if not found.is_floating_point():
            assert torch.equal(found, expected), "the same tokens"
            continue
        assert apart(found, expected) < TOLERANCE
        assert apart(found, other) > ACTS


@method_matrix
@attn_matrix
@model_matrix
def test_padding_is_invisible(name, attn, method):
    model, prompts = model_of(name, attn), [*three(name), without_image(name)]
    with vlmattn.applied(model, method_of(name, method)):
        together = generate(model, left_padded(prompts))
        for row, inputs in zip(together, prompts[:3], strict=False):
            assert apart(row, generate(model, inputs)[0]) < TOLERANCE
    text = {key: value for key, value in prompts[3].items() if key not in ("pixel_values", "image_grid_thw")}
    assert apart(together[3], generate(model_of(name, attn), text)[0]) < TOLERANCE


def test_a_prompt_in_three_parts_is_pruned_part_by_part():
    """Two images, each pruned when it came: what stays of the first does not depend on the second."""
    model = model_of("llava")
    first, second = conversation("llava")
    with vlmattn.applied(model, FastV(layer=1)):
        cache = model(**first, use_cache=True).past_key_values
        before = cache._vlmattn_request.maps[1].slots.tolist()[0]
        model(**second, past_key_values=cache)
        tokens = cache._vlmattn_request.maps[1]
    kept, begin = tokens.slots.tolist()[0], first["input_ids"].shape[1]
    assert [slot for slot in kept if slot < begin] == before
    images = [slot for slot in kept if 3 <= slot - begin < 19]
    assert (len(before), len(images), len(kept)) == (begin - 16, 8, begin - 16 + second["input_ids"].shape[1] - 8)
    assert [layer.keys.shape[2] for layer in cache.layers] == [begin + 24, *[len(kept)] * 3]


# --- how many are left


@model_matrix
def test_cache_rows_and_bytes_are_exact(name):
    """Layers before K hold all slots, padding too; the others hold the longest row that is left, without padding."""
    prompts, per_image = three(name), TOKENS_PER_IMAGE[family_of(name)]
    text = [int((p["input_ids"] != IMAGE_TOKEN).sum()) for p in prompts]
    images, longest = [2 * per_image, per_image, per_image], max(p["input_ids"].shape[1] for p in prompts)
    model = model_of(name)
    whole = answer(model, left_padded(prompts)).past_key_values
    for ratio in (0.75, 0.5, 0.25):
        method = replace(method_of(name, "fastv"), keep_ratio=ratio)
        with vlmattn.applied(model, method):
            cache = answer(model, left_padded(prompts)).past_key_values
            report = model.vlmattn.report()
        kept = [round(ratio * n) for n in images]
        short = max(t + n for t, n in zip(text, kept, strict=True))
        rows = [longest + NEW - 1 if layer < method.layer else short + NEW - 1 for layer in range(4)]
        assert [layer.keys.shape[2] for layer in cache.layers] == rows
        assert [layer.values.shape[2] for layer in cache.layers] == rows
        held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
        full = sum(part.numel() * part.element_size() for layer in whole.layers for part in (layer.keys, layer.values))
        assert held == full * sum(rows) // (4 * (longest + NEW - 1))
        assert cache.get_seq_length() == whole.get_seq_length()
        per_layer = [sum(images) / 3 if layer < method.layer else sum(kept) / 3 for layer in range(4)]
        assert report["image_tokens"] == {
            "prompt": sum(images) / 3,
            "per_layer": pytest.approx(per_layer),
            "equivalent": pytest.approx(sum(per_layer) / 4),
        }
        assert report["fired"] == {"fastv": sum(images) - sum(kept)}


def test_stages_are_counted():
    model, inputs = model_of("llava"), prompt("llava", 2)
    with vlmattn.applied(model, method_of("llava", "pyramid")):
        for _ in range(2):
            cache = answer(model, inputs).past_key_values
        report = model.vlmattn.report()
        generate(model, left_padded([inputs, without_image("llava")]))
        assert model.vlmattn.report()["image_tokens"] == report["image_tokens"], "of sequences that have images"
    length = inputs["input_ids"].shape[1] + NEW - 1
    assert [layer.keys.shape[2] for layer in cache.layers] == [length, length - 8, length - 16, length - 24]
    assert report["image_tokens"] == {"prompt": 32.0, "per_layer": [32.0, 24.0, 16.0, 8.0], "equivalent": 20.0}
    assert report["fired"] == {"pyramiddrop": 48}
    assert "image_tokens" not in vlmattn.wrap(build("llava"), "pai").vlmattn.report()


@pytest.mark.filterwarnings("ignore:vlmattn.*never fired:UserWarning")
@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 400])
def test_a_number_of_tokens_is_that_of_a_sequence(tokens):
    model, prompts = model_of("llava"), three("llava")
    with vlmattn.applied(model, FastV(layer=1, keep_tokens=tokens)):
        cache = answer(model, left_padded(prompts)).past_key_values
        report = model.vlmattn.report()["image_tokens"]
    kept = [min(tokens, n) for n in (32, 16, 16)] if tokens else [16, 8, 8]
    assert report["per_layer"] == pytest.approx([64 / 3, *[sum(kept) / 3] * 3])
    rows = max(n + text for n, text in zip(kept, (6, 12, 7), strict=True)) if tokens < 400 else 38
    assert cache.layers[1].keys.shape[2] == rows + NEW - 1


@pytest.mark.parametrize("first", [0.5, 0.25], ids=["falling", "rising"])
@attn_matrix
def test_two_methods_on_different_layers(attn, first):
    """Each chooses among what the other left; a second one that would keep more keeps all that is left."""
    model, rows = model_of("llava", attn), left_padded(three("llava"))
    pair = [FastV(layer=1, keep_ratio=first), FastV(layer=3, keep_ratio=0.75 - first)]
    with vlmattn.applied(model, pair):
        dropped = generate(model, rows)
        alone = [generate(model, inputs)[0] for inputs in three("llava")]
        report = model.vlmattn.report()["image_tokens"]
    with vlmattn.applied(model, [replace(method, mode="mask") for method in pair]):
        assert apart(dropped, generate(model, rows)) < TOLERANCE
    assert all(apart(row, one) < TOLERANCE for row, one in zip(dropped, alone, strict=True))
    assert report["per_layer"] == pytest.approx([n * 64 / 3 for n in (1, first, first, 0.25)])
    with vlmattn.applied(model, pair[0]):
        assert (apart(dropped, generate(model, rows)) > ACTS) == (first == 0.5)


@attn_matrix
def test_two_kinds_of_method(attn):
    """FastV first; what PyramidDrop keeps is counted in the tokens of the prompt, and never more than there are."""
    model, rows = model_of("llava", attn), left_padded(three("llava"))
    pair = [FastV(layer=1, keep_ratio=0.5), PyramidDrop(layers="2,3", keep_ratios=(0.75, 0.25))]
    with vlmattn.applied(model, pair):
        dropped = generate(model, rows)
        assert model.vlmattn.report()["image_tokens"]["per_layer"] == pytest.approx([64 / 3, 32 / 3, 32 / 3, 16 / 3])
    with vlmattn.applied(model, [replace(method, mode="mask") for method in pair]):
        assert apart(dropped, generate(model, rows)) < TOLERANCE


# --- on and off


def footprint(model: PreTrainedModel) -> dict:
    tables = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return {
        "hooks": [(name, table, list(getattr(m, table))) for name, m in model.named_modules() for table in tables],
        "attributes": sorted(model.__dict__),
        "attention": model.config.get_text_config()._attn_implementation,
    }


@pytest.mark.filterwarnings("ignore:vlmattn.*never fired:UserWarning")
@pytest.mark.parametrize("mode", ["drop", "mask"])
@attn_matrix
@model_matrix
def test_keeping_all_changes_no_bit(name, attn, mode):
    model, rows = model_of(name, attn), left_padded(three(name))
    methods = [replace(method_of(name, "fastv"), keep_ratio=1.0, mode=mode)]
    pyramid = method_of(name, "pyramid")
    methods.append(replace(pyramid, keep_ratios=(1.0,) * len(pyramid.keep_ratios), mode=mode))
    for method in methods:
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            plain = generate(model, rows, **options)
            with vlmattn.applied(model, method):
                assert torch.equal(generate(model, rows, **options), plain)
                assert not model.vlmattn.report()["fired"][method.info.name]


@method_matrix
@model_matrix
def test_unwrapping_leaves_nothing(name, method):
    """Also after an exception in the middle of a forward, and on the same cache type anew."""
    model, inputs = fresh(name), prompt(family_of(name), 2)
    logits, plain = model(**inputs).logits, generate(model, inputs)
    before = footprint(model)
    vlmattn.wrap(model, method_of(name, method))
    pruned = generate(model, inputs)
    assert apart(pruned, plain) > ACTS

    def fail(*args):
        raise ZeroDivisionError

    hook = model.model.language_model.layers[3].mlp.register_forward_pre_hook(fail)
    for call in (lambda: generate(model, inputs), lambda: model(**inputs)):
        with pytest.raises(ZeroDivisionError):
            call()
    hook.remove()
    assert torch.equal(generate(model, inputs), pruned)
    vlmattn.unwrap(model)
    assert footprint(model) == before
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(generate(model, inputs), plain)


@model_matrix
def test_disabled_and_for_one_call(name):
    model, inputs = fresh(name), left_padded(three(name))
    plain = generate(model, inputs)
    fast, pyramid = method_of(name, "fastv"), method_of(name, "pyramid")
    with vlmattn.applied(model, fast):
        pruned = generate(model, inputs)
        model.vlmattn.disable()
        assert torch.equal(generate(model, inputs), plain)
        model.vlmattn.enable()
        assert torch.equal(generate(model, inputs), pruned)
        assert torch.equal(generate(model, inputs, preset="none"), plain)
        once = generate(model, inputs, preset=Recipe.of(pyramid))
        assert torch.equal(generate(model, inputs), pruned)
        model.vlmattn.set(pyramid)
        assert torch.equal(generate(model, inputs), once)
    with vlmattn.applied(model, "none"):
        assert torch.equal(generate(model, inputs, preset=Recipe.of(fast)), pruned)
        assert torch.equal(generate(model, inputs), plain)
    assert apart(pruned, plain) > ACTS
    assert apart(once, pruned) > ACTS


@model_matrix
def test_a_deep_copy_is_a_model_of_its_own(name):
    original, inputs = fresh(name), prompt(family_of(name), 2)
    plain = generate(original, inputs)
    pruned = generate(vlmattn.wrap(original, method_of(name, "fastv")), inputs)
    double = copy.deepcopy(original)
    vlmattn.unwrap(original)
    assert torch.equal(generate(original, inputs), plain)
    assert torch.equal(generate(double, inputs), pruned)
    assert double.vlmattn.report()["fired"]["fastv"] > 0
    vlmattn.unwrap(double)
    assert torch.equal(generate(double, inputs), plain)
    assert apart(pruned, plain) > ACTS


def test_threads_do_not_meet():
    model = vlmattn.wrap(fresh("llava"), method_of("llava", "pyramid_compact"))
    batches = [
        prompt("llava", 2),
        left_padded(three("llava")),
        prompt("llava", seed=9),
        left_padded(three("llava")[1:]),
    ]
    presets = [None, Recipe.of(FastV(layer=1)), None, "none"]
    serial = [generate(model, inputs, preset=preset) for inputs, preset in zip(batches, presets, strict=True)]
    barrier, results = threading.Barrier(4), [[] for _ in range(4)]

    def work(i: int) -> None:
        for _ in range(4):
            barrier.wait(timeout=600)
            with torch.no_grad():
                results[i].append(generate(model, batches[i], preset=presets[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for expected, found in zip(serial, results, strict=True):
        assert len(found) == 4
        assert max(apart(logits, expected) for logits in found) < TOLERANCE


@pytest.mark.parametrize("recipe", ["fastv", "visionzip"])
@model_matrix
def test_a_second_prompt_finds_nothing_of_the_first(name, recipe):
    """Also in a static cache that was reset, with tokens dropped before and not after; VisionZip drops before layer 0."""
    model = fresh(name)
    first, other = prompt(family_of(name), 2), prompt(family_of(name), 1, 6, seed=9)
    plain = generate(model, other)
    positions = "compact" if find_family(model).anatomy(model).axes == 1 else "original"
    if recipe == "visionzip" and find_family(model).anatomy(model).deepstack:
        pytest.skip("refused: image features come in later")
    zipped = Recipe.of("visionzip", dominant=0.25, contextual=0.25, positions=positions)
    vlmattn.wrap(model, method_of(name, "fastv") if recipe == "fastv" else zipped)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    generate(model, first, past_key_values=cache, disable_compile=True)
    cache.reset()
    pruned = generate(model, other)
    assert apart(generate(model, other, past_key_values=cache, disable_compile=True), pruned) < TOLERANCE
    copied = copy.deepcopy(cache)
    vlmattn.unwrap(model)
    for reused in (copied, cache):
        reused.reset()
        assert apart(generate(model, other, past_key_values=reused, disable_compile=True), plain) < TOLERANCE
    assert apart(pruned, plain) > ACTS


@attn_matrix
@method_matrix
def test_half_precision(method, attn):
    model, dropping = fresh("llava", attn).to(torch.bfloat16), method_of("llava", method)
    rows = left_padded(three("llava"))
    rows = {key: value.bfloat16() if value.is_floating_point() else value for key, value in rows.items()}
    plain, choices = generate(model, rows, new=1), Choices(ranking=())
    with vlmattn.applied(model, dropping):
        with choices.noted():
            dropped = generate(model, rows, new=1)
        assert generate(model, rows).isfinite().all()
    with vlmattn.applied(model, replace(dropping, mode="mask")), choices.repeated():
        assert apart(generate(model, rows, new=1), dropped) < ACTS
    assert apart(dropped, plain) > 2 * ACTS


def test_videos_are_image_tokens_too():
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([[1, 40, 41, 97, *[98] * 8, 96, 42, 43]])
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=2 * (ids == 98).int(),
        pixel_values_videos=torch.randn(32, 96, generator=generator), video_grid_thw=torch.tensor([[2, 4, 4]]),
        second_per_grid_ts=torch.tensor([1.0]),
    )  # fmt: skip
    model = model_of("qwen2_5_vl")
    plain = generate(model, inputs)
    with vlmattn.applied(model, FastV(layer=1)):
        dropped, report = generate(model, inputs), model.vlmattn.report()
    with vlmattn.applied(model, FastV(layer=1, mode="mask")):
        assert apart(generate(model, inputs), dropped) < TOLERANCE
    assert report["image_tokens"]["per_layer"] == [8, 4, 4, 4]
    assert apart(dropped, plain) > ACTS
