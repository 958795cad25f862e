"""Head scores against oracles that share none of their mechanism: hooks on ``o_proj``, eager attention, loops."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from numerics import near
from tiny import FAMILIES, IMAGE_TOKEN, build, left_padded, prompt

import vlmattn
from vlmattn import HeadProfile, InputError, OptionError, UnsupportedError
from vlmattn.inspection import Conflict, find_heads, score_heads
from vlmattn.models import find_family

LAYERS, HEADS, DIM = 4, 4, 8
WORDS = (10, 11, 12)  # all that ``copier`` says


def table(values):
    return torch.tensor(values)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def head_outputs(model, inputs):
    """Head outputs ``[layers, heads, dim]`` at the last row: what enters every ``o_proj`` of the bare model."""
    seen = []
    with ExitStack() as stack, torch.no_grad():
        for layer in find_family(model).layers(model):
            hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            stack.callback(hook.remove)
        model(**inputs)
    return torch.stack([out[0, -1].unflatten(-1, (HEADS, -1)) for out in seen])


def right_padded(prompts):
    batch = left_padded(prompts)
    order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
    return {k: v.gather(1, order) if v.shape == order.shape else v for k, v in batch.items()}


def copier(family, attn="sdpa", seed=0):
    """A model that says nothing but ``WORDS``."""
    model = build(family, attn, seed)
    head = model.lm_head.weight.data
    kept = head[list(WORDS)].clone()
    head.zero_()
    head[list(WORDS)] = torch.stack([kept[0], -kept[0], kept[2]])  # one of them is always above zero
    return model


def worded(family, **options):
    """A prompt whose text is made of ``WORDS``."""
    inputs = prompt(family, **options)
    ids = inputs["input_ids"]
    inputs["input_ids"] = torch.where((ids > 1) & (ids < 90), 10 + ids % 3, ids)
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_vhd_and_means_by_hand(family):
    model, inputs = build(family), [prompt(family, words=6, seed=s) for s in range(3)]
    distances, outputs = [], []
    for item in inputs:
        ids = item["input_ids"][item["input_ids"] != IMAGE_TOKEN][None]
        outputs.append(head_outputs(model, item))
        blind = head_outputs(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        distances.append((outputs[-1] - blind).norm(dim=-1))
    found = score_heads(model, inputs, answer_tokens=1, prompts=("what?",), seed=3)
    near(table(found.scores["vhd"]), torch.stack(distances).mean(0))
    near(table(found.means), torch.stack(outputs).mean(0))
    assert table(found.scores["vhd"]).std() > 0.1
    assert (found.prompts, found.seed) == (("what?",), 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_is_the_eager_attention_on_the_image(family):
    inputs, expected = [prompt(family, words=6, seed=s) for s in range(3)], torch.zeros(LAYERS, HEADS)
    eager = build(family, "eager")
    for item in inputs:
        with torch.no_grad():
            attentions = eager(**item, output_attentions=True).attentions
        visual = item["input_ids"][0] == IMAGE_TOKEN
        expected += torch.stack([a[0, :, -1, visual].sum(-1) for a in attentions]) / 3
    for attn in ("sdpa", "eager"):
        found = score_heads(build(family, attn), inputs, answer_tokens=1)
        near(table(found.scores["visual"]), expected)
    assert expected.std() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_retrieval_by_hand(family):
    """One token after another, every step a whole forward of an eager model."""
    eager, model = copier(family, "eager"), copier(family)
    inputs = [worded(family, words=10, seed=s) for s in range(3)]
    hits, steps = torch.zeros(LAYERS, HEADS), 0
    for item in inputs:
        current, length = dict(item), item["input_ids"].shape[1]
        text = (item["input_ids"][0] != IMAGE_TOKEN).nonzero().flatten()
        for _ in range(5):
            out = eager(**current, output_attentions=True)
            token = int(out.logits[0, -1].argmax())
            for layer, attention in enumerate(out.attentions):
                for head in range(HEADS):
                    best = text[attention[0, head, -1, :length][text].argmax()]
                    hits[layer, head] += int(item["input_ids"][0, best]) == token
            steps += 1
            for name in {"attention_mask", "mm_token_type_ids"} & current.keys():
                current[name] = torch.nn.functional.pad(current[name], (0, 1), value=int(name == "attention_mask"))
            current["input_ids"] = torch.cat([current["input_ids"], torch.tensor([[token]])], 1)
    found = score_heads(model, inputs, answer_tokens=5)
    torch.testing.assert_close(table(found.scores["retrieval"]), hits / steps)
    assert hits.max() > 0
    assert hits.min() < steps
    assert steps == 15


def test_nothing_copied_and_nothing_said():
    model, inputs = copier("llava"), [prompt("llava", words=6)]
    assert not (torch.isin(inputs[0]["input_ids"], torch.tensor(WORDS))).any()
    assert table(score_heads(model, inputs).scores["retrieval"]).eq(0).all()
    inputs = [worded("llava", words=6)]
    assert table(score_heads(model, inputs).scores["retrieval"]).any()
    model.generation_config.eos_token_id = list(WORDS)  # the end is no copy
    assert table(score_heads(model, inputs).scores["retrieval"]).eq(0).all()


def test_a_placeholder_in_the_answer_ends_it():
    model = copier("llava")
    model.lm_head.weight.data[IMAGE_TOKEN] = 50 * model.lm_head.weight.data[WORDS[0]]
    score_heads(model, [worded("llava", seed=s) for s in range(4)])


@pytest.mark.parametrize("padded", [left_padded, right_padded])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_invisible(family, padded):
    model = copier(family)
    prompts = [worded(family, words=4, seed=1), worded(family, words=9, images=2, seed=2), worded(family, seed=3)]
    singles, batch = score_heads(model, prompts), score_heads(model, [padded(prompts)])
    for name in ("vhd", "visual", "retrieval"):
        near(table(batch.scores[name]), table(singles.scores[name]))
        assert table(singles.scores[name]).any()
    near(table(batch.means), table(singles.means))


def brute_force(model, samples, means=None):
    """One head at a time, by the slice of what enters its ``o_proj``."""

    def margin(sample):
        logits = model(**sample.inputs).logits[0, -1]
        return logits[sample.a] - logits[sample.b]

    effect = torch.zeros(LAYERS, HEADS)
    for sample in samples:
        before = margin(sample)
        for layer, module in enumerate(find_family(model).layers(model)):
            for head in range(HEADS):

                def replace(_, args, layer=layer, head=head):
                    out = args[0].clone()
                    out[..., head * DIM : (head + 1) * DIM] = 0 if means is None else means[layer, head]
                    return (out,)

                hook = module.self_attn.o_proj.register_forward_pre_hook(replace)
                effect[layer, head] += (margin(sample) - before).abs()
                hook.remove()
    return effect / len(samples)


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["mean", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_causal_equals_one_head_at_a_time(family, ablation):
    model = build(family)
    samples = [Conflict(prompt(family, images=n, words=6, seed=n), 7 + n, 30) for n in (1, 2)]
    means = torch.stack([head_outputs(model, sample.inputs) for sample in samples]).mean(0)
    expected = brute_force(model, samples, means if ablation == "mean" else None)
    for size in (1, 3, 8):
        found = find_heads(model, samples, ablation=ablation, batch_size=size, progress=False)
        near(table(found.scores["causal"]), expected)
    near(table(found.means), means)
    assert expected.std() > 0.01
    assert expected.amax() > 10 * expected.amin()


def test_a_planted_decisive_head_comes_first():
    model = build("llava")
    with torch.no_grad():
        for number, layer in enumerate(find_family(model).layers(model)):
            kept = layer.self_attn.o_proj.weight[:, 2 * DIM : 3 * DIM].clone()
            layer.self_attn.o_proj.weight.zero_()
            if number == 1:
                layer.self_attn.o_proj.weight[:, 2 * DIM : 3 * DIM] = kept
    found = find_heads(model, [Conflict(prompt("llava", seed=s), 5, 6) for s in range(2)], progress=False)
    assert found.top("causal", 0.05) == ((1, 2),)
    effects = table(found.scores["causal"])
    assert (effects > 1e-3 * effects.amax()).sum() == 1  # up to rounding nothing else has any


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapped_model_is_measured_bare_and_stays_as_it_was(family):
    model, inputs = copier(family), [worded(family, words=6)]
    samples = [Conflict(inputs[0], 10, 11)]
    head_outputs(model, inputs[0])  # transformers adds hooks of its own in a first forward
    count = hooks(model)
    before = score_heads(model, inputs), find_heads(model, samples, progress=False)
    assert hooks(model) == count
    assert "vlmattn" not in model.__dict__
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    with vlmattn.applied(model, "vhr", alpha=5.0):
        with torch.no_grad():
            edited = model(**inputs[0]).logits
        handle, report = model.vlmattn, model.vlmattn.report()
        assert before == (score_heads(model, inputs), find_heads(model, samples, progress=False))
        assert model.vlmattn is handle
        assert handle.report() == report
        assert handle.enabled
        broken = {**inputs[0], "pixel_values": torch.zeros(1, 2)}
        for measure in (lambda: score_heads(model, [broken]), lambda: find_heads(model, [Conflict(broken, 1, 2)])):
            with pytest.raises(Exception):  # noqa: B017, PT011 (whatever the model says)
                measure()
            assert model.vlmattn is handle
        with torch.no_grad():
            assert torch.equal(model(**inputs[0]).logits, edited)
        handle.disable()
        assert score_heads(model, inputs) == before[0]
        assert not handle.enabled
    assert hooks(model) == count


def test_profiles_are_saved_and_belong_to_one_model(tmp_path):
    model, inputs = build("llava"), prompt("llava")
    for found in (score_heads(model, [inputs]), find_heads(model, [Conflict(inputs, 5, 6)], progress=False)):
        assert HeadProfile.load(found.save(tmp_path)) == found
        found.check(find_family(model).anatomy(model), "here")
        other = build("qwen2_5_vl")
        with pytest.raises(OptionError, match="another language model"):
            found.check(find_family(other).anatomy(other), "here")


def test_the_bar_can_be_silent(capsys):
    model, samples = build("llava"), [Conflict(prompt("llava"), 5, 6)]
    find_heads(model, samples, progress=False)
    assert capsys.readouterr().err == ""
    find_heads(model, samples)
    assert "heads: 100%" in capsys.readouterr().err


def test_what_cannot_be_measured_is_said():
    model, inputs = build("llava"), prompt("llava")
    sample = Conflict(inputs, 5, 6)
    text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    for error, match, measure in (
        (OptionError, "answer_tokens", lambda: score_heads(model, [inputs], answer_tokens=0)),
        (InputError, "at least one processor output", lambda: score_heads(model, [])),
        (InputError, "no image tokens", lambda: score_heads(model, [text])),
        (OptionError, "'mean' or 'zero'", lambda: find_heads(model, [sample], ablation="noise")),
        (OptionError, "batch_size", lambda: find_heads(model, [sample], batch_size=0)),
        (InputError, "at least one Conflict", lambda: find_heads(model, [])),
        (InputError, "two token ids below 100", lambda: find_heads(model, [Conflict(inputs, 5, 5)])),
        (InputError, "two token ids below 100", lambda: find_heads(model, [Conflict(inputs, 5, 100)])),
        (InputError, "one prompt", lambda: find_heads(model, [Conflict(left_padded([inputs, inputs]), 5, 6)])),
        (UnsupportedError, "not a transformers", lambda: score_heads(torch.nn.Linear(1, 1), [inputs])),
    ):
        with pytest.raises(error, match=match):
            measure()
