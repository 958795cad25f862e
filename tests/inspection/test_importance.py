"""Head importance against hooks on ``o_proj``, one head, one prompt and one answer token at a time."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from tiny import FAMILIES, build, left_padded, prompt
from zoo import ZOO, padded

import vlmattn
from vlmattn import HeadProfile, InputError, OptionError, UnsupportedError
from vlmattn.inspection import ablate_heads
from vlmattn.inspection.answers import answered
from vlmattn.models import find_family

LAYERS, HEADS, DIM = 4, 4, 8
STOPS = (2, 98, 99)  # the end, and what stands for an image


def table(profile):
    return torch.tensor(profile.scores["importance"])


def longer(inputs, tokens):
    """The prompt with tokens behind it."""
    found = dict(inputs)
    for name in {"attention_mask", "mm_token_type_ids"} & found.keys():
        found[name] = torch.nn.functional.pad(found[name], (0, len(tokens)), value=int(name == "attention_mask"))
    return found | {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)}


def greedy(model, inputs, most):
    said = []
    while len(said) < most:
        token = int(model(**longer(inputs, said)).logits[0, -1].argmax())
        if token in STOPS:
            break
        said.append(token)
    return said


def log_likelihood(model, inputs, answer):
    """A whole forward for each answer token."""
    rows = [model(**longer(inputs, answer[:n])).logits[0, -1].double() for n in range(len(answer))]
    return sum(float(row.log_softmax(-1)[token]) for row, token in zip(rows, answer, strict=True))


def last_outputs(model, inputs):
    """What enters every ``o_proj`` at the last row, ``[layers, heads, dim]``."""
    seen = []
    with ExitStack() as stack:
        for layer in find_family(model).layers(model):
            hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            stack.callback(hook.remove)
        model(**inputs)
    return torch.stack([out[0, -1].unflatten(-1, (HEADS, -1)) for out in seen])


def brute_force(model, inputs, answers, means=None):
    found, tokens = torch.zeros(LAYERS, HEADS, dtype=torch.float64), sum(map(len, answers))
    for item, answer in zip(inputs, answers, strict=True):
        before = log_likelihood(model, item, answer)
        for layer, module in enumerate(find_family(model).layers(model)):
            for head in range(HEADS):

                def replace(_, args, layer=layer, head=head):
                    out = args[0].clone()
                    out[..., head * DIM : (head + 1) * DIM] = 0 if means is None else means[layer, head]
                    return (out,)

                hook = module.self_attn.o_proj.register_forward_pre_hook(replace)
                found[layer, head] += (before - log_likelihood(model, item, answer)) / tokens
                hook.remove()
    return found.float()


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["mean", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_importance_equals_one_head_at_a_time(family, ablation):
    model = build(family)
    inputs = [prompt(family, images=n, words=6, seed=n) for n in (1, 2)]
    answers = [greedy(model, item, 3) for item in inputs]
    assert all(answers)
    means = torch.stack([last_outputs(model, item) for item in inputs]).mean(0)
    expected = brute_force(model, inputs, answers, means if ablation == "mean" else None)
    for size in (1, 3, 8):
        found = ablate_heads(model, inputs, answer_tokens=3, ablation=ablation, batch_size=size, progress=False)
        torch.testing.assert_close(table(found), expected, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(torch.tensor(found.means), means, rtol=1e-4, atol=1e-5)
    assert expected.max() > 0.05


@torch.no_grad()
def test_answers_of_ones_own():
    model, inputs, answers = build("llava", "eager"), [prompt("llava", seed=s) for s in range(2)], [[7, 30, 2], [50]]
    found = ablate_heads(model, inputs, answers=answers, ablation="zero", progress=False, prompts=("what?",), seed=3)
    torch.testing.assert_close(table(found), brute_force(model, inputs, answers), rtol=1e-3, atol=2e-5)
    assert (found.prompts, found.seed, tuple(found.scores)) == (("what?",), 3, ("importance",))
    assert table(found).min() < -0.01  # some are in the way of such answers


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_invisible(family):
    """Answers in a batch have several lengths too."""
    model = build(family)
    prompts = [prompt(family, words=4, seed=1), prompt(family, words=9, images=2, seed=2), prompt(family, seed=3)]
    batch = left_padded(prompts)
    order = batch["attention_mask"].argsort(dim=1, descending=True, stable=True)
    right = {k: v.gather(1, order) if v.shape == order.shape else v for k, v in batch.items()}
    answers = [[7, 8], [9], [10, 11, 12]]
    for given in (None, answers):
        alone = ablate_heads(model, prompts, answers=given, batch_size=5, progress=False)
        for item in (batch, right):
            found = ablate_heads(model, [item], answers=given, batch_size=5, progress=False)
            torch.testing.assert_close(table(found), table(alone), rtol=1e-3, atol=2e-5)
            torch.testing.assert_close(torch.tensor(found.means), torch.tensor(alone.means), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "paligemma", "gemma3", "kimi_k25"])
def test_an_answer_is_read_as_it_was_written(name):
    """PaliGemma's prompt sees itself both ways, but not the answer."""
    tiny = ZOO[name]
    model, inputs = tiny.build(), tiny.prompt().inputs
    settings = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    out = model.generate(**inputs, **settings)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    logits = model(**answered(model, dict(inputs), answer), use_cache=False).logits[:, -answer.shape[1] - 1 : -1]
    torch.testing.assert_close(logits, torch.stack(out.logits, 1), rtol=1e-4, atol=1e-4)


def test_padding_is_invisible_where_prompts_see_themselves_both_ways():
    tiny = ZOO["paligemma"]
    model, prompts = tiny.build(), [tiny.prompt(words=words, seed=words) for words in (3, 6)]
    alone = ablate_heads(model, [item.inputs for item in prompts], answers=[[5, 6], [7]], progress=False)
    found = ablate_heads(model, [padded(tiny, prompts)], answers=[[5, 6], [7]], progress=False)
    torch.testing.assert_close(table(found), table(alone), rtol=1e-3, atol=2e-5)


def test_a_planted_head_comes_first_and_helps():
    """The only head that says anything, in a model that answers what it says."""
    model = build("llava")
    with torch.no_grad():
        for number, layer in enumerate(find_family(model).layers(model)):
            kept = layer.self_attn.o_proj.weight[:, 2 * DIM : 3 * DIM].clone()
            layer.self_attn.o_proj.weight.zero_()
            if number == 1:
                layer.self_attn.o_proj.weight[:, 2 * DIM : 3 * DIM] = 4 * kept
    found = ablate_heads(model, [prompt("llava", seed=s) for s in range(3)], ablation="zero", progress=False)
    assert found.top("importance", 0.05) == ((1, 2),)
    assert table(found)[1, 2] > 0.1
    assert table(found).count_nonzero() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapped_model_is_measured_bare_and_stays_as_it_was(family):
    model, inputs = build(family), [prompt(family, words=6)]
    before = ablate_heads(model, inputs, progress=False)
    assert "vlmattn" not in model.__dict__
    with vlmattn.applied(model, "vhr", alpha=5.0):
        handle, report = model.vlmattn, model.vlmattn.report()
        assert ablate_heads(model, inputs, progress=False) == before
        assert model.vlmattn is handle
        assert handle.report() == report


def test_presets_act_on_these_heads(tmp_path):
    model, inputs = build("llava"), prompt("llava")
    path = ablate_heads(model, [inputs], progress=False).save(tmp_path)
    plain = model(**inputs).logits
    for ablation in ("zero", "mean"):
        options = dict(profile=str(path), score="importance", ablation=ablation, share=0.2)
        with vlmattn.applied(model, "heads_block", **options):
            assert not torch.equal(model(**inputs).logits, plain)
    assert HeadProfile.load(path).means


def test_the_bar_can_be_silent(capsys):
    ablate_heads(build("llava"), [prompt("llava")], progress=False)
    assert capsys.readouterr().err == ""
    ablate_heads(build("llava"), [prompt("llava")])
    assert "heads: 100%" in capsys.readouterr().err


def test_what_cannot_be_measured_is_said():
    model, inputs = build("llava"), prompt("llava")
    text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    silent, hybrid = build("llava"), ZOO["lfm2_vl"]
    silent.generation_config.eos_token_id = list(range(100))
    for error, match, measure in (
        (OptionError, "answer_tokens", lambda: ablate_heads(model, [inputs], answer_tokens=0)),
        (OptionError, "'mean' or 'zero'", lambda: ablate_heads(model, [inputs], ablation="noise")),
        (OptionError, "batch_size", lambda: ablate_heads(model, [inputs], batch_size=0)),
        (InputError, "at least one processor output", lambda: ablate_heads(model, [])),
        (InputError, "put it in a list", lambda: ablate_heads(model, inputs)),
        (InputError, "no image tokens", lambda: ablate_heads(model, [text])),
        (InputError, "answers are empty", lambda: ablate_heads(silent, [inputs])),
        (InputError, "1 answers were given for 2 prompts", lambda: ablate_heads(model, [inputs] * 2, answers=[[5]])),
        (InputError, "one or more ids", lambda: ablate_heads(model, [inputs], answers=[[]])),
        (InputError, "text tokens below 100", lambda: ablate_heads(model, [inputs], answers=[[100]])),
        (InputError, "text tokens below 100", lambda: ablate_heads(model, [inputs], answers=[[-1]])),
        (InputError, "text tokens below 100", lambda: ablate_heads(model, [inputs], answers=[[5, 99]])),
        (UnsupportedError, "layers without attention", lambda: ablate_heads(hybrid.build(), [hybrid.prompt().inputs])),
        (UnsupportedError, "not a transformers", lambda: ablate_heads(torch.nn.Linear(1, 1), [inputs])),
    ):
        with pytest.raises(error, match=match):
            measure()
