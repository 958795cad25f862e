"""Dropped tokens in models where some layers keep a state of all tokens in place of attention: they never enter it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from zoo import ZOO, Prompt, padded
from zoo.parts import set_attention

import vlmattn
from vlmattn import FastV, OptionError, PyramidDrop, StateError
from vlmattn.binding import bind
from vlmattn.interventions.pruning import Rounds, SparseVLM, VisionZip
from vlmattn.models import find_family
from vlmattn.recipe import Recipe

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]

HYBRIDS = ["lfm2_vl", "qwen3_5", "qwen3_5_moe", "minicpmv4_6", "lfm3_vl", "nemotron_h_omni"]  # attention in layers 1, 3
CUT, NEW, CLOSE, ACTS = 2, 4, 2e-4, 1e-2
every = pytest.mark.parametrize("name", HYBRIDS)
METHOD = FastV(layer=CUT, keep_ratio=0.5)


def prompts(name: str) -> list[Prompt]:
    """Of different lengths, with two images, one and one."""
    tiny = ZOO[name]
    return [tiny.prompt(2, 5, 1), tiny.prompt(1, 9, 2), tiny.prompt(1, 3, 3)]


def answer(model: PreTrainedModel, inputs: dict[str, Tensor], new: int = NEW, **options: Any) -> Any:
    """What generate() says when no placeholder is written."""
    return model.generate(
        **inputs, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, do_sample=False, suppress_tokens=[96, 97, 98, 99],
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def longer(prompt: Prompt, tokens: list[int]) -> dict[str, Tensor]:
    """The prompt with more tokens behind it, which are text."""
    found, more = dict(prompt.inputs), torch.tensor([tokens], dtype=torch.long)
    found["input_ids"] = torch.cat([found["input_ids"], more], 1)
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in found:
            found[name] = torch.nn.functional.pad(found[name], (0, len(tokens)), value=fill)
    return found


def stays(name: str, prompt: Prompt, ratio: float) -> Tensor:
    """Tokens that FastV keeps before layer 2, bool ``[tokens]``, by the bare model's own attention in layer 1."""
    model = ZOO[name].build()
    set_attention(model, "eager")
    seen = model(**prompt.inputs, output_attentions=True).attentions
    row = next(found for found in seen if found is not None)[0, :, -1].mean(0)  # layer 1 is the first that has some
    visual = prompt.images[0] >= 0
    best = row.masked_fill(~visual, -1).argsort(descending=True)[: round(ratio * int(visual.sum()))]
    return (~visual).index_fill(0, best, True)


def by_hand(name: str, inputs: dict[str, Tensor], keep: Tensor, cut: int = CUT) -> tuple[Tensor, DynamicCache]:
    """Logits after the last token and the states behind the cut, when the bare layers from ``cut`` on get the tokens
    that stay, and no others, as if that were the prompt."""
    model = ZOO[name].build()
    family, given = find_family(model), {}
    layers = family.layers(model)

    def note(number: int) -> Any:
        return lambda _, args, options: given.update({number: options | {"hidden": args[0]}})

    hooks = [
        layer.register_forward_pre_hook(note(number), with_kwargs=True) for number, layer in enumerate(layers[cut:])
    ]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    keep = torch.nn.functional.pad(keep, (0, inputs["input_ids"].shape[1] - len(keep)), value=True)
    hidden, cache = given[0]["hidden"][:, keep], DynamicCache(config=model.config.get_text_config())
    for number, layer in enumerate(layers[cut:]):
        options = {**given[number], "attention_mask": None, "past_key_values": cache, "use_cache": True}
        del options["hidden"]
        if options.get("position_embeddings") is not None:
            options["position_embeddings"] = tuple(table[..., keep, :] for table in options["position_embeddings"])
        if options.get("position_ids") is not None:
            options["position_ids"] = options["position_ids"][..., keep]
        hidden = layer(hidden, **options)
    return family.logits(model, hidden[:, -1:])[0, 0].float(), cache


def states_of(cache: Any, layer: int) -> list[Tensor]:
    found = cache.layers[layer]
    states = [*found.conv_states.values(), *found.recurrent_states.values()] if hasattr(found, "conv_states") else []
    return [state for state in states if state is not None]


@every
def test_a_model_run_by_hand_on_the_tokens_that_stay(name):
    """Prompts alone and in a padded batch; each token from the bare model's layers on everything so far."""
    tiny, given = ZOO[name], prompts(name)
    model = vlmattn.wrap(tiny.build(), METHOD)
    bare = [answer(tiny.build(), one.inputs) for one in given]
    found = [answer(model, one.inputs) for one in given]
    for prompt, plain, out in zip(given, bare, found, strict=True):
        keep, told = stays(name, prompt, 0.5), out.sequences[0, -NEW:].tolist()
        assert float((out.logits[0] - plain.logits[0]).abs().max()) > ACTS
        for step in range(1 if name == "nemotron_h_omni" else NEW):  # bare, its steps and its scan differ by 1e-2
            wanted, _ = by_hand(name, longer(prompt, told[:step]), keep)
            torch.testing.assert_close(out.logits[step][0].float(), wanted, atol=CLOSE, rtol=CLOSE)
    if not tiny.padding:
        batch = answer(model, padded(tiny, given))
        for row, alone in enumerate(found):
            wanted = torch.stack(alone.logits)[:, 0]
            torch.testing.assert_close(torch.stack(batch.logits)[:, row], wanted, atol=CLOSE, rtol=CLOSE)


@every
def test_states_behind_the_cut_are_those_of_the_shorter_prompt(name):
    """One word behind the images, none of whose tokens stays: a short convolution would still see some."""
    prompt = ZOO[name].prompt(2, 1, 1)
    model = vlmattn.wrap(ZOO[name].build(), METHOD, keep_ratio=0.0)
    cache = model(**prompt.inputs, use_cache=True).past_key_values
    whole = ZOO[name].build()(**prompt.inputs, use_cache=True).past_key_values
    _, wanted = by_hand(name, prompt.inputs, stays(name, prompt, 0.0))
    for layer in range(len(cache.layers)):
        found, full = states_of(cache, layer), states_of(whole, layer)
        if layer < CUT:
            assert all(map(torch.equal, found, full))
            continue
        assert len(found) == len(states_of(wanted, layer))
        for one, short, other in zip(found, states_of(wanted, layer), full, strict=True):
            torch.testing.assert_close(one, short, atol=CLOSE, rtol=CLOSE)
            assert not torch.allclose(one, other, atol=ACTS)
    assert states_of(cache, 2) or name == "nemotron_h_omni", "a layer behind the cut keeps a state"
    assert cache.layers[1].keys.shape[2] - cache.layers[3].keys.shape[2] == int((prompt.images >= 0).sum())


@every
def test_beams_answers_and_further_turns(name):
    tiny, prompt = ZOO[name], prompts(name)[0]
    model = vlmattn.wrap(tiny.build(), METHOD)
    twice = answer(model, padded(tiny, [prompt, prompt]), num_beams=2)
    alone = answer(model, prompt.inputs, num_beams=2)
    assert torch.equal(twice.sequences[0], alone.sequences[0])
    assert torch.equal(twice.sequences[1], alone.sequences[0])
    assert not torch.equal(answer(model, prompt.inputs).logits[-1], answer(tiny.build(), prompt.inputs).logits[-1])
    out = model(**prompt.inputs, use_cache=True)
    words = torch.tensor([[20, 21, 22]])
    mask = torch.ones(1, prompt.images.shape[1] + 3, dtype=torch.long)
    more = dict(input_ids=words, past_key_values=out.past_key_values, attention_mask=mask)
    if (rope := getattr(getattr(model, "model", None), "rope_deltas", None)) is not None:
        start = prompt.images.shape[1] + int(rope.max())
        more["position_ids"] = torch.arange(start, start + 3).expand(3, 1, -1)
    found = model(**more).logits[0, -1].float()
    wanted, _ = by_hand(name, longer(prompt, words[0].tolist()), stays(name, prompt, 0.5))
    torch.testing.assert_close(found, wanted, atol=CLOSE, rtol=CLOSE)


def sizes(name: str = "qwen3_5", layers: int = 24) -> Any:
    """Attention in every fourth layer, as Qwen3.5 has it."""
    model = ZOO[name].build()
    return replace(find_family(model).anatomy(model), layers=layers, attending=tuple(range(3, layers, 4)))


def test_which_layers_a_method_looks_at():
    found = bind(Recipe.of("fastv", layer=6), sizes())
    assert [layer for layer, looking in enumerate(found.on_attention) if looking] == [3]
    found = bind(Recipe.of("pyramiddrop_positions"), sizes())
    assert [layer for layer, method in enumerate(found.pruning) if method] == [7, 15, 19], (
        "attention in the layer itself"
    )
    found = bind(Recipe.of(SparseVLM(version="2")), sizes())
    assert [layer for layer, method in enumerate(found.pruning) if method] == [4, 8, 12], (
        "attention since the last stage"
    )
    found = bind(Recipe.of(Rounds()), sizes())
    assert [layer for layer, looking in enumerate(found.on_attention) if looking] == [11]


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ([FastV(layer=2)], r"'fastv' chooses tokens by attention, and there is none between layers 0 and 2: of this .*\[3, 7"),
        ([FastV(layer=5), FastV(layer=7)], r"'fastv' .* none between layers 5 and 7"),
        ([PyramidDrop(layers="4,8,12", positions="original")], r"'pyramiddrop' .* none in layer 4: .* choose other layers"),
        ([FastV(layer=4, mode="mask")], r"fastv\.mode 'mask' only hides tokens, .*; use mode='drop'"),
        ([Rounds(watershed="2")], r"rounds\.watershed: no layer up to 2 has attention; name one of \[3, 7"),
    ],
)  # fmt: skip
def test_choices_that_no_attention_could_tell(recipe, match):
    with pytest.raises(OptionError, match=match):
        bind(Recipe.of(recipe), sizes())


def test_a_batch_of_further_images_is_continued_one_by_one():
    """Layers with a state would count what fills up the shorter turns."""
    tiny = ZOO["lfm2_vl"]
    model = vlmattn.wrap(tiny.build(), METHOD)
    first, second = tiny.prompt(1, 5, 1), [tiny.prompt(2, 4, 2), tiny.prompt(1, 4, 3)]
    cache = model(**padded(tiny, [first, first]), use_cache=True).past_key_values
    more = padded(tiny, second)
    before = torch.ones(2, first.images.shape[1], dtype=torch.long)
    more["attention_mask"] = torch.cat([before, more["attention_mask"]], 1)
    with pytest.raises(StateError, match=r"once 'fastv' has dropped tokens, .* continue the conversations one by one"):
        model(**more, past_key_values=cache)


@pytest.mark.parametrize(
    "method",
    [
        SparseVLM(layers="2", keep_ratios=(0.5,), version="2"),
        VisionZip(dominant=0.4, contextual=0.1, positions="original"),
    ],
)
@every
def test_methods_that_look_at_rotations_or_at_the_tower(name, method):
    """In LFM3 the layer behind the one that is looked at has no rotary tables, in Nemotron H none has any."""
    model = ZOO[name].build()
    if isinstance(method, VisionZip) and not find_family(model).anatomy(model).tower_layers:
        pytest.skip("refused: a tower that cannot be looked at")
    prompt = prompts(name)[0]
    plain = answer(model, prompt.inputs)
    found = answer(vlmattn.wrap(model, method), prompt.inputs)
    assert float((found.logits[0] - plain.logits[0]).abs().max()) > ACTS
    assert found.past_key_values.layers[3].keys.shape[2] < plain.past_key_values.layers[3].keys.shape[2]
