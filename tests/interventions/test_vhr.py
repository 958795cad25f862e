"""VHR has no golden (no released code was to be had): its definition, and an oracle that shares none of its mechanism."""

from __future__ import annotations

import copy
import functools
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from choices import steady
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import directions
from numerics import near
from safetensors.torch import load_file
from stores import kept
from tiny import FAMILIES, IMAGE_TOKEN, TEXT, build, left_padded, prompt, shifted_queries
from torch import Tensor
from transformers import LlavaConfig

import vlmattn
from vlmattn import VAR, VHR, FocusDirections, Heads, Knockout
from vlmattn.interventions.vhr import told_apart
from vlmattn.options import parse_layers

GAINS = VHR.gains  # not what the tests put in its place

attn_matrix = pytest.mark.parametrize("attn", ["sdpa", "eager"])


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(4, 16), st.booleans(), st.sampled_from([1.0, 2.0]))
def test_heads_are_chosen_by_the_rule(seed, heads, drop, power):
    generator = torch.Generator().manual_seed(seed)
    seeing, blind = (
        torch.randn(1, heads, 3, generator=generator) * torch.rand(1, heads, 1, generator=generator) * 9
        for _ in range(2)
    )
    gains = VHR(drop_outliers=drop, ta_power=power, alpha=3.0).gains(seeing, blind)[0].tolist()
    vhd = [float((seeing[0, i] - blind[0, i]).square().sum().sqrt()) for i in range(heads)]
    loud = [float(blind[0, i].square().sum().sqrt()) ** power for i in range(heads)]

    def limit(values: list[float]) -> float:
        mean = sum(values) / heads
        return mean + (sum((v - mean) ** 2 for v in values) / (heads - 1)) ** 0.5

    if drop:
        high_vhd, high_loud = limit(vhd), limit(loud)
        vhd = [0.0 if v > high_vhd and t > high_loud else v for v, t in zip(vhd, loud, strict=True)]
    median = sorted(vhd)[(heads - 1) // 2]
    assert gains == [3.0 if v > median else 1.0 for v in vhd]


def test_heads_that_differ_by_rounding_do_not_differ():
    """As where a sliding window has left the image behind: no head is chosen, and none by chance."""
    generator = torch.Generator().manual_seed(0)
    blind = torch.randn(1, 4, 8, generator=generator)
    noise = 1e-7 * torch.randn(1, 4, 8, generator=generator)
    told = told_apart(blind + noise, blind, torch.finfo(torch.float32).eps)
    assert torch.equal(VHR(drop_outliers=False).gains(*told), torch.ones(1, 4))
    assert VHR(drop_outliers=False).gains(blind + noise, blind).max() > 1  # by chance, without
    seeing = blind + noise + torch.tensor([0.0, 1.0, 0.0, 2.0])[None, :, None]
    told = told_apart(seeing, blind, torch.finfo(torch.float32).eps)
    assert VHR(drop_outliers=False).gains(*told).tolist() == [[1.0, 2.0, 1.0, 2.0]]


def test_outliers_are_left_out_only_if_both_rules_say_so():
    blind, seeing = torch.zeros(1, 8, 1), torch.arange(8.0).view(1, 8, 1)
    seeing[0, 7] = 50.0
    quiet = VHR().gains(seeing, blind)
    assert quiet[0, 7] == 2, "far off, but not loud without the image"
    blind[0, 7] = 90.0
    assert VHR().gains(seeing, blind)[0, 7] == 1
    assert VHR(drop_outliers=False).gains(seeing, blind)[0, 7] == 2


def test_half_of_the_heads_and_none_without_a_difference():
    seeing = torch.randn(2, 8, 4)
    assert ((VHR(drop_outliers=False).gains(seeing, seeing * 0) == 2).sum(-1) == 4).all()
    assert (VHR().gains(seeing, seeing) == 1).all()


def head_outputs(model, inputs, gains, others=nullcontext):
    """Logits, and the input of every ``o_proj`` as ``[batch, rows, heads, dim]``, with heads scaled on the way."""
    heads, seen = model.config.get_text_config().num_attention_heads, []

    def scale(layer):
        def hook(_, args):
            out = args[0].unflatten(-1, (heads, -1))
            seen.append(out)
            return ((out * gains[layer][:, None, :, None]).flatten(-2) if layer in gains else args[0],)

        return hook

    with ExitStack() as stack:
        for number, layer in enumerate(model.model.language_model.layers):
            stack.callback(layer.self_attn.o_proj.register_forward_pre_hook(scale(number)).remove)
        stack.enter_context(others())
        logits = model(**inputs).logits
    return logits, seen


def without_image(inputs):
    """One prompt with the tokens of its images cut out of the ids."""
    text = inputs["input_ids"][inputs["input_ids"] != IMAGE_TOKEN][None]
    return {"input_ids": text, "attention_mask": torch.ones_like(text)}


def expected(model, inputs, method, layers=range(4), others=nullcontext):
    """Logits and gains of one prompt, by whole forwards of a bare model: two for every layer, and one with all gains.

    ``others`` puts hooks on the model that edit the prompt with the image.
    """
    gains = {}
    for layer in layers:
        seeing = head_outputs(model, inputs, gains, others)[1][layer][:, -1]
        blind = head_outputs(model, without_image(inputs), gains)[1][layer][:, -1]
        gains[layer] = method.gains(seeing, blind)
        assert steady(functools.partial(GAINS, method), seeing, blind), "rounding would choose: take another case"
    assert any((gain != 1).any() for gain in gains.values())
    return head_outputs(model, inputs, gains, others)[0], gains


def chosen(out):
    """The gains that a forward has left on its cache, by layer."""
    return kept(out.past_key_values, "gain")


def close(a, b):
    if isinstance(a, Tensor):
        near(a, b)
    else:
        for one, other in zip(a, b, strict=True):
            close(one, other)


@pytest.fixture
def pairs(monkeypatch):
    """Head outputs with and without the image, of every layer in which heads were chosen."""
    found, gains = [], VHR.gains
    monkeypatch.setattr(VHR, "gains", lambda self, *both: found.append(both) or gains(self, *both))
    return found


@torch.no_grad()
@attn_matrix
@pytest.mark.parametrize("layers", ["0:", "1,3", "2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_with_and_without_the_image(family, layers, attn, pairs):
    model, inputs, method = build(family, attn), prompt(family, words=6), VHR(layers=layers, alpha=2.5)
    exact, gains = expected(model, inputs, method, parse_layers(layers, 4, "layers"))
    with vlmattn.applied(model, method):
        out = model(**inputs)
    close(out.logits, exact)
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1], "nothing else is in the cache"
    assert chosen(out).keys() == gains.keys()
    assert all(torch.equal(chosen(out)[layer], gains[layer]) for layer in gains)
    close(pairs[len(gains) :], pairs[: len(gains)])


def padded(prompts, left):
    """The prompts as one batch, with padding on the left or on the right."""
    batch = left_padded(prompts)
    length = batch["input_ids"].shape[1]
    if not left:
        for key in {"input_ids", "attention_mask", "mm_token_type_ids"} & batch.keys():
            rows = [torch.nn.functional.pad(p[key], (0, length - p[key].shape[1])) for p in prompts]
            batch[key] = torch.cat(rows)
    return batch


def text_only(family, words):
    """A prompt without an image."""
    inputs = prompt(family, images=1, words=words)
    found = {**without_image(inputs), "pixel_values": inputs["pixel_values"][:0]}
    if family == "llava":
        return found
    types = torch.zeros_like(found["input_ids"]).int()
    return found | {"mm_token_type_ids": types, "image_grid_thw": inputs["image_grid_thw"][:0]}


@torch.no_grad()
@attn_matrix
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_are_compared_one_by_one(family, left, attn):
    """Other lengths with and without the image; the longest text has no image, so it is compared with nothing."""
    model, method = build(family, attn), VHR(layers="0:")
    prompts = [prompt(family, words=3), prompt(family, images=2, words=9, seed=7), text_only(family, words=30)]
    wanted = [expected(model, inputs, method) for inputs in prompts[:2]]
    bare = model(input_ids=prompts[2]["input_ids"], attention_mask=prompts[2]["attention_mask"]).logits
    wanted.append((bare, {layer: torch.ones(1, 4) for layer in range(4)}))
    batch = padded(prompts, left)
    with vlmattn.applied(model, method):
        out = model(**batch)
    for row, (logits, gains) in enumerate(wanted):
        close(out.logits[row][batch["attention_mask"][row].bool()], logits[0])
        assert all(torch.equal(chosen(out)[layer][row], gains[layer][0]) for layer in range(4)), row


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_reinforced_like_its_prompt(family):
    """Against bare forwards that read the prompt and the answer at once, with the gains of the prompt."""
    model, inputs, method = build(family), prompt(family, words=6), VHR(layers="0:")
    gains = expected(model, inputs, method)[1]
    settings = dict(
        max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, suppress_tokens=[96, 97, 98, 99]
    )
    with vlmattn.applied(model, method):
        drafts, cached = {"prompt_lookup_num_tokens": 2}, {"use_cache": True}
        for options in (cached, {"use_cache": False}, drafts):
            out = model.generate(**inputs, **settings, **options, return_dict_in_generate=True, output_logits=True)
            told = out.sequences[:, inputs["input_ids"].shape[1] :]
            whole = longer(inputs, told)
            logits = head_outputs(bare_twin(family), whole, gains)[0]
            close(torch.stack(out.logits, 1), logits[:, -6:-1])


@functools.cache
def bare_twin(family):
    return build(family)


def longer(inputs, tokens):
    """The prompt with more text at its end."""
    ids = torch.cat([inputs["input_ids"], tokens], 1)
    more = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return more if "mm_token_type_ids" not in inputs else more | {"mm_token_type_ids": (ids == IMAGE_TOKEN).int()}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_gain_one_changes_nothing(family):
    model, inputs = build(family), prompt(family)
    bare = model(**inputs).logits
    with vlmattn.applied(model, VHR(alpha=1.0)):
        assert torch.equal(model(**inputs).logits, bare)


# --- other methods act on the prompt with the image, and only there


def hook_all(modules, hook, **options):
    """Forward pre-hooks, or hooks (``after=True``), for the block."""
    stack, after = ExitStack(), options.pop("after", False)
    for number, module in enumerate(modules):
        put = module.register_forward_hook if after else module.register_forward_pre_hook
        stack.callback(put(functools.partial(hook, number), **options).remove)
    return stack


def images_apart(model, ids):
    """Image rows see no image token but themselves."""
    length, image = ids.shape[1], ids[0] == IMAGE_TOKEN
    edge = torch.ones(length, length).tril().bool() & ~(image[:, None] & image[None] & ~torch.eye(length).bool())
    mask = torch.zeros(1, 1, length, length).masked_fill(~edge, torch.finfo(torch.float32).min)
    change = lambda number, module, args, kwargs: (args, {**kwargs, "attention_mask": mask})  # noqa: E731
    return hook_all(model.model.language_model.layers, change, with_kwargs=True)


def focused(model, ids):
    """Directions are added to queries."""
    found = load_file(directions(model.config.model_type))
    return shifted_queries(model, {int(name.removeprefix("query.")): value for name, value in found.items()})


def blocked(model, ids):
    """Heads 1.2 and 2.0 say nothing; VHR compares what they would have said."""

    def silence(number, module, args):
        out = args[0].unflatten(-1, (4, -1)).clone()
        for head in {1: [2], 2: [0]}.get(number, []):
            out[..., head, :] = 0
        return (out.flatten(-2),)

    return hook_all([layer.self_attn.o_proj for layer in model.model.language_model.layers], silence)


OTHERS = {
    "knockout": (lambda family: Knockout(source="image", target="image"), images_apart),
    "focus": (lambda family: FocusDirections(alpha=1.0, file=directions(family)), focused),
    "heads": (lambda family: Heads(operation="block", heads="1.2,2.0", rows="all"), blocked),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_methods_act_on_the_side_with_the_image(family, name):
    """The oracle edits the prompt by hooks on a bare model; the text alone is read without them."""
    model, inputs, method = build(family), prompt(family, words=6), VHR(layers="0:")
    make, hooks = OTHERS[name]
    alone = expected(model, inputs, method)[1]
    exact, gains = expected(model, inputs, method, others=lambda: hooks(model, inputs["input_ids"]))
    for recipe in ([method, make(family)], [make(family), method]):
        with vlmattn.applied(model, recipe):
            out = model(**inputs)
        close(out.logits, exact)
        assert all(torch.equal(chosen(out)[layer], gains[layer]) for layer in gains)
    assert any(not torch.equal(alone[layer], gains[layer]) for layer in gains), "the other edit changes the choice"


@torch.no_grad()
def test_nobody_else_sees_the_text_alone(monkeypatch):
    """Observers of the residual stream, and who collects the outputs of layers, see the prompt only."""
    seen, observe = [], VAR.on_hidden_states
    monkeypatch.setattr(
        VAR,
        "on_hidden_states",
        lambda self, context, hidden: seen.append(hidden.shape[1]) or observe(self, context, hidden),
    )
    model, inputs = build("llava", "eager"), prompt("llava")
    plain = model(**inputs, output_hidden_states=True, output_attentions=True)
    with vlmattn.applied(
        model, [VAR(tau=2.0, dims=(3, 17), layers="0:", max_sink=1.0, min_visual=0.0), VHR(layers="0:")]
    ):
        model(**inputs)
    assert seen == [inputs["input_ids"].shape[1]] * 4
    with vlmattn.applied(model, VHR(layers="0:")):
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert [value.shape for value in out[name]] == [value.shape for value in plain[name]]
    assert torch.equal(out.hidden_states[0], plain.hidden_states[0])


# --- what it costs


@contextmanager
def counted(model):
    """(layer, rows, tokens) of every call of a decoder layer, in order of their ends."""
    calls = []
    note = lambda number, module, args, out: calls.append((number, *out.shape[:2]))  # noqa: E731
    with hook_all(model.model.language_model.layers, note, after=True):
        yield calls


@torch.no_grad()
@pytest.mark.parametrize(("layers", "last"), [("0:", 3), ("1", 1), ("0,2", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_one_thing_that_runs_besides_is_the_text(family, layers, last):
    """Once per prompt, up to the last layer in which heads are chosen; the longest text without an image is cut."""
    model = build(family)
    prompts = [prompt(family, words=3), prompt(family, images=2, words=9, seed=7), text_only(family, words=30)]
    batch, texts = left_padded(prompts), [without_image(inputs)["input_ids"].shape[1] for inputs in prompts]
    length, settings = batch["input_ids"].shape[1], dict(max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    with vlmattn.applied(model, VHR(layers=layers)), counted(model) as calls:
        model.generate(**batch, **settings, do_sample=False, suppress_tokens=[96, 97, 98, 99])
    prefill = [
        call for layer in range(4) for call in ([(layer, 3, texts[1])] if layer <= last else []) + [(layer, 3, length)]
    ]
    assert calls == prefill + 2 * [(layer, 3, 1) for layer in range(4)]
    assert texts[1] < texts[2]


@torch.no_grad()
def test_text_and_image_alone_are_compared_with_nothing():
    """A batch without images next to a method that allows it, and a prompt that is nothing but an image."""
    model, ids = build("llava"), torch.full((1, 16), IMAGE_TOKEN)
    image = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": prompt("llava")["pixel_values"]}
    plain = model(**image).logits
    with vlmattn.applied(model, VHR(layers="0:")), counted(model) as calls:
        assert torch.equal(model(**image).logits, plain)
    assert len(calls) == 4


# --- layers that differ, gradients, exceptions


@torch.no_grad()
def test_every_layer_gets_what_the_decoder_makes_for_it(pairs):
    """Masks and rotary tables differ from layer to layer in some language models."""
    kinds = ["sliding_attention", "full_attention"]
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in zip(kinds, (1e2, 1e5), strict=True)}
    text = {**TEXT, "head_dim": 8, "layer_types": kinds * 2, "sliding_window": 64, "rope_parameters": rope}
    config = LlavaConfig(
        text_config=dict(model_type="gemma3_text", **text),
        vision_config=build("llava").config.vision_config.to_dict(),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
    )
    model, inputs, method = build("llava", config=config), prompt("llava", words=6), VHR(layers="0:")
    exact, gains = expected(model, inputs, method)
    with vlmattn.applied(model, method):
        out = model(**inputs)
    close(out.logits, exact)
    assert all(torch.equal(chosen(out)[layer], gains[layer]) for layer in gains)
    close(pairs[4:], pairs[:4])


@pytest.mark.filterwarnings("ignore:None of the inputs", "ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_computed_again_for_gradients(family, reentrant):
    """Gradient checkpointing: heads are chosen once, and the text alone has no gradient."""
    inputs, found = prompt(family), []
    for checkpointing in (False, True):
        model = vlmattn.wrap(build(family), VHR(layers="0:")).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        found.append([parameter.grad for parameter in model.model.language_model.layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_brought_when_they_are_needed(family):
    """Hooks of accelerate on every module, which move what a layer gets to where it runs."""
    accelerate = pytest.importorskip("accelerate")
    inputs, method = prompt(family), VHR(layers="0:")
    with vlmattn.applied(build(family), method) as model:
        wanted = model(**inputs).logits
    offloaded = accelerate.cpu_offload(build(family), execution_device=torch.device("cpu"))
    with vlmattn.applied(offloaded, method) as model:
        assert torch.equal(model(**inputs).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exception_in_the_middle_leaves_nothing(family, monkeypatch):
    """Raised while the text alone is in layer 2, within the prompt's attention."""
    model, inputs, method = build(family), prompt(family), VHR(layers="0:")
    plain = model(**inputs).logits
    hooks = lambda: sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())  # noqa: E731
    before, modules = hooks(), {name: id(module) for name, module in model.named_modules()}
    gains, calls = VHR.gains, []

    def fail(self, seeing, blind):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return gains(self, seeing, blind)

    with vlmattn.applied(model, method):
        edited = model(**inputs).logits
        monkeypatch.setattr(VHR, "gains", fail)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        monkeypatch.setattr(VHR, "gains", gains)
        assert torch.equal(model(**inputs).logits, edited)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**inputs).logits, edited)
    assert hooks() == before
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert torch.equal(model(**inputs).logits, plain)
    vlmattn.unwrap(copied)
    assert torch.equal(copied(**inputs).logits, plain)
