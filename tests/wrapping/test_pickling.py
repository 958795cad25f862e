"""Wrapped models are pickled whole and read again as they were, or it is refused before anything is written."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny import build, prompt

import vlmattn
from vlmattn import StateError
from vlmattn.decoding import Branch, Contrast, ContrastiveDecoding
from vlmattn.wrapping import record_of
from vlmattn.wrapping.record import WRAPPED

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:va[rf]|vlmattn:UserWarning")]

FITTING = (
    "agla",
    "duo",
    "focus",
    "gift",
    "gift_13b",
    "gift_qwen2_vl",
    "heads_amplify",
    "heads_block",
    "heads_cut",
    "icd",
    *(f"{name}{draw}" for name in ("nullu", "steer", "vti") for draw in ("", "_random")),
)
PRESETS = sorted(set(vlmattn.presets()) - {*FITTING, "mma", "razor", "vaf"})  # those that want files or a processor


def answer(model, **inputs):
    return model.generate(**(inputs or prompt("llava")), max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_pickled_model_is_wrapped_with_the_same_recipe(name):
    model = vlmattn.wrap(build("llava"), name)
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.vlmattn.recipe == model.vlmattn.recipe
    assert loaded.vlmattn is not model.vlmattn
    assert torch.equal(answer(loaded), answer(model))
    assert loaded.vlmattn.report() == model.vlmattn.report()
    assert record_of(loaded) in WRAPPED
    vlmattn.unwrap(loaded)
    assert "vlmattn" not in loaded.__dict__
    assert loaded.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(answer(loaded), answer(build("llava")))
    assert torch.equal(answer(model), answer(vlmattn.wrap(build("llava"), name))), "the first one is as it was"


def test_torch_save_and_state():
    """What was set, what was counted, and whether it is enabled go along."""
    model, file = vlmattn.wrap(build("qwen2_5_vl"), "pai"), io.BytesIO()
    model.vlmattn.set(
        "sofa+pai",
    )
    model.vlmattn.disable()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert loaded.vlmattn.report() == model.vlmattn.report()
    assert not loaded.vlmattn.enabled
    inputs = prompt("qwen2_5_vl")
    for one in (loaded, model):
        one.vlmattn.enable()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_another_process_reads_it(tmp_path):
    """One that has not wrapped anything, like a worker that was spawned."""
    model, file = vlmattn.wrap(build("qwen2_5_vl"), "pai"), tmp_path / "model.pt"
    torch.save((model, prompt("qwen2_5_vl")), file)
    wanted = model(**prompt("qwen2_5_vl")).logits
    script = f"""
        import torch
        torch.set_num_threads(1)
        model, inputs = torch.load({str(file)!r}, weights_only=False)
        with torch.no_grad():
            torch.save(model(**inputs).logits, {str(tmp_path / "logits.pt")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, cwd=Path(vlmattn.__file__).parents[1])
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), wanted, rtol=0, atol=1e-5)


def refused(model, match):
    with pytest.raises(StateError, match=match) as caught:
        pickle.dumps(model)
    assert "\n" not in str(caught.value)
    copied = copy.deepcopy(model)
    assert torch.equal(answer(copied), answer(model)), "copies go on working"


def test_what_cannot_be_read_again_is_not_written():
    rule = ContrastiveDecoding((Branch(name="b", prompt=lambda ids: ids),), Contrast((1.0,)))
    refused(vlmattn.wrap(build("llava"), rule), r"cannot be pickled while it is wrapped.*unwrap it first")


def test_hooks_that_cannot_be_written_are_named():
    """transformers hangs local functions on a model that runs."""
    model = vlmattn.wrap(build("llava"), "pai")
    answer(model)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(vlmattn.unwrap(model))  # the premise: so it is with the bare model
    refused(vlmattn.wrap(model, "pai"), r"has the hook install_output.*before it runs, or use save_pretrained")
