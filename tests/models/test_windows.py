"""Edits and branches in language models with sliding windows that the prompt, or the answer, outgrows."""

from __future__ import annotations

import pytest
import torch
from tiny import IMAGE_TOKEN, generate, left_padded, prompt, windowed

import vlmattn
from vlmattn import PAI, VAR, VHR, Bidirectional, Knockout, SoFA, UnsupportedError

pytestmark = pytest.mark.usefixtures("no_grad")

NEW, WINDOW = 8, 24
EDITS = {
    "pai": PAI(alpha=0.9, layers="0:"),
    "var": VAR(tau=1.2, keep=0.2, dims=(3, 5), max_sink=1.0, min_visual=0.0, layers="0:"),
    "extended": VAR(tau=1.2, keep=0.2, dims=(3, 5), max_sink=1.0, min_visual=0.0, layers="0:", extend=True),
    "vhr": VHR(layers="0:"),
    "bidirectional": Bidirectional(span="prompt", layers="0:"),
    "sofa": SoFA(sigma=0.5, layers="0:"),
    "knockout": Knockout(layers="0:"),
}


def answer(model, inputs, new=NEW, **options):
    """Logits of greedy generation; placeholders are not written, which ``use_cache=False`` would take for images."""
    return generate(model, inputs, new, suppress_tokens=[IMAGE_TOKEN], **options)


def prompts() -> list[dict[str, torch.Tensor]]:
    """Image tokens that leave the window while the prompt is read, and while the answer is written."""
    return [prompt("llava", words=12), prompt("llava", words=3, seed=3), prompt("llava", images=2, words=5, seed=4)]


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("name", EDITS)
def test_cached_decoding_equals_recomputing_and_the_reference(name, kind, monkeypatch):
    inputs = left_padded(prompts())
    bare = answer(windowed(WINDOW, kind), inputs, NEW)
    model = vlmattn.wrap(windowed(WINDOW, kind), EDITS[name])
    cached = answer(model, inputs, NEW)
    assert model.vlmattn.report()["fired"][EDITS[name].info.name]
    assert (cached - bare).abs().max() > 1e-3
    torch.testing.assert_close(answer(model, inputs, NEW, use_cache=False), cached, rtol=0, atol=2e-4)
    for row, one in enumerate(prompts()):
        torch.testing.assert_close(answer(model, one, NEW)[0], cached[row], rtol=0, atol=2e-4)
    eager = vlmattn.wrap(windowed(WINDOW, kind, "eager"), EDITS[name])
    torch.testing.assert_close(answer(eager, inputs, NEW), cached, rtol=0, atol=2e-4)
    monkeypatch.setenv("VLMATTN_BACKEND", "reference")
    torch.testing.assert_close(answer(model, prompts()[0], 2)[0], cached[0, :2], rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("name", EDITS)
def test_drafts_behind_a_window_are_edited_like_single_tokens(name, kind):
    """Wrong ones too, which are taken back; the images have left the window, or leave it now."""
    model, other = vlmattn.wrap(windowed(WINDOW, kind), EDITS[name]), windowed(WINDOW, kind, seed=1)
    for inputs in prompts():
        wanted = answer(model, inputs, NEW)
        for assistant in (other, model):
            found = answer(model, inputs, NEW, assistant_model=assistant)
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["pai", "var"])
def test_a_window_that_is_never_reached_changes_nothing(name):
    inputs = left_padded(prompts())
    wide, never = (answer(vlmattn.wrap(windowed(size), EDITS[name]), inputs, NEW) for size in (200, 10**6))
    torch.testing.assert_close(wide, never)


def test_opened_edges_stay_within_the_window():
    """Against the bare model with the mask written out."""
    inputs, model = prompts()[0], windowed(WINDOW)
    slots = torch.arange(inputs["input_ids"].shape[1])
    ahead = slots - slots[:, None]
    wanted = model(**{**inputs, "attention_mask": (ahead.abs() < WINDOW)[None, None]}).logits
    unbounded = model(**{**inputs, "attention_mask": (-ahead < WINDOW)[None, None]}).logits
    found = vlmattn.wrap(model, Bidirectional(span="prompt", layers="0:"))(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (wanted - unbounded).abs().max() > 1e-3, "some edge must be longer than the window"


def test_a_second_turn_sees_what_is_left_of_the_first():
    inputs, more = prompts()[2], torch.randint(5, 90, (1, 6), generator=torch.Generator().manual_seed(7))
    whole = torch.cat([inputs["input_ids"], more], 1)
    model = vlmattn.wrap(windowed(WINDOW, "qwen2"), EDITS["knockout"])
    wanted = model(**{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}).logits[:, -1]
    cache = model(**inputs, use_cache=True).past_key_values
    found = model(input_ids=more, attention_mask=torch.ones_like(whole), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


def test_beams_equal_those_without_a_cache():
    inputs = left_padded(prompts())
    model = vlmattn.wrap(windowed(WINDOW, "qwen2"), EDITS["var"])
    options = dict(
        num_beams=3,
        suppress_tokens=[IMAGE_TOKEN],
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))


def test_a_static_cache_must_not_outgrow_the_window():
    model = vlmattn.wrap(windowed(WINDOW), EDITS["pai"])
    still = dict(cache_implementation="static", disable_compile=True)
    with pytest.raises(UnsupportedError, match=r"static cache outgrows the sliding window of 24 tokens"):
        answer(model, prompts()[0], NEW, **still)
    wide = vlmattn.wrap(windowed(80), EDITS["pai"])
    torch.testing.assert_close(
        generate(wide, prompts()[0], NEW, **still), generate(wide, prompts()[0], NEW), rtol=0, atol=1e-4
    )
