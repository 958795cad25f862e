"""``output_attentions``: one entry for each layer, at its index, and those are the weights that the layer used."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import build, left_padded, prompt
from torch import Tensor, nn
from zoo import ZOO

import vlmattn
from vlmattn.decoding import Branch, Contrast, ContrastiveDecoding

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:va[rf]|vlmattn:UserWarning")]

GREEDY = dict(do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_attentions=True)
EDITS = (
    "pai", "var", "var_official", "paint", "heads_guided", "sofa", "sofa_mix", "bidirectional_prompt", "isolate_images",
    "knockout_image_text", "knockout_sinks", "calibration", "recycled", "longheads", "rounds_read", "pai+var",
)  # fmt: skip


class Layers:
    """What every layer's attention is made of: values of all tokens so far, and what goes into the output projection."""

    def __init__(self, model: nn.Module) -> None:
        self.values: dict[int, list[Tensor]] = {}
        self.outs: dict[int, list[Tensor]] = {}
        for index, layer in enumerate(model.model.language_model.layers):
            layer.self_attn.v_proj.register_forward_hook(
                lambda module, args, out, index=index: self.values.setdefault(index, []).append(out)
            )
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda module, args, index=index: self.outs.setdefault(index, []).append(args[0])
            )

    def heads(self, layer: int, forward: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Head outputs ``[batch, head, query, dim]`` of one forward, and what ``weights`` make of the values."""
        out = self.outs[layer][forward].unflatten(-1, (4, 8)).transpose(1, 2)
        values = torch.cat(self.values[layer][: forward + 1], 1).unflatten(-1, (2, 8)).transpose(1, 2)
        return out, weights @ values.repeat_interleave(2, 1)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", EDITS)
def test_weights_are_those_that_the_layer_used(family, name):
    """In a padded batch, while the prompt is read and while the answer is written."""
    model = build(family, "eager")
    layers, inputs = Layers(model), left_padded([prompt(family, images=2), prompt(family, words=7, seed=2)])
    with vlmattn.applied(model, name):
        found = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, **GREEDY).attentions
    assert [len(step) for step in found] == [4, 4, 4]
    real = inputs["attention_mask"].bool()[:, None, :, None]
    for forward, step in enumerate(found):
        for layer, weights in enumerate(step):
            out, made = layers.heads(layer, forward, weights)
            rows = real if forward == 0 else torch.ones_like(real[:, :, :1])  # padding rows are nobody's
            torch.testing.assert_close(out * rows, made * rows, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["vhr", "heads_random_half", "heads_amplify_random"])
def test_gains_of_whole_heads_are_not_in_the_weights(name):
    model, inputs = build("llava", "eager"), prompt("llava")
    layers = Layers(model)
    with vlmattn.applied(model, name):
        found = model(**inputs, output_attentions=True).attentions
    changed = 0
    for layer, weights in enumerate(found):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-5)
        layers.outs[layer] = layers.outs[layer][-1:]  # vhr reads the text alone beside the prompt
        out, made = (found[:, :, -4:] for found in layers.heads(layer, 0, weights))  # the rows after the image
        gains = (out * made).sum((0, 2, 3)) / made.square().sum((0, 2, 3))
        torch.testing.assert_close(out, made * gains[:, None, None], rtol=0, atol=2e-5)
        changed += int(((gains - 1).abs() > 0.1).sum())
    assert changed, "the premise: some heads have gains"


def test_layers_without_edits_have_the_weights_of_the_bare_model():
    model, inputs = build("llava", "eager"), prompt("llava")
    bare = model(**inputs, output_attentions=True).attentions
    with vlmattn.applied(model, "pai", layers="2"):
        found = model(**inputs, output_attentions=True).attentions
    assert all(torch.equal(found[layer], bare[layer]) for layer in (0, 1))
    assert not torch.equal(found[2], bare[2])


@pytest.mark.parametrize("name", ["pai", "vcd", "fastv", "razor"])
def test_the_config_asks_too_and_sdpa_has_none_as_ever(name):
    inputs = prompt("llava")
    model, options = build("llava", "eager"), {"heads": "1.0"} if name == "razor" else {}
    model.config.text_config.output_attentions = True
    with vlmattn.applied(model, name, **options):
        assert len(model(**inputs).attentions) == 4
    plain = build("llava", "sdpa")
    with vlmattn.applied(plain, name, **options):
        found = plain.generate(**inputs, max_new_tokens=3, min_new_tokens=3, **GREEDY).attentions
    assert found == ((), (), ())


def test_layers_that_dropped_tokens_tell_of_those_that_are_left():
    model, inputs = build("llava", "eager"), prompt("llava")
    with vlmattn.applied(model, "fastv"):
        out = model(**inputs, output_attentions=True, output_hidden_states=True)
    widths = [tuple(weights.shape[2:]) for weights in out.attentions]
    assert widths[:2] == [(23, 23)] * 2
    assert widths[2:] == [(15, 15)] * 2, "8 of 16 image tokens are dropped"
    assert [len(hidden[0]) for hidden in out.hidden_states] == [23, 23, 23, 15, 15], "layer 2 lets them go"
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-5)


def test_heads_that_are_kept_apart_have_none_and_that_is_said_once():
    model, inputs = build("llava", "eager"), prompt("llava")
    vlmattn.wrap(model, "duo", heads="1.0", sinks=2, recent=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, **GREEDY).attentions
    assert [[weights is None for weights in step] for step in found[1:]] == [[True] * 4] * 2
    said = [str(w.message) for w in caught if "attentions" in str(w.message)]
    assert len(said) == 1
    assert "of layers 0, 1, 2, 3 are None" in said[0]


@pytest.mark.parametrize("longer", [False, True], ids=["alike", "a longer branch"])
def test_rules_give_the_weights_of_the_prompts_of_the_call(longer):
    """Branches go through the same layers; nobody asked for theirs, nor for the padding that longer ones need."""
    model, inputs = build("llava", "eager"), left_padded([prompt("llava"), prompt("llava", words=7, seed=2)])
    more = (lambda ids: torch.cat([ids[:1], torch.tensor([50, 51]), ids[1:]])) if longer else "same"
    rule = ContrastiveDecoding((Branch(name="other", image="blank", prompt=more),), Contrast((0.0,), beta=0.0))
    bare = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, output_hidden_states=True, **GREEDY)
    with vlmattn.applied(model, rule):
        found = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, output_hidden_states=True, **GREEDY)
    assert torch.equal(found.sequences, bare.sequences), "the premise: weight 0 leaves the logits"
    for name in ("attentions", "hidden_states"):
        for mine, theirs in zip(found[name], bare[name], strict=True):
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "family", ["llava", "blip2", "gemma3_window", "internvl", "mistral3", "qwen3_vl_moe", "kimi_k25"]
)
def test_families_whose_layers_hand_the_question_on_in_other_ways(family):
    tiny = ZOO[family]
    model, inputs = tiny.build("eager"), tiny.prompt().inputs
    bare = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **GREEDY).attentions
    with vlmattn.applied(model, "pai"):
        found = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **GREEDY).attentions
    assert [[weights.shape for weights in step] for step in found] == [[w.shape for w in step] for step in bare]
