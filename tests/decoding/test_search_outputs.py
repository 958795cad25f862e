"""Searches under generate(): processors that were made for a batch, and all that can be asked for beside the tokens."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE_TOKEN, build, left_padded, prompt
from torch import Tensor
from transformers import EncoderRepetitionPenaltyLogitsProcessor, LogitsProcessor, LogitsProcessorList
from zoo import ZOO

import vlmattn
from vlmattn import InputError
from vlmattn.decoding.opera import OPERA

pytestmark = pytest.mark.usefixtures("no_grad")
PROMPTS = (prompt("llava", 1, 4, 1), prompt("llava", 2, 7, 2), prompt("llava", 1, 9, 5))
NEW = 6
GREEDY = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
NEVER = [0, 95, 96, 97, 98, IMAGE_TOKEN]
BEAMS = OPERA(num_beams=3, candidates=100, weight=0, threshold=10**6, softmax="vocabulary")


@functools.cache
def searching(recipe="opera", attn="sdpa"):
    return vlmattn.wrap(build("llava", attn), recipe)


def asked(recipe="opera", prompts=PROMPTS, attn="sdpa", **options):
    return searching(recipe, attn).generate(
        **left_padded(list(prompts)), **GREEDY, return_dict_in_generate=True, **options
    )


def answer(sequences: Tensor, row: int, prompts=PROMPTS) -> list[int]:
    """Tokens of one answer, without padding."""
    length = max(one["input_ids"].shape[1] for one in prompts)
    return [token for token in sequences[row, length:].tolist() if token]


def even_after(first: int):
    """Row r may only write tokens of its own kind: those that leave a rest of r + first by 3."""
    return lambda row, ids: [t for t in range(1, 90) if t % 3 == (row + first) % 3]


class Favourites(LogitsProcessor):
    """One more for the favourite token of each row: knows how many rows its batch has."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)[:, None]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        assert len(ids) == len(scores) == len(self.tokens)
        return scores.scatter_add(1, self.tokens, torch.full_like(self.tokens, 3, dtype=scores.dtype))


PROCESSORS = {
    "repetition_penalty": lambda rows: 1.5,
    "encoder_repetition_penalty": lambda rows: 1.4,
    "no_repeat_ngram_size": lambda rows: 2,
    "encoder_no_repeat_ngram_size": lambda rows: 2,
    "bad_words_ids": lambda rows: [[t] for t in range(20, 60)],
    "prefix_allowed_tokens_fn": lambda rows: lambda row, ids: even_after(0)(rows[row], ids),
    "logits_processor": lambda rows: LogitsProcessorList([Favourites([30 + row for row in rows])]),
    "min_new_tokens": lambda rows: NEW,
}


@given(names=st.sets(st.sampled_from(sorted(PROCESSORS)), min_size=1, max_size=3))
@settings(max_examples=8, deadline=None)
def test_processors_act_on_a_row_of_a_batch_as_on_the_row_alone(names):
    def options(rows):
        return {name: PROCESSORS[name](rows) for name in names} | {"suppress_tokens": NEVER}

    few = OPERA(num_beams=3, candidates=3)
    together = asked(few, **options(range(3))).sequences
    alone = [asked(few, prompts=[one], **options([row])).sequences for row, one in enumerate(PROMPTS)]
    for row, one in enumerate(alone):
        assert answer(together, row) == answer(one, 0, [PROMPTS[row]])


@pytest.mark.parametrize(
    "options",
    [dict(repetition_penalty=1.3), dict(no_repeat_ngram_size=2), dict(prefix_allowed_tokens_fn=even_after(1)), {}],
    ids=["repetition", "ngrams", "prefix", "none"],
)
def test_without_its_penalty_a_search_in_a_batch_is_plain_beam_search(options):
    """Tokens, and the scores of the sequences."""
    options |= dict(suppress_tokens=NEVER, eos_token_id=2)
    batch = left_padded(list(PROMPTS))
    plain = build("llava").generate(
        **batch, max_new_tokens=NEW, do_sample=False, pad_token_id=3, num_beams=3, return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip
    found = searching(BEAMS).generate(
        **batch, max_new_tokens=NEW, pad_token_id=3, return_dict_in_generate=True, output_scores=True, **options
    )
    assert torch.equal(found.sequences, plain.sequences)
    torch.testing.assert_close(found.sequences_scores, plain.sequences_scores, rtol=0, atol=1e-4)


def test_a_processor_made_of_the_padded_batch():
    """It has the prompts of all rows, and cannot do with one of them."""
    batch = left_padded(list(PROMPTS))
    made = LogitsProcessorList([EncoderRepetitionPenaltyLogitsProcessor(1.4, batch["input_ids"])])
    wanted = asked(encoder_repetition_penalty=1.4, suppress_tokens=NEVER)
    found = asked(logits_processor=made, suppress_tokens=NEVER)
    assert torch.equal(found.sequences, wanted.sequences)


# What is returned


def by_hand(sequences: Tensor, row: int, **options):
    """What the model says of a prompt with its answer, without padding."""
    one = PROMPTS[row]
    answer = sequences[row, -NEW:]
    ids = torch.cat([one["input_ids"], answer[None, :-1]], 1)
    return build("llava", "eager")(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=one["pixel_values"], **options
    )


def whole(**options):
    return asked(attn="eager", min_new_tokens=NEW, suppress_tokens=NEVER, **options)


def test_logits_are_those_of_the_answer():
    out = whole(output_logits=True)
    assert out.scores is None
    assert len(out.logits) == NEW
    for row in range(3):
        wanted = by_hand(out.sequences, row).logits[0, -NEW:]
        torch.testing.assert_close(torch.stack(out.logits, 1)[row], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("recipe", ["opera", OPERA(threshold=1, candidates=3, num_beams=2)], ids=["opera", "rollbacks"])
def test_scores_are_those_the_tokens_were_chosen_by(recipe):
    prompts = [prompt("llava", 1, 4, seed) for seed in (1, 2)]
    options = dict(GREEDY, max_new_tokens=24, min_new_tokens=14)
    out = searching(recipe).generate(
        **left_padded(prompts), **options, return_dict_in_generate=True, output_scores=True
    )
    model = searching(recipe)
    new = out.sequences[:, -len(out.scores) :]
    chosen = torch.stack(out.scores, 1).gather(2, new[..., None])[..., 0]
    assert chosen.isfinite().all()
    lengths = (out.beam_indices >= 0).sum(1)
    torch.testing.assert_close(chosen.sum(1) / lengths, out.sequences_scores, rtol=0, atol=1e-5)
    transitions = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    torch.testing.assert_close(transitions, chosen, rtol=0, atol=1e-6)


def test_states_and_attention_are_those_of_the_answer():
    out = whole(output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == len(out.attentions) == NEW
    length = out.sequences.shape[1] - NEW
    for row in range(3):
        own = PROMPTS[row]["input_ids"].shape[1]
        wanted = by_hand(out.sequences, row, output_hidden_states=True, output_attentions=True)
        for layer in (0, 2, 4):
            states = torch.cat([step[layer] for step in out.hidden_states], 1)[row, length - own :]
            torch.testing.assert_close(states, wanted.hidden_states[layer][0], rtol=0, atol=1e-4)
        for layer in (0, 3):
            last = out.attentions[-1][layer][row, :, 0, length - own :]
            torch.testing.assert_close(last, wanted.attentions[layer][0, :, -1], rtol=0, atol=1e-5)
            first = out.attentions[0][layer]
            assert first.shape[-2:] == (length, length)


def test_the_cache_holds_the_prompts_and_their_answers():
    out = whole()
    cache, length = out.past_key_values, out.sequences.shape[1]
    assert cache.get_seq_length() == length - 1
    for row in range(3):
        own = PROMPTS[row]["input_ids"].shape[1] + NEW - 1
        wanted = by_hand(out.sequences, row, use_cache=True).past_key_values
        for found, other in zip(cache.layers, wanted.layers, strict=True):
            torch.testing.assert_close(found.keys[row, :, length - 1 - own :], other.keys[0], rtol=0, atol=1e-4)
    assert whole(use_cache=False).past_key_values is None


def test_nothing_else_is_returned_and_tokens_are_the_same():
    plain = searching(attn="eager").generate(
        **left_padded(list(PROMPTS)), **GREEDY, min_new_tokens=NEW, suppress_tokens=NEVER
    )
    out = whole(output_scores=True, output_logits=True)
    assert torch.equal(out.sequences, plain)
    assert out.hidden_states is None
    assert out.attentions is None


@pytest.mark.parametrize("family", ["qwen2_5_vl", "paligemma", "llava_next"])
def test_logits_of_other_families(family):
    """Token types, position ids and prefixes of a family's own."""
    tiny = ZOO[family]
    model, inputs = vlmattn.wrap(tiny.build(), "opera"), tiny.prompt(1, 6, 2).inputs
    options = dict(GREEDY, max_new_tokens=4, min_new_tokens=4, suppress_tokens=NEVER)
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    vlmattn.unwrap(model)
    new = out.sequences[:, -4:]
    plain = model.generate(
        **inputs, **options, return_dict_in_generate=True, output_logits=True,
        prefix_allowed_tokens_fn=lambda row, ids: [int(new[0, len(ids) - inputs["input_ids"].shape[1]])],
    )  # fmt: skip
    assert torch.equal(plain.sequences, out.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), rtol=0, atol=1e-4)


def test_a_row_of_nothing_but_padding():
    batch = left_padded(list(PROMPTS))
    batch["attention_mask"][1] = 0
    with pytest.raises(InputError, match=r"^row 1 of the prompts is nothing but padding; leave it out of the batch$"):
        searching().generate(**batch, **GREEDY)
