"""Attention edits behind dropped tokens: they must say of the tokens that are left what they say where the others are hidden.

Spans, roles, sinks and weights that a method knows belong to tokens. A method that looked them up at the slots of the prompt
would edit the wrong keys from the first layer on whose cache is shorter.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from methods import SETTINGS, dialogues, fitted, inputs_of
from methods import Speech as Words
from numerics import TINY_MODEL, bound
from pairs import rotated
from tiny import FAMILIES, IMAGE_TOKEN, build, generate, left_padded
from torch import Tensor
from transformers import PreTrainedModel

import vlmattn
from vlmattn import OPERA, VCD, DeCo, DoLa, OptionError, Recipe
from vlmattn.decoding import Decoding
from vlmattn.decoding.search import Search
from vlmattn.interventions.pruning import FastV, KVPolicy, Pruning, PyramidDrop
from vlmattn.models import find_family
from vlmattn.registry import find_method, make_method

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:vlmattn:UserWarning")]
family_matrix = pytest.mark.parametrize("family", FAMILIES)

TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)  # logits of a random model are smaller
ACTS = 0.05
THE = 60  # a word without content
PLACEHOLDERS = [96, 97, 98, 99]
MODES = ("drop", "mask")
NEW = 5  # the prompt and four steps
EDITS = [name for name, method in SETTINGS.items() if not isinstance(method, KVPolicy)]
SOME = ("var", "var_either", "vhr", "paint", "gift", "vaf_heads", "mma", "sofa", "calibration_documents", "focus")
WAYS = {
    "eager": {"attn": "eager"},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "recompute": {"use_cache": False},
}


@functools.cache
def model_of(family: str, attn: str = "sdpa") -> PreTrainedModel:
    model = build(family, attn)
    model.lm_head.weight.data *= 4
    return model


@functools.cache
def first_layer(family: str) -> int:
    """From which tokens may be missing."""
    return max(1, find_family(model_of(family)).anatomy(model_of(family)).deepstack)


@functools.cache
def prompts_of(family: str) -> list[dict[str, Tensor]]:
    """Of different lengths, with one, two and three images. What follows an image has no content (see GIFT below)."""
    found = []
    for number, inputs in enumerate(dialogues(family)):
        ids = inputs["input_ids"][0].clone()
        ids[1:][(ids[:-1] == IMAGE_TOKEN) & (ids[1:] < 90)] = THE
        pixels = {key: inputs[key] for key in inputs if key.startswith(("pixel", "image"))}
        found.append(inputs_of(family, ids.tolist(), number) | pixels)
    return found


class Speech(Words):
    """One of the words is "the", and markers of images are none."""

    @staticmethod
    def decode(ids: list[int]) -> str:
        return " ".join("the" if token in (THE, 96, 97) else Words.decode([token]) for token in ids)


@contextmanager
def wrapped(family: str, methods: list, attn: str = "sdpa") -> Iterator[PreTrainedModel]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # idle settings
        with vlmattn.applied(model_of(family, attn), methods, processor=Speech()) as model:
            yield model


def answers(family: str, methods: list, attn: str = "sdpa", inputs: dict | None = None, **options) -> Tensor:
    """Logits of a prompt and four steps; without ``inputs`` of all prompts, left-padded."""
    with wrapped(family, methods, attn) as model:
        options = {"suppress_tokens": PLACEHOLDERS, **options}
        return generate(model, inputs or left_padded(prompts_of(family)), new=NEW, **options)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).nan_to_num(posinf=0, neginf=0).abs().max())


@functools.cache
def unedited(family: str, fast: Pruning) -> Tensor:
    return answers(family, [fast])


def hiding(method: Pruning) -> Pruning:
    return replace(method, mode="mask")


@rotated("family", FAMILIES, "name", EDITS)
def test_an_edit_is_the_same_behind_dropped_tokens(family, name):
    """From layer 1 or 2 on, setting by setting."""
    fast, edit = FastV(layer=first_layer(family) + EDITS.index(name) % 2), fitted(SETTINGS[name], family)
    dropped = answers(family, [edit, fast])
    assert apart(dropped, answers(family, [edit, hiding(fast)])) < TOLERANCE
    assert apart(dropped, unedited(family, fast)) > ACTS, "the edit acts"
    whole = apart(dropped, answers(family, [edit]))
    if name == "knockout_image_text":
        assert whole < TOLERANCE, "no text sees an image, so nobody misses the tokens"
    else:
        assert whole > ACTS, "tokens are dropped"


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("family", FAMILIES[:2])
def test_an_edit_is_the_same_in_every_stage(family, name):
    """Three different maps in a row; each prompt alone gets what it gets in a batch."""
    layers = list(range(first_layer(family), 4))
    ratios = (0.75, 0.5, 0.25)[-len(layers) :]
    pyramid = PyramidDrop(layers=",".join(map(str, layers)), keep_ratios=ratios, positions="original")
    edit = fitted(SETTINGS[name], family)
    dropped = answers(family, [edit, pyramid])
    assert apart(dropped, answers(family, [edit, hiding(pyramid)])) < TOLERANCE
    for row, inputs in zip(dropped, prompts_of(family), strict=True):
        assert apart(row, answers(family, [edit, pyramid], inputs=inputs)[0]) < TOLERANCE
    assert apart(dropped, answers(family, [edit])) > ACTS


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("way", WAYS)
def test_it_does_not_matter_how_it_runs(way, name):
    methods = [fitted(SETTINGS[name], "llava"), FastV(layer=1, keep_ratio=0.25)]
    assert apart(answers("llava", methods, **WAYS[way]), answers("llava", methods)) < 4 * TOLERANCE, "other kernels"


@pytest.mark.parametrize("name", ["var_extend", "vhr", "pai", "calibration"])
def test_beams_follow_their_sinks_behind_dropped_tokens(name):
    """What is kept about generated tokens lies in the slots of a layer."""

    def beams(fast: Pruning) -> tuple[Tensor, Tensor]:
        with wrapped("llava", [SETTINGS[name], fast]) as model:
            out = model.generate(
                **left_padded(prompts_of("llava")), num_beams=3, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                pad_token_id=0, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
                suppress_tokens=PLACEHOLDERS,
            )  # fmt: skip
        return out.sequences, out.sequences_scores

    fast = FastV(layer=1, keep_ratio=0.25)
    (tokens, scores), (others, expected) = beams(fast), beams(hiding(fast))
    assert torch.equal(tokens, others)
    assert apart(scores, expected) < 6 * TOLERANCE


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("family", FAMILIES[::2])
def test_a_second_turn_is_edited_behind_dropped_tokens(family, name):
    """Text only, on the kept cache: spans of the first turn are looked up in the layer's slots."""

    def turns(methods: list) -> Tensor:
        with wrapped(family, methods) as model:
            inputs = left_padded(prompts_of(family))
            options = dict(max_new_tokens=3, min_new_tokens=3, pad_token_id=0, suppress_tokens=[*PLACEHOLDERS, 10, 11])
            out = model.generate(**inputs, **options, do_sample=False, return_dict_in_generate=True)
            ids = torch.cat([out.sequences, torch.tensor([[10, 61, 62, 63, 11]]).expand(3, 5)], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, 8, dtype=torch.long)], 1)
            kept = dict(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
            if "mm_token_type_ids" in inputs:
                kept["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
            return generate(model, kept, suppress_tokens=PLACEHOLDERS)

    fast, edit = FastV(layer=first_layer(family)), fitted(SETTINGS[name], family)
    dropped = turns([edit, fast])
    assert apart(dropped, turns([edit, hiding(fast)])) < TOLERANCE
    assert apart(dropped, turns([edit])) > ACTS


def test_gift_compares_a_word_with_the_row_before_it_that_is_there():
    """The one difference to hidden tokens: before the first word after an image lies an image token, which may be gone."""
    told, ahead = SETTINGS["gift"], FastV(layer=1)
    assert told.saliency == "1", "the premise: the gaze is followed where tokens are missing"
    dialogue = left_padded(dialogues("llava"))
    dropped, hidden = (answers("llava", [told, fast], inputs=dialogue) for fast in (ahead, hiding(ahead)))
    assert apart(dropped, hidden) > 1e-3
    late = FastV(layer=2)
    dropped, hidden = (answers("llava", [told, fast], inputs=dialogue) for fast in (late, hiding(late)))
    assert apart(dropped, hidden) < TOLERANCE


# --- decoding rules


@pytest.mark.parametrize("rule", [DoLa(), DeCo()], ids=["dola", "deco"])
@family_matrix
def test_rules_of_early_layers_work_on_fewer_tokens(family, rule):
    fast = FastV(layer=first_layer(family))
    dropped, hidden = (answers(family, [method, rule]) for method in (fast, hiding(fast)))
    assert torch.equal(dropped.isinf(), hidden.isinf()), "what DeCo leaves out"
    assert apart(dropped, hidden) < TOLERANCE
    assert apart(dropped, answers(family, [rule])) > ACTS
    assert apart(dropped, unedited(family, fast)) > ACTS / 2
    for row, inputs in zip(dropped, prompts_of(family), strict=True):
        assert apart(row, answers(family, [fast, rule], inputs=inputs)[0]) < TOLERANCE
    with wrapped(family, [fast, rule]) as model:
        out = model.generate(
            **left_padded(prompts_of(family)), num_beams=2, max_new_tokens=3, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, suppress_tokens=PLACEHOLDERS,
        )  # fmt: skip
        slots = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert len(set(slots[: fast.layer])) == 1
    assert max(slots[fast.layer :]) < slots[0], "the rule works on caches that are really shorter"


@pytest.mark.parametrize("rule", [DoLa(), DeCo()], ids=["dola", "deco"])
@pytest.mark.parametrize("recipe", ["pyramiddrop", "visionzip", "sparsevlm"])
def test_rules_of_early_layers_work_where_positions_are_counted_anew(recipe, rule):
    """And where layer 0 has fewer tokens already."""
    options = {"dominant": 0.25, "contextual": 0.25} if recipe == "visionzip" else {}
    dropped, hidden = (answers("llava", [*Recipe.of(recipe, mode=mode, **options).pruning, rule]) for mode in MODES)
    assert apart(dropped, hidden) < TOLERANCE
    assert apart(dropped, answers("llava", [rule])) > ACTS


RULES = sorted(
    name for name, preset in vlmattn.presets().items() if issubclass(find_method(preset.method), (Decoding, Search))
)
LAYER_RULES = [name for name in RULES if name.startswith(("dola", "deco", "sla"))]


BESIDE = ["agla", "icd", "m3id", "pai_guidance", "pai_guidance_cli", "vcd", "vcd_pope"]  # test_branches_that_drop.py


@pytest.mark.parametrize("rule", [name for name in RULES if name not in (*LAYER_RULES, *BESIDE)])
def test_rules_that_need_all_tokens_are_refused(rule):
    """At wrap, with both names; the model stays bare."""
    model, method = build("llava"), vlmattn.presets()[rule].method
    with pytest.raises(OptionError, match=rf"'fastv' and '{method}' conflict: .* all image tokens.*use one of them"):
        vlmattn.wrap(model, f"fastv+{rule}", processor=Speech())
    assert "vlmattn" not in model.__dict__
    vlmattn.wrap(model, "fastv")
    with pytest.raises(OptionError, match="conflict"):
        model.vlmattn.set([FastV(), make_method(method, vlmattn.presets()[rule].options)])
    assert model.vlmattn.recipe.name == "fastv"


def test_the_rules_are_all_there():
    assert {VCD.info.name, OPERA.info.name} < {vlmattn.presets()[name].method for name in RULES}
    assert len(LAYER_RULES) >= 2
    assert {*BESIDE} < {*RULES}
    for rule in BESIDE:
        vlmattn.wrap(build("llava"), f"fastv+{rule}", processor=Speech())
