"""Fitted directions move attention to the span on prompts that were not seen, and the model stays as it was."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from tiny import FAMILIES, IMAGE_TOKEN, build, left_padded, prompt

import vlmattn
from vlmattn import InputError, OptionError
from vlmattn.inspection import Span, fit_directions
from vlmattn.models import find_family

CHOSEN = [(1, 0), (1, 1), (3, 2)]


def span(family, seed, words=6):
    """The image is what matters."""
    inputs = prompt(family, words=words, seed=seed)
    slots = (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero().flatten()
    return Span(inputs, int(slots[0]), int(slots[-1]) + 1)


def added(model, tensors):
    """Plain hooks that add the directions to the projections."""
    stack = ExitStack()
    for name, value in tensors.items():
        side, layer = name.split(".")
        module = find_family(model).projections(find_family(model).layers(model)[int(layer)])[1 + (side == "key")]
        hook = module.register_forward_hook(lambda _, args, out, value=value: out + value.flatten())
        stack.callback(hook.remove)
    return stack


@torch.no_grad()
def mass(model, example):
    """Attention of the last row on the span ``[layers, heads]``, by the eager implementation."""
    attentions = model(**example.inputs, output_attentions=True).attentions
    return torch.stack([a[0, :, -1, example.start : example.stop].sum(-1) for a in attentions])


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_moves_to_the_span_on_other_prompts(family):
    examples = [span(family, s) for s in range(40)]
    tensors = fit_directions(build(family), examples, CHOSEN, steps=150, lr=3e-2, progress=False)
    eager, others = build(family, "eager"), [span(family, s) for s in range(100, 120)]
    before = torch.stack([mass(eager, other) for other in others])
    with added(eager, tensors):
        after = torch.stack([mass(eager, other) for other in others])
    for layer, head in CHOSEN:
        assert after[:, layer, head].log().mean() > before[:, layer, head].log().mean() + 0.1, (layer, head)
    assert torch.equal(before[:, 0], after[:, 0])  # no direction below layer 1


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_loss_is_minus_the_mean_log_mass_and_falls(attn, capsys):
    model, eager, examples = build("llava", attn), build("llava", "eager"), [span("llava", s) for s in range(3)]
    fit_directions(model, examples, CHOSEN, steps=1)
    expected = -torch.stack([mass(eager, e)[layer, head].log() for e in examples for layer, head in CHOSEN]).mean()
    assert f"loss={expected:.3f}" in capsys.readouterr().err


def test_only_what_is_chosen_is_fitted():
    tensors = fit_directions(build("llava"), [span("llava", 0)], CHOSEN, steps=3, progress=False)
    assert set(tensors) == {"query.1", "query.3", "key.1", "key.3"}
    assert all(t.dtype == torch.float32 and not t.requires_grad and t.device.type == "cpu" for t in tensors.values())
    moved = {name: value.ne(0).any(-1).tolist() for name, value in tensors.items()}
    assert moved["query.1"] == [True, True, False, False]
    assert moved["query.3"] == [False, False, True, False]
    assert moved["key.1"] == [True, False]
    assert moved["key.3"] == [False, True]


def test_the_seed_decides_the_draw():
    model, examples = build("llava"), [span("llava", s) for s in range(12)]
    one, same, other = (fit_directions(model, examples, CHOSEN, steps=3, seed=s, progress=False) for s in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_stays_as_it_was(family):
    model, example = build(family), span(family, 0)
    model(**example.inputs)  # transformers adds hooks of its own in a first forward
    model.requires_grad_(False)
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(True)
    before, wanted, count = state(model), [p.requires_grad for p in model.parameters()], hooks(model)
    logits = model(**example.inputs).logits.detach()
    with torch.inference_mode():
        inside = fit_directions(model, [example], CHOSEN, steps=3, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert wanted == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(**example.inputs).logits, logits)
    with pytest.raises(InputError):
        fit_directions(model, [example, Span(example.inputs, 0, 10**6)], CHOSEN, progress=False)
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever the model says)
        fit_directions(model, [Span({**example.inputs, "pixel_values": torch.zeros(1, 2)}, 0, 2)], CHOSEN)
    assert hooks(model) == count
    assert "vlmattn" not in model.__dict__
    with vlmattn.applied(model, "vhr", alpha=5.0):
        handle = model.vlmattn
        wrapped = fit_directions(model, [example], CHOSEN, steps=3, progress=False)
        assert model.vlmattn is handle
        assert not handle.report()["backends"]
    assert all(torch.equal(inside[name], wrapped[name]) for name in inside)
    assert hooks(model) == count


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_focus_reads_what_is_saved(family, tmp_path):
    model, example = build(family), span(family, 0)
    tensors = fit_directions(model, [example], CHOSEN, steps=20, lr=0.1, progress=False, path=tmp_path)
    bare = model(**example.inputs).logits
    with added(model, tensors):
        expected = model(**example.inputs).logits
    with vlmattn.applied(model, "focus", file=str(tmp_path / "vlmattn_directions.safetensors")):
        torch.testing.assert_close(model(**example.inputs).logits, expected, rtol=1e-4, atol=1e-5)
        again = fit_directions(model, [example], CHOSEN, steps=20, lr=0.1, progress=False)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)  # fitted from the bare model
    assert (bare - expected).abs().max() > 0.01


def test_what_cannot_be_fitted_is_said():
    model, example = build("llava"), span("llava", 0)
    batch = left_padded([example.inputs, prompt("llava", words=3)])
    for error, match, arguments, options in (
        (OptionError, "within 4 layers and 4 heads", ([example], []), {}),
        (OptionError, "within 4 layers and 4 heads", ([example], [(4, 0)]), {}),
        (OptionError, "within 4 layers and 4 heads", ([example], [(0, -1)]), {}),
        (OptionError, "steps", ([example], CHOSEN), {"steps": 0}),
        (OptionError, "lr", ([example], CHOSEN), {"lr": 0.0}),
        (InputError, "at least one Span", ([], CHOSEN), {}),
        (InputError, "span 3..3", ([Span(example.inputs, 3, 3)], CHOSEN), {}),
        (InputError, "span -1..3", ([Span(example.inputs, -1, 3)], CHOSEN), {}),
        (InputError, "one prompt", ([Span(batch, 0, 3)], CHOSEN), {}),
    ):
        with pytest.raises(error, match=match):
            fit_directions(model, *arguments, **options)
