"""Dropped tokens in models where some layers have a sliding window, which goes on to count the tokens there were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from choices import Choices
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from zoo import ZOO, Prompt, padded
from zoo.parts import set_attention

import vlmattn
from vlmattn import PAI, FastV, OptionError, PyramidDrop, SoFA
from vlmattn.models import find_family

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]

WINDOWED = ["gemma3_window", "cohere2_window", "gemma4_shared"]  # windows of 8, prompts of 20 and more
OTHERS = ["gemma4_unified", "gemma4_key_value", "cohere_compass", "muse_glimmer", "muse_spark", "step3p7"]
CUT, NEW, CLOSE, ACTS = 1, 12, 2e-4, 1e-2
every = pytest.mark.parametrize("name", WINDOWED)
attn_matrix = pytest.mark.parametrize("attn", ["sdpa", "eager"])
METHODS = {
    "fastv": FastV(layer=CUT, keep_ratio=0.5),
    "stages": PyramidDrop(layers="1,2,3", keep_ratios=(0.75, 0.5, 0.25), positions="original"),
    "compact": PyramidDrop(layers="1,2,3", keep_ratios=(0.75, 0.5, 0.25)),
}


def prompts(name: str) -> list[Prompt]:
    tiny = ZOO[name]
    return [tiny.prompt(2, 5, 1), tiny.prompt(1, 19, 2), tiny.prompt(1, 3, 3)]


def build(name: str, attn: str = "sdpa") -> PreTrainedModel:
    """The tiny model with a window of 8, whatever its config says."""
    model = ZOO[name].build(attn)
    for found in (*model.modules(), model.config.get_text_config()):
        if getattr(found, "sliding_window", None):
            found.sliding_window = 8
    return model


def answer(model: PreTrainedModel, inputs: dict[str, Tensor], new: int = NEW, **options: Any) -> Any:
    """What generate() says when no placeholder is written."""
    return model.generate(
        **inputs, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, do_sample=False, suppress_tokens=[*range(90, 100)],
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def logits_of(out: Any) -> Tensor:
    """``[batch, step, vocabulary]``"""
    return torch.stack(out.logits, 1).float()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=CLOSE, rtol=CLOSE)


def window_of(name: str) -> int:
    model = build(name)
    return find_family(model).anatomy(model).window


def by_hand(name: str, prompt: Prompt, told: list[int], ratio: float) -> Tensor:
    """Logits after some tokens: the bare layers read the rows that FastV keeps, and no others, each with what of its own
    row of the mask is about them."""
    model = build(name)
    set_attention(model, "eager")
    family, given = find_family(model), {}

    def note(number: int) -> Any:
        return lambda _, args, options: given.update({number: options | {"hidden": args[0], "more": args[1:]}})

    for number, layer in enumerate(family.layers(model)[CUT:]):
        layer.register_forward_pre_hook(note(number), with_kwargs=True)
    seen = model(**prompt.inputs, output_attentions=True, use_cache=False).attentions[CUT - 1][0, :, -1].mean(0)
    visual = prompt.images[0] >= 0
    best = seen.masked_fill(~visual, -1).argsort(descending=True, stable=True)[: round(ratio * int(visual.sum()))]
    keep = pad((~visual).index_fill(0, best, True), (0, len(told)), value=True)
    longer = dict(prompt.inputs, input_ids=torch.cat([prompt.inputs["input_ids"], torch.tensor([told]).long()], 1))
    for key in longer.keys() & {"attention_mask", "token_type_ids", "mm_token_type_ids"}:
        longer[key] = pad(longer[key], (0, len(told)), value=int(key == "attention_mask"))
    model(**longer, use_cache=False)
    hidden = given[0]["hidden"][:, keep]
    for number, layer in enumerate(family.layers(model)[CUT:]):
        options = dict(given[number])
        del options["hidden"]
        more = [rows[:, keep] for rows in options.pop("more")]
        options["attention_mask"] = options["attention_mask"][:, :, keep][..., keep]
        options["position_embeddings"] = tuple(table[..., keep, :] for table in options["position_embeddings"])
        hidden = layer.forward(hidden, *more, **options)
    return family.logits(model, hidden[:, -1:])[0, 0].float()


@attn_matrix
@every
def test_a_model_run_by_hand_on_the_tokens_that_stay(name, attn):
    """Prompts longer than the window, alone and in a padded batch, and answers beyond it."""
    tiny, given = ZOO[name], prompts(name)
    assert window_of(name) < min(prompt.images.shape[1] for prompt in given)
    assert window_of(name) < NEW
    model = vlmattn.wrap(build(name, attn), METHODS["fastv"])
    found = [answer(model, one.inputs) for one in given]
    for prompt, out in zip(given, found, strict=True):
        told = out.sequences[0, -NEW:].tolist()
        assert (
            float((logits_of(out)[0, 0] - logits_of(answer(build(name, attn), prompt.inputs, 1))[0, 0]).abs().max())
            > ACTS
        )
        for step in (0, 1, NEW // 2, NEW - 1):
            wanted = by_hand(name, prompt, told[:step], 0.5)
            close(logits_of(out)[0, step], wanted)
    batch = logits_of(answer(model, padded(tiny, given)))
    for row, alone in enumerate(found):
        close(batch[row], logits_of(alone)[0])


def hidden_alike(name: str, recipe: list[Any], run: Any, attn: str = "sdpa") -> None:
    """What ``run`` finds under a recipe whose first method drops tokens, and where it only hides the same ones."""
    choices, (method, *others) = Choices(), recipe
    with choices.noted():
        hidden = run(vlmattn.wrap(build(name, attn), [replace(method, mode="mask"), *others]))
    with choices.repeated():
        dropped = run(vlmattn.wrap(build(name, attn), recipe))
    bare = run(build(name, attn) if not others else vlmattn.wrap(build(name, attn), others))
    for one, other, plain in zip(dropped, hidden, bare, strict=True):
        close(one, other)
        assert one.shape != plain.shape or float((one - plain).abs().max()) > ACTS


def alone_and_together(model: PreTrainedModel, name: str) -> list[Tensor]:
    given = prompts(name)
    found = [logits_of(answer(model, one.inputs)) for one in given]
    return [*found, logits_of(answer(model, padded(ZOO[name], given)))]


@pytest.mark.parametrize("method", METHODS)
@attn_matrix
@every
def test_dropped_tokens_equal_hidden_ones(name, attn, method):
    if name == "gemma4_shared" and method != "fastv":
        with pytest.raises(OptionError, match=r"before layer 3, and layer 4 uses the keys of layer 2.* layers up to 2"):
            vlmattn.wrap(build(name, attn), METHODS[method])
        return
    hidden_alike(name, [METHODS[method]], lambda model: alone_and_together(model, name), attn)


@pytest.mark.parametrize("edit", [PAI(alpha=0.9, layers="0:"), SoFA(layers="0:")], ids=lambda e: e.info.name)
@every
def test_with_edits(name, edit):
    """Edges that an edit opens stay within the window, by the places that tokens had."""
    if "opening" in dict(find_family(model := build(name)).anatomy(model).refused) and edit.opens():
        pytest.skip("refused: the family opens no edges")
    hidden_alike(name, [METHODS["fastv"], edit], lambda model: alone_and_together(model, name))


@every
def test_ways_to_answer(name):
    def ways(model: PreTrainedModel) -> list[Tensor]:
        given = prompts(name)
        batch = padded(ZOO[name], given)
        plain = logits_of(answer(model, batch))
        if not ZOO[name].uncached:
            close(logits_of(answer(model, batch, use_cache=False)), plain)
        beams = answer(model, batch, num_beams=2, output_scores=True)
        return [plain, beams.sequences_scores, logits_of(beams)]

    hidden_alike(name, [METHODS["fastv"]], ways)


@every
def test_drafts_are_taken_back(name):
    """Prompt lookup."""
    prompt = prompts(name)[0]
    ids = prompt.inputs["input_ids"]
    ids[0, -5:] = torch.tensor([5, 6, 7, 5, 6])
    model = vlmattn.wrap(build(name), METHODS["fastv"])
    plain = answer(model, prompt.inputs)
    drafted = answer(model, prompt.inputs, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted.sequences, plain.sequences)
    close(logits_of(drafted), logits_of(plain))


@pytest.mark.parametrize("method", ["fastv", "stages"])
@every
def test_further_turns(name, method):
    """On a cache whose windows have left the first image behind; the second turn has an image of its own."""
    if name == "gemma4_shared" and method == "stages":
        pytest.skip("refused: a layer uses keys again")
    tiny = ZOO[name]
    first, second, words = tiny.prompt(1, 12, 1), tiny.prompt(1, 4, 2), torch.tensor([[20, 21, 22]])

    def turns(model: PreTrainedModel) -> list[Tensor]:
        given = {key: value for key, value in first.inputs.items() if key != "attention_mask"}
        cache = model(**given, use_cache=True).past_key_values
        more = {key: value for key, value in second.inputs.items() if key != "attention_mask"}
        found = [model(**more, past_key_values=cache).logits[:, -1:].float()]
        last = {"input_ids": words, "past_key_values": cache}
        if "token_type_ids" in more:
            last["token_type_ids"] = torch.zeros_like(words)
        return [*found, model(**last).logits.float()]

    hidden_alike(name, [METHODS[method]], turns)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name):
    method = FastV(layer=2, keep_ratio=0.5)  # behind the layers that DeepStack adds to
    hidden_alike(name, [method], lambda model: [logits_of(answer(model, one.inputs)) for one in prompts(name)])
