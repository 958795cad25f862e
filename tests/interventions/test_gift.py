"""GIFT against its equations in plain loops, on attention weights that the bare model tells."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from numerics import TINY_MODEL, bound, near
from test_masks import ANSWER_MARK, PAD, Processor, Token, batch_of, inputs_of, write
from tiny import FAMILIES, IMAGE_TOKEN, build, generate
from tiny import TEXT as TEXT_CONFIG
from torch import Tensor
from transformers import AttentionInterface, LlavaConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import vlmattn
from vlmattn import GIFT, OptionError

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = bound(torch.float32, TINY_MODEL, scale=0.5)  # logits of a random model are smaller
ALPHA = 3.0
PLACEHOLDERS = [96, 97, 98, 99]
family_matrix = pytest.mark.parametrize("family", FAMILIES)


def question(tokens: list[Token]) -> list[int]:
    """What the user says in the last turn, where an image has come before."""
    last = max((t.turn for t in tokens), default=-1)
    out, seen = [], False
    for n, token in enumerate(tokens):
        seen = seen or token.image >= 0
        if seen and token.is_text and token.turn == last >= 0 and token.id != ANSWER_MARK:
            out.append(n)
    return out


SILENT: set[int] = set()  # ids of function words; a test fills it


def telling(tokens: list[Token]) -> list[int]:
    """Rows of content words, or of all words if there are no others."""
    asked = question(tokens)
    return [n for n in asked if tokens[n].id not in SILENT] or asked


def best(values: list[float]) -> set[int]:
    """The floor(H/2) heads of largest value."""
    return set(sorted(range(len(values)), key=lambda h: -values[h])[: len(values) // 2])


def key_weights(attended: Tensor, tokens: list[Token]) -> dict[int, float]:
    """w_j of the image keys from ``[heads, row, key]``, by loops."""
    rows, keys = telling(tokens), [n for n, t in enumerate(tokens) if t.image >= 0]
    if not rows:
        return dict.fromkeys(keys, 1.0)
    weights = attended.double().tolist()
    heads = range(len(weights))
    shift = {(h, i, j): max(weights[h][i][j] - weights[h][i - 1][j], 0.0) for h in heads for i in rows for j in keys}
    chosen = best([sum(shift[h, i, j] for i in rows for j in keys) for h in heads])
    saliency = [sum(shift[h, i, j] for h in chosen for i in rows) / len(chosen) / len(rows) for j in keys]
    mean = sum(saliency) / len(keys)
    std = math.sqrt(sum((s - mean) ** 2 for s in saliency) / (len(keys) - 1))
    clamped = [min(max(s, mean - 3 * std), mean + 3 * std) for s in saliency]
    low, high = min(clamped), max(clamped)
    return {j: math.exp(ALPHA * (s - low) / (high - low)) for j, s in zip(keys, clamped, strict=True)}


def boosted(attended: Tensor, weights: dict[int, float], asked: list[int]) -> Tensor:
    """One row of attention ``[heads, key]`` after the edit, by loops."""
    row = attended.double().tolist()
    if not asked:
        return attended
    heads = range(len(row))
    on_image = [sum(row[h][j] for j in weights) for h in heads]
    on_question = [sum(row[h][j] for j in asked) for h in heads]
    looking, reading = best(on_image), best(on_question)
    ratio = sum(row[h][j] * w for h in looking for j, w in weights.items()) / sum(on_image[h] for h in looking)
    for h in heads:
        for j, w in weights.items():
            row[h][j] *= w if h in looking else 1.0
        for j in asked:
            row[h][j] *= ratio if h in reading else 1.0
        total = sum(row[h])
        row[h] = [a / total for a in row[h]]
    return torch.tensor(row, dtype=torch.float64)


def naive(model: PreTrainedModel, rows: list[list[Token]], inputs: dict, saliency: int, layers: range) -> Tensor:
    """Logits of the bare model, with attention of our own in the rows that predict a new token.

    The prompt's attention in the layer of the saliency is that of a first, unedited pass.
    """
    model.set_attn_implementation({"text_config": "eager"})
    prompt = min(len([t for t in row if not t.generated]) for row in rows)
    told = model(**inputs, output_attentions=True).attentions[saliency]
    gazes = [key_weights(told[b], [t for t in row if not t.generated]) for b, row in enumerate(rows)]
    asked = [question([t for t in row if not t.generated]) for row in rows]

    def attend(module, query, key, value, mask, scaling, dropout=0.0, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        weights = (query @ key.transpose(-1, -2) * scaling + mask).softmax(-1)
        if module.layer_idx in layers:
            for b in range(len(weights)):
                for i in range(prompt - 1, weights.shape[2]):
                    weights[b, :, i] = boosted(weights[b, :, i], gazes[b], asked[b]).float()
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("gift_for_test", attend)
    AttentionMaskInterface.register("gift_for_test", eager_mask)
    model.set_attn_implementation({"text_config": "gift_for_test"})
    return model(**inputs).logits


def check(build_one, rows: list[list[Token]], saliency: int, layers: str, steps: int = 3, attn: str = "sdpa") -> None:
    """Greedy steps of the wrapped model against the naive one, teacher forced; and a direct forward."""
    model = build_one()
    model.set_attn_implementation({"text_config": attn})
    inputs = inputs_of(model, rows, positions=False)
    bare = generate(model, inputs, steps, suppress_tokens=PLACEHOLDERS)
    vlmattn.wrap(model, GIFT(alpha=ALPHA, saliency=str(saliency), layers=layers), processor=Processor())
    got = generate(model, inputs, steps, suppress_tokens=PLACEHOLDERS)
    allowed = got.clone()
    allowed[..., [2, *PLACEHOLDERS]] = -torch.inf
    told = allowed.argmax(-1)[:, : steps - 1].tolist()
    longer = [row + [Token(t, generated=True) for t in told[b]] for b, row in enumerate(rows)]
    more = inputs_of(model, longer)
    edited = range(4)[slice(*(int(n) if n else None for n in layers.split(":")))] if ":" in layers else [int(layers)]
    expected = naive(build_one(), longer, more, saliency, edited)[:, -steps:]
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert (got - bare).abs().amax((0, 2)).min() > 1e-3, "every step is edited"
    assert model.vlmattn.report()["fired"]["gift"] >= sum(bool(question(row)) for row in rows)
    direct = model(**inputs_of(model, rows)).logits[:, -1]
    torch.testing.assert_close(direct, expected[:, 0], rtol=0, atol=TOLERANCE)
    again = generate(model, inputs, steps, suppress_tokens=PLACEHOLDERS, use_cache=False)
    torch.testing.assert_close(again, got, rtol=0, atol=TOLERANCE)


PROMPTS = {
    "one image": [["img", 5]],
    "two images": [[1, "img", 2, "img", 4]],
    "words before the image": [[3, "img", 4]],
    "two turns": [["img", 3], [4]],
    "an image in every turn": [["img", 3], ["img", 4]],
}


@pytest.mark.parametrize("layers", ["2", "3", "2:"])
@pytest.mark.parametrize("text", PROMPTS)
@family_matrix
def test_layers_after_the_saliency(family, text, layers):
    check(lambda: build(family), [write(family, *PROMPTS[text])], 1, layers)


@pytest.mark.parametrize(("saliency", "layers"), [(2, "0:"), (2, "1"), (1, "1:"), (3, "0:2")])
@pytest.mark.parametrize("text", ["one image", "an image in every turn"])
@family_matrix
def test_layers_before_the_saliency_need_a_pass_of_their_own(family, text, saliency, layers):
    check(lambda: build(family), [write(family, *PROMPTS[text])], saliency, layers)


@pytest.mark.parametrize(("saliency", "layers"), [(1, "2:"), (2, "0:")])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@family_matrix
def test_a_padded_batch(family, attn, saliency, layers):
    """The last sample has no question: nothing follows its image in the user's turn."""
    rows = [
        write(family, ["img", 3], [4]),
        write(family, ["img", "img", 5], seed=5),
        write(family, [2, "img", 1], seed=9),
    ]
    check(lambda: build(family), batch_of(rows), saliency, layers, attn=attn)


@pytest.mark.parametrize(("saliency", "layers"), [(1, "2:"), (2, "0:")])
@family_matrix
def test_a_static_cache_does_not_matter(family, saliency, layers):
    """Its keys are longer than the prompt: rows must be counted from the prompt's beginning."""
    rows = batch_of([write(family, ["img", 5]), write(family, ["img", "img", 3], seed=5)])
    model = build(family)
    inputs = inputs_of(model, rows, positions=False)
    bare = generate(model, inputs, suppress_tokens=PLACEHOLDERS)
    vlmattn.wrap(model, GIFT(alpha=ALPHA, saliency=str(saliency), layers=layers), processor=Processor())
    expected = generate(model, inputs, suppress_tokens=PLACEHOLDERS)
    got = generate(model, inputs, suppress_tokens=PLACEHOLDERS, cache_implementation="static")
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert (got - bare).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize(("saliency", "layers"), [(1, "2:"), (2, "0:")])
@family_matrix
def test_function_words_tell_nothing_unless_there_are_no_others(family, saliency, layers, share, monkeypatch):
    row = write(family, ["img", 6])
    ids = [row[n].id for n in question(row)]
    silent = set(ids[: round(share * len(ids))])
    monkeypatch.setattr("vlmattn.models.turns.FUNCTION_WORDS", frozenset(Processor().decode([i]) for i in silent))
    monkeypatch.setattr(sys.modules[__name__], "SILENT", silent)
    assert (telling(row) == question(row)) == (share == 1.0)
    check(lambda: build(family), [row], saliency, layers)


def test_a_question_before_the_image_is_none():
    """The sample stays bare, and its neighbour is edited."""
    rows = batch_of([write("llava", [4, "img"]), write("llava", ["img", 4], seed=5)])
    assert [len(question(row)) for row in rows] == [0, 4]
    model = build("llava")
    inputs = inputs_of(model, rows)
    bare = model(**inputs).logits[:, -1]
    vlmattn.wrap(model, GIFT(saliency="1", layers="2:"), processor=Processor())
    got = model(**inputs).logits[:, -1]
    torch.testing.assert_close(got[0], bare[0], rtol=0, atol=TOLERANCE)
    assert (got - bare)[1].abs().max() > 1e-2


@pytest.mark.parametrize("heads", [3, 5])
def test_half_of_an_odd_number_of_heads_is_rounded_down(heads):
    text = {**TEXT_CONFIG, "hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": 1}
    vision = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=4, projection_dim=32,
    )  # fmt: skip

    def make() -> PreTrainedModel:
        language = dict(model_type="llama", **text)
        return build(
            "llava", config=LlavaConfig(text_config=language, vision_config=vision, image_token_index=IMAGE_TOKEN)
        )

    check(make, [write("llava", ["img", 5])], 1, "2:")


def test_only_rows_that_predict_are_edited_and_only_in_their_layers():
    model, rows = build("llava"), [write("llava", ["img", 5])]
    inputs = inputs_of(model, rows)
    bare = model(**inputs, output_hidden_states=True).hidden_states
    vlmattn.wrap(model, GIFT(saliency="1", layers="2"), processor=Processor())
    got = model(**inputs, output_hidden_states=True).hidden_states
    for layer in range(5):
        near(got[layer][:, :-1], bare[layer][:, :-1])
        changed = (got[layer] - bare[layer])[:, -1].abs().max()
        assert changed > 1e-3 if layer >= 3 else changed == 0


def test_the_question_is_read_in_pieces_of_rows(monkeypatch):
    """A question longer than what is looked at together gives the same."""
    rows = [write("llava", ["img", 23])]
    model = build("llava")
    inputs = inputs_of(model, rows)
    bare = model(**inputs).logits
    vlmattn.wrap(model, GIFT(saliency="1", layers="2:"), processor=Processor())
    whole = model(**inputs).logits
    assert (whole - bare).abs().max() > 1e-3
    for size in (1, 2, 7, 23):
        monkeypatch.setattr("vlmattn.interventions.gift._ROWS", size)
        torch.testing.assert_close(model(**inputs).logits, whole, rtol=0, atol=TOLERANCE)


def test_two_prompts_in_sequence_follow_their_own_gaze():
    model = build("llava")
    one, other = (inputs_of(model, [write("llava", ["img", 5], seed=seed)], positions=False) for seed in (3, 4))
    bare = generate(model, one, suppress_tokens=PLACEHOLDERS)
    vlmattn.wrap(model, GIFT(saliency="1", layers="2:"), processor=Processor())
    first = generate(model, one, suppress_tokens=PLACEHOLDERS)
    assert (first - bare).abs().max() > 1e-3
    generate(model, other, suppress_tokens=PLACEHOLDERS)
    assert torch.equal(generate(model, one, suppress_tokens=PLACEHOLDERS), first)


def test_a_second_turn_follows_the_new_question():
    """Two pieces on one cache: the saliency is that of the second turn's question."""
    tokens = write("llava", ["img", 4], [5])
    cut = next(n for n, t in enumerate(tokens) if t.id == ANSWER_MARK) + 4
    model = build("llava")
    inputs = inputs_of(model, [tokens])
    told = model(**inputs).logits  # the premise: the oracle's first pass is bare
    vlmattn.wrap(model, GIFT(alpha=ALPHA, saliency="1", layers="3"), processor=Processor())
    first = dict(input_ids=inputs["input_ids"][:, :cut], pixel_values=inputs["pixel_values"])
    cache = model(**first, use_cache=True).past_key_values
    got = model(input_ids=inputs["input_ids"][:, cut:], past_key_values=cache).logits[:, -1]
    # Layer 3 is the last: edits of the first piece's last row are in no key, so whole and in pieces are the same.
    expected = naive(build("llava"), [tokens], inputs, 1, range(3, 4))[:, -1]
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    assert (told[:, -1] - expected).abs().max() > 1e-3


def test_beams_of_a_padded_batch_score_as_each_sample_alone():
    model = vlmattn.wrap(build("llava"), GIFT(saliency="2", layers="0:"), processor=Processor())
    prompts = [write("llava", ["img", 5]), write("llava", ["img", 2, "img", 3], seed=6)]
    settings = dict(
        max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, num_beams=3, output_scores=True
    )
    settings |= dict(return_dict_in_generate=True, suppress_tokens=PLACEHOLDERS)
    together = model.generate(**inputs_of(model, batch_of(prompts), positions=False), **settings).sequences_scores
    for n, tokens in enumerate(prompts):
        inputs = inputs_of(model, batch_of(prompts)[n : n + 1], positions=False)
        if n == 0:
            pixels = inputs_of(model, batch_of(prompts), positions=False)["pixel_values"]
        images = len({t.image for t in tokens if t.image >= 0})
        inputs["pixel_values"], pixels = pixels[:images], pixels[images:]
        alone = model.generate(**inputs, **settings).sequences_scores
        torch.testing.assert_close(alone[0], together[n], rtol=0, atol=TOLERANCE)
    assert batch_of(prompts)[0][0] == PAD
    vlmattn.unwrap(model)
    bare = model.generate(**inputs_of(model, batch_of(prompts), positions=False), **settings).sequences_scores
    assert (together - bare).abs().max() > 1e-3


def test_no_weight_without_strength():
    """alpha 0 makes every weight 1 and the ratio 1."""
    model, rows = build("llava"), [write("llava", ["img", 5])]
    inputs = inputs_of(model, rows)
    bare = model(**inputs).logits
    with vlmattn.applied(model, GIFT(alpha=0.0, saliency="1", layers="2:"), processor=Processor()):
        near(model(**inputs).logits, bare)


@pytest.mark.parametrize("saliency", ["0:2", "9", "x"])
def test_the_saliency_is_of_one_layer(saliency):
    with pytest.raises(OptionError, match=r"gift\.saliency"):
        vlmattn.wrap(build("llava"), GIFT(saliency=saliency, layers="2:"), processor=Processor())


def test_without_a_processor_it_says_how_to_give_one():
    with pytest.raises(OptionError, match="processor=processor"):
        vlmattn.wrap(build("llava"), "gift")
