"""Which heads find the image that holds the answer: retrieval heads, for needles that are images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.errors import InputError, OptionError
from vlmattn.inspection.answers import answered, greedy_answer
from vlmattn.inspection.measuring import Keep, attention_of, by_layer, head_profile
from vlmattn.inspection.prompt_spans import Span, prepared_spans
from vlmattn.inspection.sorting import chat_inputs, user_turn
from vlmattn.interventions.profiles import HeadProfile
from vlmattn.models import find_family, marker_ids_of
from vlmattn.request import TEXT, LayerContext, Weights


@torch.no_grad()
def retrieve_images(
    model: PreTrainedModel,
    needles: Sequence[Span],
    *,
    answer_tokens: int = 8,
    seed: int = 0,
    prompts: Sequence[str] = (),
) -> HeadProfile:
    """Score every head by how often it finds the image that holds the answer, among others.

        hit    = 1 if argmax_{j in image tokens} a_j lies in the needle, else 0;
                 a the attention of a row that predicts a token of the answer
        chance = image tokens of the needle / image tokens of the prompt
        needle = (mean of hit - mean of chance) / (1 - mean of chance),   means over needles and answer tokens

    So 1 is a head that always looks at the needle, 0 one that does not know which image that is, whatever the number of
    images, if the needle stands at each place equally often (``needle_prompts``). The mean of hit is
    chance + needle (1 - chance). After arXiv 2404.15574, whose retrieval heads copy the token that they attend to; an
    image token cannot be copied, so what counts is where the head looks (the adaptation is ours).

    The answer is the greedy one of the unedited model, right or wrong, up to the end-of-sequence token. Edits of a
    wrapped model do not act meanwhile. The score says where a head looks, not that the answer needs it: for that,
    ``ablate_heads``.

    Args:
        needles: prompts of several images; the span is the image that the question is about.
        answer_tokens: longest answer that is looked at.
        seed: recorded in the profile; nothing here is random.
        prompts: recorded in the profile.

    Returns:
        A profile with the score "needle", -chance / (1 - chance) to 1; 0 in layers without attention. It has no means:
        merge it with another (``HeadProfile.merged``) for mean ablation.

    Raises:
        OptionError: fewer than one answer token.
        InputError: no needles, one that is not a single prompt, a span outside of its prompt, without image tokens or
            with all of them; answers that are all empty.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    if answer_tokens < 1:
        raise OptionError(f"answer_tokens must be at least 1, got {answer_tokens}")
    family = find_family(model)
    anatomy, batches = family.anatomy(model), prepared_spans(model, needles)
    shares = [
        _share(family.token_types(model, batch["input_ids"])[0], span)
        for batch, span in zip(batches, needles, strict=True)
    ]
    above, chance, steps = torch.zeros(anatomy.layers, anatomy.heads), 0.0, 0
    for span, batch, share in zip(needles, batches, shares, strict=True):
        answer = greedy_answer(model, batch, answer_tokens)
        rows, first = int((answer >= 0).sum()), batch["input_ids"].shape[1] - 1
        keep = _hits(span, first, rows, share)
        above += by_layer(attention_of(model, answered(model, batch, answer), keep), anatomy)
        chance += share * rows
        steps += rows
    if not steps:
        raise InputError("all answers are empty, so no row predicts a token; ask something that the model answers")
    return head_profile(anatomy, {"needle": above / (steps - chance)}, seed, prompts)


def needle_prompts(
    model: PreTrainedModel, processor: Any, needle: Any, distractors: Sequence[Any], question: str
) -> list[Span]:
    """Prompts that ask the question with the needle at each place among the other images in turn.

    Args:
        processor: the model's processor, with a chat template.
        needle: the image (PIL, array, path) that holds the answer.
        distractors: the others, in their order.
        question: comes after the images.

    Returns:
        One prompt more than there are distractors; the span holds the tokens of the needle, and any between them.

    Raises:
        InputError: no distractors, a processor without chat template, a template that does not place each image.
        UnsupportedError: a family that is not supported.
    """
    if not distractors:
        raise InputError("a needle needs other images beside it; give at least one distractor")
    family, found = find_family(model), []
    for place in range(len(distractors) + 1):
        pictures = [*distractors[:place], needle, *distractors[place:]]
        inputs = chat_inputs(model, processor, [user_turn(pictures, question)])
        types = family.token_types(model, inputs["input_ids"])
        numbers = family.image_numbers(model, inputs, types, marker_ids_of(family, processor))[0]
        images = int(numbers.max()) + 1
        if images != len(pictures):
            raise InputError(
                f"{len(pictures)} images were given and the prompt has {images}; does the chat template place each?"
            )
        slots = (numbers == place).nonzero().flatten().tolist()
        found.append(Span(inputs, slots[0], slots[-1] + 1))
    return found


def _share(types: Tensor, span: Span) -> float:
    """Share of the image tokens that lie in the span, which must be some and not all."""
    visual = types != TEXT
    share = float(visual[span.start : span.stop].sum() / visual.sum())
    if not 0 < share < 1:
        raise InputError(
            f"the span {span.start}..{span.stop} must hold some of the image tokens of its prompt and leave some out;"
            " it is the needle among several images"
        )
    return share


def _hits(span: Span, first: int, rows: int, chance: float) -> Keep:
    """How many hits above chance there are in ``rows`` rows from ``first`` on, ``[heads]``."""

    def above(context: LayerContext, weights: Weights) -> Tensor:
        attention = weights(first, first + rows)[0]
        mass, best = attention.masked_fill(~context.visual[0], 0).max(-1)  # [heads, rows]
        seen = mass > 0  # not so where a sliding window has left all images behind
        hits = seen & (best >= span.start) & (best < span.stop)
        return (hits.float() - chance).sum(1).cpu()

    return above
