"""Tokens dropped beside a decoding rule: every branch drops its own, as a model does that reads that view alone."""

from __future__ import annotations

import re

import pytest
import torch
from oracle import blank, cut, decode, dropped, noised, three
from tiny import FAMILIES, build, left_padded
from zoo import ZOO, padded

import vlmattn
from vlmattn import PAI, VCD, Branch, Contrast, ContrastiveDecoding, FastV, PyramidDrop, SparseVLM, VisionZip
from vlmattn.errors import OptionError, UnsupportedError, VlmattnError

NEW = 5
METHODS = {
    "fastv_masks": FastV(layer=2, keep_ratio=0.25, mode="mask"),
    "fastv": FastV(layer=2, keep_ratio=0.25),
    "pyramiddrop": PyramidDrop(layers="2,3", keep_ratios=(0.5, 0.25), positions="original"),
    "visionzip": VisionZip(dominant=0.25, contextual=0.25, positions="original"),
    "sparsevlm": SparseVLM(layers="2,3", keep_ratios=(0.5, 0.25), version="2"),
}
RULES = {
    "vcd": (VCD(seed=0), lambda inputs: [inputs, noised(inputs)]),
    "blank": (
        ContrastiveDecoding((Branch(name="blank", image="blank"),), Contrast((1.0,), beta=0.1)),
        lambda inputs: [inputs, blank(inputs)],
    ),
    "drop": (
        ContrastiveDecoding((Branch(name="text", image="drop"),), Contrast((1.0,), beta=0.1)),
        lambda inputs: [inputs, dropped(inputs)],
    ),
}


def vcd(views, t):
    return cut(2 * views[0] - views[1], views[0], 0.1)


def continued(family, method, inputs):
    """A model that drops tokens, and goes on from its own cache; without images the bare one."""
    model, memory = build(family), {}
    if "pixel_values" in inputs:
        vlmattn.wrap(model, method)

    def logits(answer):
        given = inputs if not answer else {"input_ids": torch.tensor([answer[-1:]]), "past_key_values": memory["cache"]}
        with torch.no_grad():
            out = model(**given, use_cache=True)
        memory["cache"] = out.past_key_values
        return out.logits[0, -1].float()

    return logits


def answers(model, inputs, **options):
    found = model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0, eos_token_id=2, **options,
    )  # fmt: skip
    return found.sequences[:, inputs["input_ids"].shape[1] :], found.get("logits")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES)
def test_every_branch_drops_its_own_tokens(family, method, rule):
    if method == "visionzip" and family == "qwen3_vl":
        pytest.skip("DeepStack adds features of all image tokens in the first layers")
    decoding, views = RULES[rule]
    prompts = three(family)
    model = vlmattn.wrap(build(family), [METHODS[method], decoding])
    found, scores = answers(model, left_padded(prompts))
    for row, inputs in enumerate(prompts):
        streams = [continued(family, METHODS[method], view) for view in views(inputs)]
        wanted, logits = decode(streams, vcd, NEW)
        assert found[row].tolist() == wanted
        for step, given in enumerate(scores):
            seen = logits[step].isfinite()
            torch.testing.assert_close(given[row][seen].float(), logits[step][seen], rtol=0, atol=2e-4)
    assert model.vlmattn.report()["image_tokens"]["equivalent"] < 16


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_branches_that_drop(family):
    prompts = three(family)
    recipe = [METHODS["fastv"], VCD()]
    together, _ = answers(vlmattn.wrap(build(family), recipe), left_padded(prompts), num_beams=3)
    for row, inputs in enumerate(prompts):
        alone, _ = answers(vlmattn.wrap(build(family), recipe), inputs, num_beams=3)
        assert together[row].tolist() == alone[0].tolist()


def test_eager_models_get_masks_they_can_add():
    prompts, recipe = three("llava"), [METHODS["fastv"], VCD()]
    wanted, _ = answers(vlmattn.wrap(build("llava"), recipe), left_padded(prompts))
    model = build("llava")
    model.set_attn_implementation("eager")
    assert torch.equal(answers(vlmattn.wrap(model, recipe), left_padded(prompts))[0], wanted)


def test_something_is_dropped_in_each_branch():
    """The answer is neither that of the rule alone, nor that of a rule whose other branch drops nothing."""
    inputs, whole = three("llava")[0], FastV(layer=2, keep_ratio=1.0)
    _, scores = answers(vlmattn.wrap(build("llava"), [METHODS["fastv"], VCD()]), inputs)
    for main, other in ((whole, whole), (METHODS["fastv"], whole)):
        streams = [continued("llava", main, inputs), continued("llava", other, noised(inputs))]
        _, logits = decode(streams, vcd, 1)
        assert (logits[0] - scores[0][0]).nan_to_num(0, 0, 0).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("fastv+vcd+pai", "beside them no attention edit can run"),
        ("fastv+opera", "needs all image tokens in every layer"),
        ("fastv+rbd", "a branch chooses among all image tokens"),
        (
            [PyramidDrop(layers="2", keep_ratios=(0.5,), positions="compact"), VCD()],
            "share position ids; use positions='original'",
        ),
    ],
)
def test_what_cannot_be_beside_each_other_is_named(recipe, reason):
    with pytest.raises(OptionError, match=re.escape(reason)):
        vlmattn.wrap(build("llava"), recipe)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}])
def test_ways_of_generating_that_cannot_be(options):
    model = vlmattn.wrap(build("llava"), [METHODS["fastv"], VCD()])
    with pytest.raises(UnsupportedError, match="drops tokens of several branches"):
        answers(model, three("llava")[0], **options)


def test_edits_beside_one_or_the_other():
    """Pruning with an edit, and an edit with a rule, run as before."""
    vlmattn.wrap(build("llava"), [METHODS["fastv"], PAI(layers="0:")])
    vlmattn.wrap(build("llava"), [PAI(layers="0:"), VCD()])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if not ZOO[name].unbuildable])
def test_every_family_drops_beside_a_rule_or_says_why_not(name):
    """A padded batch gives each row what it gets alone, and dropping is hiding."""
    tiny, prompts = ZOO[name], [ZOO[name].prompt(1, words, words) for words in (5, 8)]

    def logits(inputs, mode="drop"):
        model = vlmattn.wrap(tiny.build(), [FastV(layer=2, keep_ratio=0.25, mode=mode), VCD()])
        found = answers(model, inputs, suppress_tokens=[96, 97, 98, 99])[1]
        return torch.stack(found, 1).nan_to_num(neginf=0)

    try:
        alone = [logits(each.inputs)[0] for each in prompts]
    except VlmattnError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        pytest.skip(str(error))
    torch.testing.assert_close(logits(prompts[0].inputs, "mask")[0], alone[0], rtol=0, atol=1e-3)
    if not tiny.padding:
        for found, wanted in zip(logits(padded(tiny, prompts)), alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
