"""What every attention head does: whether it depends on the image, looks at it, copies from the prompt, decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.errors import InputError, OptionError
from vlmattn.inspection.ablation import Ablation, Ablations, check
from vlmattn.inspection.answers import answered, greedy_answer
from vlmattn.inspection.measuring import (
    Inputs,
    Keep,
    Measure,
    attention_of,
    by_layer,
    head_profile,
    prepared,
    prepared_one,
)
from vlmattn.inspection.outputs import head_outputs
from vlmattn.interventions.profiles import HeadProfile
from vlmattn.models import find_family
from vlmattn.request import LayerContext, Weights


@dataclass(frozen=True, eq=False)
class Conflict:
    """A prompt whose image says one thing and whose text says another.

    Attributes:
        inputs: what the processor returns for this one prompt.
        a: first token id of the answer that follows the image.
        b: first token id of the answer that follows the text.
    """

    inputs: Inputs
    a: int
    b: int


@torch.no_grad()
def score_heads(
    model: PreTrainedModel,
    inputs: Sequence[Inputs],
    *,
    answer_tokens: int = 8,
    seed: int = 0,
    prompts: Sequence[str] = (),
) -> HeadProfile:
    """Score every head on prompts with images. With A and a a head's output and attention at the last prompt row:

        vhd        mean over prompts of ||A - B||, B the output without the image tokens       (arXiv 2412.13949)
        visual     mean over prompts of sum_{j in image} a_j
        retrieval  share of the tokens of the greedy answers that stand at argmax_{j in prompt text} a_j of the row
                   that predicts them, over all prompts                          (copying, after arXiv 2404.15574)

    A and B are those of the unedited model (VHR itself reinforces the layers below); edits of a wrapped model do not
    act meanwhile. An answer ends before the end-of-sequence token.

    Args:
        inputs: processor outputs, one prompt or one padded batch each.
        answer_tokens: longest answer that is looked at.
        seed: recorded in the profile; nothing here is random.
        prompts: recorded in the profile.

    Returns:
        A profile with the three scores, and the means of A.

    Raises:
        OptionError: fewer than one answer token.
        InputError: no inputs, inputs without token ids or without an image.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    if answer_tokens < 1:
        raise OptionError(f"answer_tokens must be at least 1, got {answer_tokens}")
    anatomy, batches, gaze = find_family(model).anatomy(model), prepared(model, inputs), Measure(keep=_gaze)
    vhd, means = head_outputs(model, anatomy, batches, gaze)
    copied, steps = torch.zeros(anatomy.layers, anatomy.heads), 0
    for batch in batches:
        answer = greedy_answer(model, batch, answer_tokens)
        keep = _copies(answer, batch["input_ids"].shape[1])
        copied += by_layer(attention_of(model, answered(model, batch, answer), keep), anatomy)
        steps += int((answer >= 0).sum())
    mass = by_layer({layer: torch.stack(found).sum(0) for layer, found in gaze.kept.items()}, anatomy)
    visual = mass / sum(len(batch["input_ids"]) for batch in batches)
    scores = {"vhd": vhd, "visual": visual, "retrieval": copied / max(steps, 1)}
    return head_profile(anatomy, scores, seed, prompts, means)


@torch.no_grad()
def find_heads(
    model: PreTrainedModel,
    samples: Sequence[Conflict],
    *,
    ablation: Ablation = "mean",
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    prompts: Sequence[str] = (),
) -> HeadProfile:
    """Find the heads that decide whether the model believes the image or the text. For each (layer, head):

        causal = mean over samples of |D - D'|,   D = logit of a - logit of b at the last prompt row

    with D' from the model in which that head's output is replaced, in every row of the prompt, by its mean at the last
    rows of the samples, or by zero (ranking ours, after the question of arXiv 2602.03677). Costs one row of a forward
    for each head and sample. Edits of a wrapped model do not act meanwhile.

    Args:
        samples: prompts whose image and text disagree; 5% of the heads is a usual share to take from the result.
        ablation: what stands for the head's output.
        batch_size: copies of the prompt in a forward; each has another head ablated.
        seed: recorded in the profile; nothing here is random.
        progress: show a bar.
        prompts: recorded in the profile.

    Returns:
        A profile with the score "causal", and the means.

    Raises:
        OptionError: another ablation, batch_size below 1.
        InputError: no samples, one that is not a single prompt with an image, token ids that are equal or not in the
            vocabulary.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    check(ablation, batch_size)
    if not samples:
        raise InputError("there is nothing to measure; give at least one Conflict")
    anatomy = find_family(model).anatomy(model)
    words = model.config.get_text_config().vocab_size
    for sample in samples:
        if sample.a == sample.b or not (0 <= sample.a < words and 0 <= sample.b < words):
            raise InputError(f"a and b must be two token ids below {words}, got {sample.a} and {sample.b}")
    batches = [prepared_one(model, sample.inputs) for sample in samples]
    _, means = head_outputs(model, anatomy, batches)
    each = Ablations(model, anatomy, means, ablation, batch_size)
    total = torch.zeros(anatomy.layers, anatomy.heads)
    with each.bar(len(samples), progress) as bar:
        for sample, batch in zip(samples, batches, strict=True):

            def margin(logits: Tensor, a: int = sample.a, b: int = sample.b) -> Tensor:
                return logits[:, 0, -1, a] - logits[:, 0, -1, b]

            total += each.run(batch, 1, margin, bar).abs()
    return head_profile(anatomy, {"causal": total / len(samples)}, seed, prompts, means)


def _gaze(context: LayerContext, weights: Weights) -> Tensor:
    """Attention of the last row on the image ``[heads]``, summed over prompts."""
    attention = weights(context.queries - 1, context.queries)[:, :, 0]
    return (attention * context.visual[:, None]).sum((0, 2)).cpu()


def _copies(answer: Tensor, prompt: int) -> Keep:
    """How often a head's most attended text key of the prompt holds the token that comes next, ``[heads]``.

    Args:
        answer: ``[batch, steps]``, -1 after its end.
        prompt: slots of the prompt, padding included.
    """

    def hits(context: LayerContext, weights: Weights) -> Tensor:
        attention = weights(prompt - 1, prompt - 1 + answer.shape[1])[..., :prompt]
        text = ~context.visual if context.real is None else ~context.visual & context.real
        best = attention.masked_fill(~text[:, None, None, :prompt], -1).argmax(-1)  # [batch, heads, steps]
        held = context.ids[torch.arange(len(best), device=best.device)[:, None, None], best]
        return (held == answer.to(held.device)[:, None]).sum((0, 2)).cpu()

    return hits
