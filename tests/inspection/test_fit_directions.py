"""Fitted directions move attention to the span on prompts that were not seen, and the model stays as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, IMAGE_TOKEN, build, left_padded, prompt, shifted_queries

import vlmattn
from vlmattn import InputError, OptionError
from vlmattn.inspection import Span, fit_directions

CHOSEN = [(1, 0), (1, 1), (3, 2)]


def span(family, seed, words=6):
    """The image is what matters."""
    inputs = prompt(family, words=words, seed=seed)
    slots = (inputs["input_ids"][0] == IMAGE_TOKEN).nonzero().flatten()
    return Span(inputs, int(slots[0]), int(slots[-1]) + 1)


def added(model, tensors):
    return shifted_queries(model, {int(name[6:]): value for name, value in tensors.items()})


@torch.no_grad()
def mass(model, example):
    """Mean attention of the answer on the span ``[layers, heads]``, by the eager implementation."""
    attentions = model(**example.inputs, output_attentions=True).attentions
    first = -1 if example.answer is None else example.answer
    return torch.stack([a[0, :, first:, example.start : example.stop].sum(-1).mean(-1) for a in attentions])


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_moves_to_the_spans(family):
    """In every chosen head on the examples, and in the mean over them on prompts that were not seen."""
    examples, others = [span(family, s) for s in range(20)], [span(family, s) for s in range(100, 120)]
    tensors = fit_directions(build(family), examples, CHOSEN, epochs=20, lr=3e-2, progress=False)
    eager = build(family, "eager")
    before = [torch.stack([mass(eager, one) for one in some]) for some in (examples, others)]
    with added(eager, tensors):
        after = [torch.stack([mass(eager, one) for one in some]) for some in (examples, others)]
    seen, unseen = (
        [(a - b).mean(0)[layer, head] for layer, head in CHOSEN] for a, b in zip(after, before, strict=True)
    )
    assert min(seen) > 0.05
    assert sum(unseen) > 0.05
    assert torch.equal(before[0][:, 0], after[0][:, 0])  # no direction below layer 1


@pytest.mark.parametrize("answer", [None, -4], ids=["last row", "answer"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_loss_is_minus_the_mean_mass_of_the_answer(attn, answer, capsys, monkeypatch):
    monkeypatch.setattr("vlmattn.inspection.directions._SMALL", 0.0)
    example = span("llava", 0)
    if answer is not None:
        example = replace(example, answer=example.inputs["input_ids"].shape[1] + answer)
    fit_directions(build("llava", attn), [example], CHOSEN, epochs=1)
    found = mass(build("llava", "eager"), example)
    expected = -torch.stack([found[layer, head] for layer, head in CHOSEN]).mean()
    assert f"loss={expected:.3f}" in capsys.readouterr().err


def test_it_starts_small_and_takes_a_step_of_adamw_for_each_example():
    """The first step of AdamW is lr in each number, whatever the gradient; later ones are at most about that."""
    model, examples = build("llava"), [span("llava", s) for s in range(6)]
    steps = [
        fit_directions(model, examples[:n], [(1, 0)], epochs=1, lr=5.0, progress=False)["query.1"][0] for n in (1, 6)
    ]
    assert steps[0].abs().sub(5).abs().max() < 0.4, (
        "numbers around 0 of standard deviation .01, shrunk by 1 %, and one step"
    )
    assert steps[1].abs().max() > 10
    start = fit_directions(model, examples[:1], [(1, 0)], epochs=1, lr=1e-9, progress=False)["query.1"][0]
    assert 0.003 < start.std() < 0.03


def test_only_what_is_chosen_is_fitted():
    tensors = fit_directions(build("llava"), [span("llava", 0)], CHOSEN, epochs=3, progress=False)
    assert set(tensors) == {"query.1", "query.3"}
    assert all(t.dtype == torch.float32 and not t.requires_grad and t.device.type == "cpu" for t in tensors.values())
    moved = {name: value.ne(0).any(-1).tolist() for name, value in tensors.items()}
    assert moved["query.1"] == [True, True, False, False]
    assert moved["query.3"] == [False, False, True, False]


def test_a_number_means_the_heads_that_look_most_at_the_spans():
    model, eager = build("llava"), build("llava", "eager")
    examples = [replace(span("llava", s), answer=20) for s in range(3)]
    tensors = fit_directions(model, examples, 5, epochs=1, progress=False)
    looks = torch.stack([mass(eager, example) for example in examples]).mean(0)
    top = {divmod(int(place), 4) for place in looks.flatten().topk(5).indices}
    assert {(int(name[6:]), h) for name, of in tensors.items() for h in range(4) if of[h].any()} == top
    whole = fit_directions(model, examples, 16, epochs=1, progress=False)
    assert all(value.any(-1).all() for value in whole.values())


def test_the_seed_decides_the_start_and_the_order():
    model, examples = build("llava"), [span("llava", s) for s in range(6)]
    one, same, other = (fit_directions(model, examples, CHOSEN, epochs=1, seed=s, progress=False) for s in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one)


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
        inside = fit_directions(model, [example], CHOSEN, epochs=3, progress=False)
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
        wrapped = fit_directions(model, [example], CHOSEN, epochs=3, progress=False)
        assert model.vlmattn is handle
        assert not handle.report()["backends"]
    assert all(torch.equal(inside[name], wrapped[name]) for name in inside)
    assert hooks(model) == count


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_focus_reads_what_is_saved(family, tmp_path):
    model, example = build(family), span(family, 0)
    tensors = fit_directions(model, [example], CHOSEN, epochs=20, lr=0.1, progress=False, path=tmp_path)
    bare = model(**example.inputs).logits
    with added(model, tensors):
        expected = model(**example.inputs).logits
    with vlmattn.applied(model, "focus", alpha=1.0, file=str(tmp_path / "vlmattn_directions.safetensors")):
        torch.testing.assert_close(model(**example.inputs).logits, expected, rtol=1e-4, atol=1e-5)
        again = fit_directions(model, [example], CHOSEN, epochs=20, lr=0.1, progress=False)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)  # fitted from the bare model
    assert (bare - expected).abs().max() > 0.01


def test_what_cannot_be_fitted_is_said():
    model, example = build("llava"), span("llava", 0)
    batch = left_padded([example.inputs, prompt("llava", words=3)])
    for error, match, arguments, options in (
        (OptionError, "within 4 layers and 4 heads", ([example], []), {}),
        (OptionError, "within 4 layers and 4 heads", ([example], [(4, 0)]), {}),
        (OptionError, "within 4 layers and 4 heads", ([example], [(0, -1)]), {}),
        (OptionError, "within 4 layers and 4 heads", ([example], 0), {}),
        (OptionError, "within 4 layers and 4 heads", ([example], 17), {}),
        (OptionError, "epochs", ([example], CHOSEN), {"epochs": 0}),
        (OptionError, "lr", ([example], CHOSEN), {"lr": 0.0}),
        (InputError, "at least one Span", ([], CHOSEN), {}),
        (InputError, "span 3..3", ([Span(example.inputs, 3, 3)], CHOSEN), {}),
        (InputError, "span -1..3", ([Span(example.inputs, -1, 3)], CHOSEN), {}),
        (InputError, "answer cannot begin at 999", ([Span(example.inputs, 0, 3, 999)], CHOSEN), {}),
        (InputError, "one prompt", ([Span(batch, 0, 3)], CHOSEN), {}),
    ):
        with pytest.raises(error, match=match):
            fit_directions(model, *arguments, **options)
