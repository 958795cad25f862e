"""Edits in layers of cross-attention, whose keys are images that are no tokens of the prompt."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch
from tiny import generate
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from zoo import IMG, ZOO, padded

import vlmattn
from vlmattn import PAI, VAR, VCD, VHR, Heads, Knockout, OptionError, Recipe, UnsupportedError
from vlmattn.inspection import image_attention
from vlmattn.interventions import VAF, HeadsGuided, SinkKnockout
from vlmattn.models import find_family

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]

NAMES = ("mllama", "mllama_tiles")
CROSS = (1, 3)
SINKS = VAR(tau=2.6, keep=0.2, max_sink=1.0, min_visual=0.0, layers="0:")
every = pytest.mark.parametrize("name", NAMES)


def logits(name, recipe, inputs, new=4, **options):
    model = vlmattn.wrap(ZOO[name].build(), recipe)
    return generate(model, inputs, new, suppress_tokens=[IMG], **options)


def asked(name, images=2, words=5):
    return ZOO[name].prompt(images, words, 1).inputs


def moved(found, bare):
    return bool((found - bare).abs().max() > 1e-2)


class Gains:
    """Head gains by layer, and head outputs of the last row, for the attention function below."""

    now: ClassVar[dict[int, torch.Tensor]] = {}
    seen: ClassVar[dict[int, torch.Tensor]] = {}


def gained(module, query, key, value, mask, scaling=None, **_):
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    score = query @ key.transpose(-1, -2) * scaling
    if mask is None:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool).tril()
    score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score + mask
    out = score.softmax(-1) @ value
    Gains.seen[module.layer_idx] = out[0, :, -1]
    return (out * Gains.now.get(module.layer_idx, torch.ones(4))[:, None, None]).transpose(1, 2).contiguous(), None


AttentionInterface.register("gained", gained)
AttentionMaskInterface.register("gained", sdpa_mask)


@every
def test_vhr_compares_with_a_prompt_that_skips_the_images(name):
    """Layer by layer, on the bare model and a text without images; heads of skipped layers say nothing there."""
    inputs, method = asked(name), VHR(layers="0:")
    model = ZOO[name].build()
    model.set_attn_implementation({"text_config": "gained"})
    words = inputs["input_ids"][inputs["input_ids"] != IMG][None]
    gains = {}
    for layer in range(4):
        outs = []
        for given in (inputs, {"input_ids": words}):
            Gains.now, Gains.seen = gains, {}
            answer = model(**given)
            outs.append(Gains.seen.get(layer))
            assert answer.logits.isfinite().all()
        assert (outs[1] is None) == (layer in CROSS)
        blind = torch.zeros_like(outs[0]) if outs[1] is None else outs[1]
        difference, loud = (outs[0] - blind).norm(dim=-1), blind.norm(dim=-1) ** 2
        outlier = (difference > difference.mean() + difference.std()) & (loud > loud.mean() + loud.std())
        difference = difference.masked_fill(outlier, 0)
        gains[layer] = torch.where(difference > difference.median(), 2.0, 1.0)
    Gains.now = gains
    wanted = model(**inputs).logits
    assert moved(wanted, ZOO[name].build()(**inputs).logits)
    found = vlmattn.wrap(ZOO[name].build(), method)(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


@every
@pytest.mark.parametrize(
    "method",
    [
        PAI(alpha=0.9, layers="0:"),
        HeadsGuided(alpha=2.0, layers="0:"),
        VAF(enhance=3.0, layers="0:"),
        SINKS,
        SinkKnockout(tau=2.6, layers="0:"),
        SinkKnockout(tau=2.6, layers="0:", hide="others"),
        Knockout(source="image", target="text"),
        Knockout(source="image", target="last"),
        Knockout(source="image", target="generated"),
        Heads(operation="cut", heads="1.0,3.2"),
    ],
    ids=lambda method: method.info.name,
)
def test_methods_about_image_keys_act_in_cross_attention_only(name, method):
    inputs = asked(name)
    model = vlmattn.wrap(ZOO[name].build(), method)
    found = generate(model, inputs, 4, suppress_tokens=[IMG])
    assert moved(found, generate(ZOO[name].build(), inputs, 4, suppress_tokens=[IMG]))
    anatomy = find_family(model).anatomy(model)
    assert set(method.bind(anatomy).active_layers(anatomy)) <= set(CROSS)
    torch.testing.assert_close(logits(name, method, inputs, use_cache=False), found, rtol=0, atol=2e-4)
    for options in ({"cache_implementation": "static"}, {"past_key_values": DynamicCache()}):
        torch.testing.assert_close(logits(name, method, inputs, **options), found, rtol=0, atol=2e-4)


@every
def test_blind_text_rows_are_those_of_silent_heads(name):
    """Knockout of all images and heads of cross-attention that say nothing are the same for rows after an image."""
    inputs = asked(name)
    silent = Heads(operation="block", heads=",".join(f"{layer}.{head}" for layer in CROSS for head in range(4)))
    found = logits(name, Knockout(source="image", target="generated"), inputs)
    bare = generate(ZOO[name].build(), inputs, 4, suppress_tokens=[IMG])
    torch.testing.assert_close(found[:, 0], bare[:, 0], rtol=0, atol=2e-4)
    assert moved(found[:, 1:], bare[:, 1:])
    model, ids = ZOO[name].build(), inputs["input_ids"]
    after = ((ids == IMG).cumsum(1) > 0) & (ids != IMG)
    for layer in CROSS:

        def silence(module, args, output):
            return output[0].masked_fill(after[..., None], 0.0), output[1]

        model.model.language_model.layers[layer].cross_attn.register_forward_hook(silence)
    wanted = model(**inputs).logits
    torch.testing.assert_close(vlmattn.wrap(ZOO[name].build(), silent)(**inputs).logits, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", [SINKS, PAI(alpha=0.9, layers="0:"), VHR(layers="0:")], ids=["var", "pai", "vhr"])
def test_batches_with_other_numbers_of_images_and_beams(method):
    prompts = [ZOO["mllama"].prompt(images, words, images) for images, words in ((2, 5), (1, 9))]
    together = logits("mllama", method, padded(ZOO["mllama"], prompts))
    for row, one in enumerate(prompts):
        torch.testing.assert_close(together[row], logits("mllama", method, one.inputs)[0], rtol=0, atol=2e-4)
    found = [
        vlmattn.wrap(ZOO["mllama"].build(), method).generate(
            **given, num_beams=3, do_sample=False, max_new_tokens=4, suppress_tokens=[IMG], pad_token_id=0
        )[:, -4:]
        for given in (padded(ZOO["mllama"], prompts), *(one.inputs for one in prompts))
    ]
    assert torch.equal(found[0], torch.cat(found[1:]))


@every
def test_branches_have_image_keys_of_their_own(name):
    """VAR finds sinks in the noised images of a branch: the first token is that of two models."""
    inputs, rule = asked(name), VCD()
    found = logits(name, [SINKS, rule], inputs, new=2)[0, 0]
    noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    beta = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    left = torch.cumprod(1 - beta, 0)[500]
    noised = left.sqrt() * inputs["pixel_values"] + (1 - left).sqrt() * noise
    if name == "mllama":
        model = vlmattn.wrap(ZOO[name].build(), SINKS)
        one, other = model(**inputs).logits[0, -1], model(**{**inputs, "pixel_values": noised}).logits[0, -1]
        seen = found.isfinite()
        torch.testing.assert_close(found[seen], (2 * one - other)[seen], rtol=0, atol=2e-4)
    assert moved(found.nan_to_num(neginf=0), logits(name, rule, inputs, new=2)[0, 0].nan_to_num(neginf=0))


@every
def test_maps_show_cross_attention_by_image_and_tile(name):
    """Mean weights of the last row in the bare eager model; tiles of (1, 2) lie side by side, each behind its CLS key."""
    inputs, model = asked(name), ZOO[name].build("eager")
    maps = image_attention(ZOO[name].build(), None, inputs)
    weights = {}
    for layer in CROSS:

        def note(module, args, output, layer=layer):
            weights[layer] = output[1][0, :, -1].mean(0)

        model.model.language_model.layers[layer].cross_attn.register_forward_hook(note)
    model(**inputs, output_attentions=True)
    tiles = 1 if name == "mllama" else 2
    wanted = torch.stack(list(weights.values())).mean(0).view(2, tiles, 17)[..., 1:].view(2, tiles, 4, 4)
    assert [len(pieces) for pieces in maps] == ([1, 1] if name == "mllama" else [2, 1])
    for image, pieces in enumerate(maps):
        for tile, (box, found) in enumerate(pieces):
            assert box == (tile / len(pieces), 0, (tile + 1) / len(pieces), 1)
            torch.testing.assert_close(found, wanted[image, tile], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "recipe", ["mma", "sofa", "bidirectional_image", "isolate_images", "knockout_text_image", "gift", "paint"]
)
def test_methods_about_rows_of_images_are_refused_with_those_that_run(recipe):
    model = ZOO["mllama"].build()
    with pytest.raises(UnsupportedError, match=r"does not run on mllama: .*(pai, var, vhr and knockout|vision tower)"):
        vlmattn.wrap(model, recipe)


@pytest.mark.parametrize("recipe", ["fastv", "visionzip", "recycled"])
def test_nothing_is_dropped_of_what_no_layer_computes(recipe):
    with pytest.raises(UnsupportedError, match=re.escape("give smaller images")):
        vlmattn.wrap(ZOO["mllama"].build(), recipe)


def test_no_head_looks_more_at_images_where_all_look_at_nothing_else():
    with pytest.raises(OptionError, match=re.escape("vaf.heads must be 1")):
        vlmattn.wrap(ZOO["mllama"].build(), Recipe.of("vaf", heads=0.5))


def test_layers_that_cannot_be_meant_are_named():
    with pytest.raises(
        OptionError, match=re.escape("selects none of the layers with cross-attention to images, [1, 3]")
    ):
        vlmattn.wrap(ZOO["mllama"].build(), Recipe.of("pai", layers="0,2"))
    with pytest.raises(OptionError, match=re.escape("selects none of the layers with attention, [0, 2]")):
        vlmattn.wrap(ZOO["mllama"].build(), Recipe.of("calibration", layers="1,3"))
