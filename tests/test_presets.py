"""Every preset answers on the bundled model, acts, and leaves the model as it was: one short test for each method."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import vlmattn
from vlmattn.evals.prompts import encode
from vlmattn.evals.suites import World
from vlmattn.options import checked_against, paper_id

# What these look for does not occur here: sinks as large as tau, prompts longer than a window, videos.
IDLE = {
    "none", "var", "var_general", "var_official", "var_vision", "knockout_as_many", "knockout_others", "knockout_sinks",
    "duo", "razor", "evs", "vidcom2",
}  # fmt: skip


@pytest.fixture(scope="module")
def bundled():
    """The model, a padded batch of prompts with two images each, and the bare model's logits."""
    model, processor = vlmattn.load("embedded")
    world = World("clear", count=4, seed=0)
    pictures = [world.image(number)[0] for number in range(4)]
    inputs = encode(model, processor, ["is there a cup?", "what is in the images?"], [pictures[:2], pictures[2:]])
    with torch.no_grad():
        return model, inputs, model(**inputs).logits


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("preset", vlmattn.presets())
def test_a_preset_answers_and_goes(bundled, preset):
    model, inputs, bare = bundled
    pixels = inputs["pixel_values"]
    more = {"branch_inputs": {"augmented": {"pixel_values": pixels / 2}}} if preset == "agla" else {}
    before = hooks(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore" if preset in IDLE else "error", UserWarning)  # "never fired"
        with vlmattn.applied(model, preset):
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False, **more)
            fired = model.vlmattn.report()["fired"]
        assert len(out) == 2
        assert out.shape[1] > inputs["input_ids"].shape[1]
        assert all(fired.values()) != (preset in IDLE - {"none"})
        assert torch.equal(model(**inputs).logits, bare)
    assert hooks(model) == before


@pytest.mark.parametrize(
    ("about", "faithful", "short"),
    [
        ("paper constants", "golden", "golden"),
        ("defaults", "golden (attention part)", "golden"),
        ("experimental constant", "golden (attention part)", "experimental"),
        ("constants", "Experimental: no code was released", "experimental"),
        ("constants", "paper text, no code", "paper text"),
    ],
)
def test_what_vouches_for_a_preset_in_short(about, faithful, short):
    assert checked_against(about, faithful) == short


def test_papers_in_short():
    assert paper_id("arXiv:2412.13949 (ACL 2025)") == "2412.13949"
    assert paper_id("none") == "none"
