"""``look`` against the attention and the states that the bare model returns itself, and formulas written out."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numerics import bound, near
from tiny import left_padded
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor
from zoo import IMG, ZOO

import vlmattn
from vlmattn import (
    AVL,
    PAI,
    VAR,
    VCD,
    VHR,
    FastV,
    InputError,
    Knockout,
    OptionError,
    RecycledAttention,
    SoFA,
    UnsupportedError,
)
from vlmattn.inspection import Trace, look
from vlmattn.inspection.recorder import Recorder
from vlmattn.models import find_family

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]

SAID = (5, 17, 60, 33, 8)
ROUNDING = bound(torch.float32, 512)  # of shares of attention in a tiny model
REFUSED = {
    "blip2": "before the tokens",
    "instructblip": "before the tokens",
    "instructblipvideo": "before the tokens",
    "florence2": "encoder-decoder",
}
PREFIX = ("paligemma", "paligemma2")  # prompt tokens see ahead, answer tokens do not: one forward cannot say both
ADDED = (
    "qwen3_vl",
    "qwen3_vl_moe",
    "cosmos3_omni",
    "cohere_compass",
    "qwen3_omni_moe_thinker",
    "granite_docling",
    "granite4_vision",
    "gemma3n",
    "hy_v4_vl",
)  # output_hidden_states is not what enters a layer: DeepStack, several streams
ONLY_EAGER = ("paligemma2", "hy_v4_vl")
LAYERS, HEADS = 4, 4
ATTENDING = dict.fromkeys(("mllama", "mllama_tiles"), (0, 2)) | dict.fromkeys(
    (
        "lfm2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "minicpmv4_6",
        "minicpmv4_7",
        "minicpm_ocr",
        "nemotron_h_omni",
        "lfm3_vl",
        "qwen4_exp",
    ),
    (1, 3),
)


def processor_of(name: str) -> Any:
    """No chat template; a token is shown as its id."""
    decode = lambda ids, **_: "".join(f"<{token}>" for token in ids)  # noqa: E731
    return SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: ZOO[name].vocabulary, decode=decode))


LLAVA = processor_of("llava")


def llava(attn: str = "") -> Any:
    return ZOO["llava"].build(attn)


def asked(images: int = 2, words: int = 5) -> dict[str, Tensor]:
    return ZOO["llava"].prompt(images, words).inputs


def longer(inputs: dict[str, Tensor], answer: tuple[int, ...] = SAID[:-1]) -> dict[str, Tensor]:
    """The prompt with an answer behind it, for one forward."""
    out, new = dict(inputs), len(answer)
    for name in {
        "attention_mask",
        "mm_token_type_ids",
        "moe_mm_token_type_ids",
        "token_type_ids",
        "image_embeds_position_mask",
    } & out.keys():
        out[name] = pad(out[name], (0, new), value=int(name == "attention_mask"))
    out["input_ids"] = torch.cat([out["input_ids"], torch.tensor([answer])], 1)
    if (seen := out.get("cross_attention_mask")) is not None:
        out["cross_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, new, -1, -1)], 1)
    return out


class Saying(LogitsProcessor):
    """Says ``SAID``, for the bare model's own generate()."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = torch.full_like(scores, -math.inf)
        scores[:, SAID[ids.shape[1] - self.prompt]] = 0
        return scores


def entering(model: Any, stack: ExitStack) -> dict[int, list[Tensor]]:
    """What enters each decoder layer, noted by hooks."""
    family, seen = find_family(model), {}
    for index, layer in enumerate(family.layers(model)):

        def note(_: Any, args: Any, kwargs: Any, index: int = index) -> None:
            hidden = family.residual(args[0] if args else kwargs["hidden_states"])
            seen.setdefault(index, []).append(hidden[0].float())

        stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
    return seen


def of_eager(name: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Attention ``[layer, head, row, key]``, states ``[layer, token, hidden]`` and logits ``[row, token]`` of the eager model."""
    model, prompt = ZOO[name].build("eager"), inputs["input_ids"].shape[1]
    with ExitStack() as stack:
        hooked = entering(model, stack)
        if name in PREFIX:
            out = model.generate(
                **inputs, max_new_tokens=len(SAID), do_sample=False, logits_processor=[Saying(prompt)], output_attentions=True,
                output_hidden_states=True, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            width = prompt + len(SAID) - 1
            steps = [torch.cat([pad(a, (0, width - a.shape[-1])) for a in of], 1) for of in out.attentions]
            attention = torch.cat(steps, 2).unflatten(1, (len(hooked), -1))[0]
            states = torch.cat([torch.cat(of[:-1]) for of in out.hidden_states], 1)
            return attention, states.float(), torch.cat([torch.zeros(prompt - 1, 100), *out.logits])
        out = model(**longer(inputs), output_attentions=True, output_hidden_states=True, use_cache=False)
    own = [a[0] for a in out.attentions if a is not None and a.shape[-1] == a.shape[-2]]  # not cross-attention
    if name in ADDED:
        states = torch.stack([hooked[layer][0] for layer in sorted(hooked)])
    else:
        states = torch.cat(out.hidden_states[:-1]).float()
    return torch.stack(own), states, out.logits[0]


def check(trace: Trace, attention: Tensor, states: Tensor, logits: Tensor, close: float = ROUNDING) -> None:
    for row in trace.rows:
        found = trace.attention(row)
        assert found.axes == ("layer", "head", "key")
        assert not found.values[..., -1].any()  # nothing runs on the last token of an answer
        torch.testing.assert_close(found.values[..., :-1], attention[:, :, row], rtol=0, atol=close)
    torch.testing.assert_close(trace.norms, states.norm(dim=-1), rtol=1e-4, atol=close)
    rms = (states.square().mean(-1) + 1e-6).sqrt()
    torch.testing.assert_close(trace.phi, states.abs().amax(-1) / rms, rtol=1e-4, atol=close)
    assert torch.equal(trace.dims, states.abs().argmax(-1))
    lengths = states.norm(dim=-1)
    cosine = (states * states[:, :1]).sum(-1) / (lengths * lengths[:, :1])
    torch.testing.assert_close(trace.likeness, cosine.abs(), rtol=1e-4, atol=1e-4)
    wanted = logits[list(trace.answer_rows)].float().log_softmax(-1)
    torch.testing.assert_close(trace.logprobs, wanted[range(len(SAID)), list(SAID)], rtol=1e-4, atol=1e-4)
    for step, rivals in enumerate(trace.rivals):
        best = wanted[step].topk(5)
        assert [token for token, _ in rivals] == [f"<{token}>" for token in best.indices.tolist()]
        assert [value for _, value in rivals] == pytest.approx(best.values.tolist(), abs=1e-4)


# The bare model


@pytest.mark.parametrize("name", [name for name in ZOO if name not in REFUSED])
def test_rows_states_and_logprobs_are_those_of_the_bare_eager_model(name):
    made = ZOO[name].prompt(1 if ZOO[name].single_image else 2)
    prompt, wanted = made.inputs["input_ids"].shape[1], of_eager(name, made.inputs)
    image = int((made.images[0] == 0).nonzero()[0])
    for attn in ("eager",) if name in ONLY_EAGER else ("sdpa", "eager"):
        model = ZOO[name].build(attn)
        trace = look(model, processor_of(name), made.inputs, answer=SAID, rows=[0, image, -3])
        check(trace, *wanted)
        assert sorted(trace.rows) == sorted({0, image, prompt - 3, *range(prompt - 1, prompt + 4)})
        if not name.startswith("mllama"):  # its placeholders, one for an image, stand side by side
            assert trace.images == (*made.images[0].tolist(), *[-1] * len(SAID))
        assert (trace.answer, trace.prompt, trace.recipe) == (SAID, prompt, "none")
        assert trace.layers == ATTENDING.get(name, tuple(range(len(wanted[1]))))
        assert bool(trace.notes) == (len(trace.layers) < len(wanted[1]))  # layers that are not shown are named
        assert all(bool((gain == 1).all()) for gain in trace.gains.values())
        assert tuple(len(own) for own in trace.pieces) == PIECES.get(name, tuple(len(own) for own in trace.pieces))
        assert "vlmattn" not in model.__dict__


PIECES = {"llava": (1, 1), "llava_next": (2, 2), "idefics3": (3, 3), "idefics2": (0, 0)}  # as test_maps.py has them


@pytest.mark.parametrize("name", REFUSED)
def test_families_whose_image_is_not_among_the_tokens_are_refused(name):
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        look(ZOO[name].build(), processor_of(name), ZOO[name].prompt(1).inputs)


def test_a_head_with_a_sink_of_its_own_sums_to_less_than_one():
    """Sink logits (gpt-oss) and softcap, in a language model behind LLaVA's image."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from zoo import CLIP, ROPE, TEXT

    text = dict(
        TEXT, model_type="gpt_oss", num_local_experts=2, num_experts_per_tok=2, sliding_window=8, rope_parameters=ROPE
    )
    config = LlavaConfig(text_config=text, vision_config=CLIP, image_token_index=IMG, image_seq_length=16)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.model.language_model.parameters():
        parameter.data.normal_(0, 0.3)  # sinks too
    model.set_attn_implementation({"text_config": "eager"})
    inputs = asked()
    wanted = model(**longer(inputs), output_attentions=True, use_cache=False).attentions
    trace = look(model, LLAVA, inputs, answer=SAID, rows=[3, 20])
    for row in trace.rows:
        found = trace.attention(row).values
        near(found[..., :-1], torch.cat(wanted)[:, :, row])
        assert bool((found.sum(-1) < 0.999).all())


def test_the_models_own_answer_and_what_is_known_of_the_tokens():
    model, inputs = llava(), asked()
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    said = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    trace = look(model, LLAVA, inputs, max_new_tokens=6)
    assert list(trace.answer) == said
    wanted = torch.cat(out.logits).log_softmax(-1)[range(len(said)), said]
    torch.testing.assert_close(trace.logprobs, wanted)
    ids = inputs["input_ids"][0].tolist()
    assert trace.tokens == tuple(f"<{token}>" for token in ids + said)
    assert trace.said == "".join(f"<{token}>" for token in said)
    assert trace.heads == HEADS
    first = ids.index(IMG)  # without a chat template all text behind the first image is the question
    wanted_groups = [1 if token == IMG else 2 if slot > first else 0 for slot, token in enumerate(ids)] + [3] * len(
        said
    )
    assert list(trace.groups) == wanted_groups
    assert trace.keys_of("image").nonzero()[:, 0].tolist() == [slot for slot, token in enumerate(ids) if token == IMG]
    assert int(trace.keys_of("image", 1).sum()) == 16


def test_an_answer_ends_at_its_end_token():
    model, inputs = llava(), asked()
    assert look(model, LLAVA, inputs, answer=(5, 2)).answer == (5, 2)
    with pytest.raises(InputError, match="said 2 tokens of the answer of 3"):
        look(model, LLAVA, inputs, answer=(5, 2, 7))


# Under a recipe


SINKS = VAR(tau=1.5, keep=0.2, dims=(3, 5, 9), max_sink=1.0, min_visual=0.0, layers="0:")


class Probed:
    """What a model did under a recipe, by hooks that know nothing of it: values, head outputs and layer inputs by token.

    Passes beside the prompt (fewer tokens) are left out. One image run of LLaVA: values are neither normed nor rotated.
    """

    def __init__(self, model: Any, inputs: dict[str, Tensor], trace_of: Any) -> None:
        self.values: dict[int, list[Tensor]] = {}
        self.outputs: dict[int, list[Tensor]] = {}
        with ExitStack() as stack:
            self.hidden: dict[int, list[Tensor]] = {}
            for index, layer in enumerate(find_family(model).layers(model)):
                attention = layer.self_attn

                def enter(_: Any, args: Any, index: int = index) -> None:
                    self.hidden.setdefault(index, []).append(args[0][0])

                def value(_: Any, __: Any, out: Tensor, index: int = index) -> None:
                    self.values.setdefault(index, []).append(out[0])

                def output(_: Any, args: Any, index: int = index) -> None:
                    self.outputs.setdefault(index, []).append(args[0][0])

                stack.callback(
                    layer.input_layernorm.register_forward_pre_hook(enter).remove
                )  # tokens are dropped before
                stack.callback(attention.v_proj.register_forward_hook(value).remove)
                stack.callback(attention.o_proj.register_forward_pre_hook(output).remove)
            self.trace: Trace = trace_of()

    def of(self, calls: list[Tensor], tokens: int) -> Tensor:
        """The rows of one layer: of the prompt's ``tokens`` and the answer."""
        (prompt,) = [call for call in calls if len(call) == tokens]
        return torch.cat([prompt, *[call for call in calls if len(call) == 1]])


@pytest.mark.parametrize(
    "recipe",
    [
        PAI(alpha=0.9, layers="0:"),
        SINKS,
        VHR(layers="0:"),
        Knockout(layers="1:"),
        SoFA(sigma=0.3, layers="0:-1"),
        FastV(layer=2, keep_ratio=0.5),
        "sparsevlm",
        RecycledAttention(keys=6),
        AVL(text_first=2, text_every=2),
        [VHR(layers="0:"), SINKS, PAI(alpha=0.9, layers="0:")],
        [FastV(layer=2, keep_ratio=0.5), PAI(alpha=0.9, layers="0:")],
    ],
    ids=["pai", "var", "vhr", "knockout", "sofa", "fastv", "sparsevlm", "recycled", "avl", "vhr+var+pai", "fastv+pai"],
)
def test_gains_times_attention_times_values_are_the_head_outputs(recipe):
    """Whatever the recipe: what enters ``o_proj`` is what the trace says was looked at."""
    model, inputs = llava(), asked()
    prompt = inputs["input_ids"].shape[1]
    image = int((inputs["input_ids"][0] == IMG).nonzero()[2])
    rows = [0, image, prompt - 2] if recipe != "sparsevlm" else [0, prompt - 2]
    probed = Probed(model, inputs, lambda: look(model, LLAVA, inputs, recipe, answer=SAID, rows=rows))
    trace = probed.trace
    bare = look(model, LLAVA, inputs, answer=SAID)
    assert not torch.allclose(trace.phi.nan_to_num(), bare.phi.nan_to_num(), rtol=1e-2), "the recipe must do something"
    for layer in range(LAYERS):
        there = ~trace.norms[layer].isnan()  # tokens that entered
        kept = int(there[:prompt].sum())
        entered = probed.of(probed.hidden[layer], kept)
        torch.testing.assert_close(trace.norms[layer, there], entered.norm(dim=-1), rtol=1e-4, atol=1e-5)
        values = torch.zeros(len(trace.tokens), 16)
        values[:-1][there] = probed.of(probed.values[layer], kept)
        values = values.unflatten(1, (2, 8)).repeat_interleave(2, 1)  # 2 KV heads, 4 heads
        outputs = torch.zeros(len(trace.tokens), HEADS, 8)
        outputs[:-1][there] = probed.of(probed.outputs[layer], kept).unflatten(1, (HEADS, 8))
        for row in trace.rows:
            if there[row]:
                found = torch.einsum("hk,khd->hd", trace.attention(row).values[layer], values)
                found = found * trace.gains[row][layer][:, None]
                torch.testing.assert_close(found, outputs[row], rtol=1e-3, atol=1e-4)


def test_pai_by_hand():
    """s + alpha |s| for image keys in rows that predict, from log attention; s is only known up to a constant of the row,
    so scores come from queries and keys, in the first layer, where they are those of the bare model."""
    model, inputs, alpha = llava(), longer(asked()), 0.9
    prompt = asked()["input_ids"].shape[1]
    scores = first_scores(inputs)
    visual = inputs["input_ids"][0] == IMG
    trace = look(model, LLAVA, asked(), PAI(alpha=alpha, layers="0:"), answer=SAID, rows=[prompt - 3])
    for row in trace.rows:
        own = scores[:, row, : row + 1]
        if row >= prompt - 1:
            own = own + alpha * own.abs() * visual[: row + 1]
        near(trace.attention(row).values[0, :, : row + 1], own.softmax(-1))


def first_scores(inputs: dict[str, Tensor]) -> Tensor:
    """Scaled scores ``[head, row, key]`` of LLaVA's first layer, noted by an attention function of its own."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    noted: list[Tensor] = []

    def note(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        score = query @ key.transpose(-1, -2) * scaling
        noted.append(score[0])
        seen = torch.ones_like(score[0, 0], dtype=torch.bool).tril()
        return (score.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("noting", note)
    AttentionMaskInterface.register("noting", sdpa_mask)
    model = llava()
    model.set_attn_implementation({"text_config": "noting"})
    model(**inputs, use_cache=False)
    return noted[0]


def test_knockout_by_hand():
    """The bare attention without the image keys, divided by what is left."""
    inputs = asked()
    trace = look(llava(), LLAVA, inputs, Knockout(layers="0:1"), answer=SAID, rows=[5, -3])
    bare, *_ = of_eager("llava", inputs)
    visual = trace.keys_of("image")[:-1]
    for row in trace.rows:
        wanted = bare[0, :, row] * (~visual if not visual[row] else 1)
        found = trace.attention(row).values[0, :, :-1]
        near(found, wanted / wanted.sum(-1, keepdim=True))
    assert trace.rows.keys() >= {5}
    assert visual[5]  # an image row keeps its image


def test_var_by_hand():
    """Sinks of the first layer by its inputs; rows after an image give (1 - keep) of sinks to the rest of the image."""
    inputs = asked()
    bare, states, _ = of_eager("llava", inputs)
    first, prompt = states[0], inputs["input_ids"].shape[1]
    sink = first[:, list(SINKS.dims)].abs().amax(-1) / first.square().mean(-1).sqrt() > SINKS.tau
    sink[prompt:] = False  # generated tokens are not tested
    visual = pad(inputs["input_ids"][0] == IMG, (0, len(SAID) - 1))
    assert sink[visual].any()
    assert (visual & ~sink).any()
    trace = look(llava(), LLAVA, inputs, SINKS, answer=SAID, rows=[1, -3])
    for row in trace.rows:
        wanted = bare[0, :, row].clone()
        if row > 1:  # row 1 is before the image
            taken = (wanted * sink).sum(-1, keepdim=True) * (1 - SINKS.keep)
            room = (wanted * (visual & ~sink)).sum(-1, keepdim=True)
            wanted = torch.where(sink, SINKS.keep * wanted, wanted * (1 + (visual & ~sink) * taken / room))
        near(trace.attention(row).values[0, :, :-1], wanted)


def test_gains_of_vhr_by_hand():
    """In the first layer of the recipe: 2 for heads whose output changes more than the median without the image."""
    inputs = asked()
    ids = inputs["input_ids"][inputs["input_ids"] != IMG][None]
    blind = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    outputs = []
    for given in (inputs, blind):
        model, seen = llava(), []
        hook = model.model.language_model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0][0, -1].unflatten(-1, (HEADS, -1)))
        )
        model(**given)
        hook.remove()
        outputs.append(seen[0])
    distance = (outputs[0] - outputs[1]).norm(dim=-1)
    wanted = torch.where(distance > distance.median(), 2.0, 1.0)
    trace = look(llava(), LLAVA, inputs, VHR(layers="0,2", drop_outliers=False), answer=SAID, rows=[4])
    assert 0 < int((wanted == 2).sum()) < HEADS
    for row in trace.rows:
        assert torch.equal(trace.gains[row][0], wanted)
        assert trace.gains[row][2].unique().tolist() == [1.0, 2.0]
        assert bool((trace.gains[row][[1, 3]] == 1).all())


def test_dropped_tokens_are_gone_from_later_layers():
    inputs, layer = asked(), 2
    prompt = inputs["input_ids"].shape[1]
    trace = look(llava(), LLAVA, inputs, FastV(layer=layer, keep_ratio=0.25), answer=SAID, rows=[0, prompt - 2])
    bare, *_ = of_eager("llava", inputs)
    visual = trace.keys_of("image")
    score = bare[layer - 1, :, prompt - 1].mean(0) * visual[:-1]
    kept = score.topk(8).indices  # of 32
    gone = visual.clone()
    gone[kept] = False
    assert int(gone.sum()) == 24
    for row in trace.rows:
        found = trace.attention(row).values
        assert not found[layer:][..., gone].any()
        torch.testing.assert_close(found.sum(-1), torch.ones(LAYERS, HEADS))
        if row > kept.max():
            assert bool((found[layer:][..., kept] > 0).all())
            assert bool((found[:layer][..., visual] > 0).all())
    assert torch.equal(trace.norms.isnan(), torch.stack([gone[:-1] & (n >= layer) for n in range(LAYERS)]))
    assert torch.equal(trace.dims < 0, trace.phi.isnan())


def test_branches_of_a_decoding_rule_are_not_looked_at():
    """The rows are those of the main prompt; log-probabilities those that the rule makes."""
    model, inputs = llava(), asked()
    prompt = inputs["input_ids"].shape[1]
    bare = look(model, LLAVA, inputs, answer=SAID, rows=[7])
    trace = look(model, LLAVA, inputs, VCD(), answer=SAID, rows=[7])
    for row in bare.rows:
        near(trace.rows[row], bare.rows[row])
    torch.testing.assert_close(trace.norms, bare.norms, rtol=1e-4, atol=1e-5)
    with vlmattn.applied(model, VCD()):
        out = model.generate(
            **inputs, max_new_tokens=len(SAID), do_sample=False, logits_processor=[Saying(prompt)], output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    wanted = torch.cat(out.logits).log_softmax(-1)[range(len(SAID)), list(SAID)]
    torch.testing.assert_close(trace.logprobs, wanted)
    assert trace.recipe == "vcd"
    free = look(model, LLAVA, inputs, VCD(), max_new_tokens=5)  # what it says by itself is plausible
    assert free.logprobs.isfinite().all()
    assert (free.logprobs - look(model, LLAVA, inputs, answer=free.answer).logprobs).abs().max() > 0.01


def test_what_a_recipe_warns_of_is_noted():
    trace = look(llava(), LLAVA, asked(), SINKS.__class__(tau=5.0, dims=(3,), layers="0:"), answer=SAID)
    assert any("never fired" in note for note in trace.notes)


# On disk


@pytest.mark.parametrize("recipe", [None, FastV(layer=2, keep_ratio=0.5)], ids=["bare", "fastv"])
def test_on_disk_is_the_same_as_in_memory(tmp_path, recipe):
    model, inputs = llava(), asked()
    memory = look(model, LLAVA, inputs, recipe, answer=SAID, rows=[5])
    disk = look(model, LLAVA, inputs, recipe, answer=SAID, rows=[5], folder=tmp_path / "a" / "b")
    copied = Trace.load(memory.save(tmp_path / "c"))
    for other in (disk, copied, Trace.load(tmp_path / "a" / "b")):
        assert other.rows.keys() == memory.rows.keys() == other.gains.keys()
        assert len(other.rows) == len(memory.rows)
        for row in memory.rows:
            assert torch.equal(other.rows[row], memory.rows[row])
            assert torch.equal(other.gains[row], memory.gains[row])
        for name in ("phi", "dims", "norms", "likeness", "logprobs"):
            assert torch.equal(getattr(other, name).nan_to_num(), getattr(memory, name).nan_to_num())
            assert getattr(other, name).dtype == getattr(memory, name).dtype
        for name in ("recipe", "source", "tokens", "groups", "images", "prompt", "answer", "layers", "rivals", "notes"):
            assert getattr(other, name) == getattr(memory, name), name
        for mine, own in zip(memory.pieces, other.pieces, strict=True):
            assert [piece.to_dict() for piece in mine] == [piece.to_dict() for piece in own]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_nothing_is_left_of_a_look_that_failed(tmp_path, monkeypatch):
    model, inputs = llava(), asked()
    monkeypatch.setattr("vlmattn.inspection.looking._facts", lambda *_: 1 / 0)  # after the rows are written
    with pytest.raises(ZeroDivisionError):
        look(model, LLAVA, inputs, answer=SAID, folder=tmp_path / "trace")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_trace_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no trace"):
        Trace.load(tmp_path)
    (tmp_path / "trace.json").write_text("{")
    (tmp_path / "trace.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="holds no trace"):
        Trace.load(tmp_path)


# The model stays as it was


def hooks(model: Any) -> int:
    """Take it after a first forward: transformers hangs hooks of its own on vision towers."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def spoken(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.cat(out.logits)


def failing(model: Any) -> None:
    """A look that fails in the middle of the prompt."""
    stop = model.model.language_model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            look(model, LLAVA, asked(), PAI(), answer=SAID)
    finally:
        stop.remove()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_an_unwrapped_model_is_as_before(attn):
    model, inputs = llava(attn), asked()
    before = spoken(model, inputs)
    count, attributes = hooks(model), sorted(model.__dict__)
    for recipe in (None, "pai", VCD(), FastV(layer=2), VHR(layers="0:")):
        look(model, LLAVA, inputs, recipe, answer=SAID)
    failing(model)
    assert hooks(model) == count
    assert sorted(model.__dict__) == attributes
    assert model.config.get_text_config()._attn_implementation == attn
    assert all(map(torch.equal, before, spoken(model, inputs)))


def test_a_wrapped_model_is_as_before():
    model, inputs = llava(), asked()
    spoken(model, inputs)
    bare_hooks = hooks(model)
    vlmattn.wrap(model, PAI(layers="0:"))
    before, count, handle = spoken(model, inputs), hooks(model), model.vlmattn
    recipe, report = handle.recipe, handle.report()
    own = look(model, LLAVA, inputs, answer=SAID)  # with what is on the model
    assert own.recipe == recipe.name
    assert handle.report()["fired"]["pai"] >= report["fired"]["pai"]
    report = handle.report()
    bare, vhr = (
        look(model, LLAVA, inputs, "none", answer=SAID),
        look(model, LLAVA, inputs, VHR(layers="0:"), answer=SAID),
    )
    failing(model)
    assert handle.report() == report
    assert model.vlmattn is handle
    assert (handle.recipe, handle.enabled, hooks(model)) == (recipe, True, count)
    assert all(map(torch.equal, before, spoken(model, inputs)))
    handle.disable()
    disabled = look(model, LLAVA, inputs, answer=SAID)  # nothing acts
    lent = look(model, LLAVA, inputs, PAI(layers="0:"), answer=SAID)  # what is asked for does
    failing(model)
    assert (handle.recipe, handle.enabled, hooks(model)) == (recipe, False, count)
    assert disabled.recipe == bare.recipe == "none"
    row = own.answer_rows[0]
    assert torch.equal(disabled.rows[row], bare.rows[row])
    assert torch.equal(lent.rows[row], own.rows[row])
    assert not torch.allclose(own.rows[row], bare.rows[row])
    assert not torch.equal(vhr.gains[row], own.gains[row])
    wanted, *_ = of_eager("llava", inputs)
    near(bare.rows[row], wanted[:, :, row, : row + 1])
    vlmattn.unwrap(model)
    assert hooks(model) == bare_hooks


# Refusals


def test_what_cannot_be_looked_at_is_said(tmp_path, monkeypatch):
    model, inputs = llava(), asked()
    spoken(model, inputs)
    prompt, count = inputs["input_ids"].shape[1], hooks(model)
    text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    many = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.full((1, 10**6), 7)], 1)}
    many.pop("attention_mask")
    (tmp_path / "old").mkdir()
    for error, match, given, options in (
        (InputError, "no image tokens", text, {}),
        (InputError, f"row {prompt} is out of range: the prompt has {prompt} tokens", inputs, {"rows": [prompt]}),
        (InputError, "out of range", inputs, {"rows": [0, -prompt - 1]}),
        (InputError, "one or more ids of text tokens", inputs, {"answer": ()}),
        (InputError, "text tokens below 100", inputs, {"answer": (5, 100)}),
        (InputError, "text tokens below 100", inputs, {"answer": (5, IMG)}),
        (OptionError, "max_new_tokens must be at least 1, got 0", inputs, {"max_new_tokens": 0}),
        (InputError, "one prompt", left_padded([inputs, inputs]), {}),
        (InputError, "without padding", left_padded([asked(1), inputs]), {}),
        (InputError, "without padding", {k: v[:1] for k, v in left_padded([asked(1), inputs]).items()}, {}),
        (InputError, "exists", inputs, {"folder": tmp_path / "old"}),
        (InputError, re.escape("4.1 GB (64 rows x 4 layers x 4 heads x 1000"), many, {}),
        (UnsupportedError, "only one sequence", inputs, {"recipe": "opera"}),
    ):
        with pytest.raises(error, match=match):
            look(model, LLAVA, given, **options)
        assert hooks(model) == count
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("vlmattn.inspection.looking.shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"too much to write: 0\.0 GB .* has 0\.0 GB free"):
        look(model, LLAVA, inputs, folder=tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_heads_that_are_kept_apart_are_refused(tmp_path):
    from vlmattn.interventions import HeadProfile, RazorAttention

    model, inputs = llava(), asked()
    spoken(model, inputs)
    count = hooks(model)
    anatomy = find_family(model).anatomy(model)
    scores = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(0)).tolist()
    profile = HeadProfile(
        fingerprint=anatomy.fingerprint, source="", prompts=(), seed=0, scores={"retrieval": scores, "echo": scores}
    )
    path = str(profile.save(tmp_path / "heads"))
    recipe = RazorAttention(profile=path)
    with pytest.raises(UnsupportedError, match="kept apart"):
        look(model, LLAVA, inputs, recipe, answer=SAID, folder=tmp_path / "trace")
    assert hooks(model) == count
    assert not (tmp_path / "trace").exists()


def test_places_of_a_trace_that_are_not_there():
    trace = look(llava(), LLAVA, asked(), answer=SAID, rows=[3])
    assert [trace.row_of(step) for step in range(5)] == list(trace.answer_rows)
    assert trace.row_of(-1) == trace.answer_rows[-1]
    for step in (5, -6):
        with pytest.raises(InputError, match=f"answer token {step} is out of range: the answer has 5 tokens"):
            trace.row_of(step)
    with pytest.raises(InputError, match=r"row 4 was not kept; look\(..., rows=\[4\]\)"):
        trace.attention(4)


# Memory


def test_nothing_that_is_kept_holds_a_whole_prompt_alive(monkeypatch):
    """A view of one token would keep what entered its layer: 64 MB for 4,096 tokens of 4,096 dimensions."""
    made = []

    class Kept(Recorder):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("vlmattn.inspection.looking.Recorder", Kept)
    look(llava(), LLAVA, asked(), answer=SAID)
    (recorder,) = made
    kept = [recorder.phi, recorder.dims, recorder.norms, recorder.likeness, recorder._first]
    tensors = [t for of in kept for found in of.values() for t in (found if isinstance(found, list) else [found])]
    assert len(tensors) > 4 * LAYERS * len(SAID)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "layers", "heads", "limit"),
    [
        ("memory", 32, 32, 2),
        ("folder", 32, 32, 2),
        ("rollout", 16, 1, 1),  # query x key of 16 layers, or of 32 heads, is more; its time grows with both
        ("rollout", 2, 32, 1),
    ],
)
def test_a_prompt_of_4096_image_tokens_fits_in_memory(what, layers, heads, limit, tmp_path):
    """32 layers of 32 heads and an answer of 16 tokens need less than 2 GB beside the model."""
    script = tmp_path / "grown.py"
    script.write_text(textwrap.dedent(GROWN))
    done = subprocess.run(
        [sys.executable, str(script), what, str(layers), str(heads), str(tmp_path / "trace")],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = float(done.stdout.split()[-1])
    print(f"{what}, {layers} layers, {heads} heads: {grown:.2f} GB")
    assert 0 < grown < limit


GROWN = """
    import sys
    from types import SimpleNamespace

    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from vlmattn.inspection import look, rollout

    torch.set_num_threads(1)
    what, layers, heads, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    text = dict(
        model_type="llama", vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=2, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )
    vision = dict(
        model_type="clip_vision_model", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=256, patch_size=4, projection_dim=8,
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=99, image_seq_length=4096, vision_feature_layer=-1
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 5, 6, *[99] * 4096, 7, 8, 9]])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 256, 256))
    processor = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=dict, decode=lambda ids, **_: str(list(ids))))

    def kilobytes(name):  # of this program: ru_maxrss would hold the peak of the process that started it
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

    before = kilobytes("VmRSS")
    if what == "rollout":
        assert rollout(model, inputs).values.shape == (4102, 4102)
    else:
        trace = look(model, processor, inputs, answer=range(5, 21), folder=folder if what == "folder" else None)
        assert len(trace.rows) == 16
        assert trace.attention(trace.row_of(-1)).values.shape == (32, 32, 4118)
    print((kilobytes("VmHWM") - before) * 1024 / 1e9)
"""
