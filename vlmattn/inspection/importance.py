"""How much every head helps the answer: what it costs to take the head away."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.errors import InputError, OptionError
from vlmattn.inspection.ablation import Ablation, Ablations, check
from vlmattn.inspection.answers import answered, given_answers, greedy_answer
from vlmattn.inspection.measuring import Inputs, head_profile, prepared
from vlmattn.inspection.outputs import head_outputs
from vlmattn.interventions.profiles import HeadProfile
from vlmattn.models import find_family


@torch.no_grad()
def ablate_heads(
    model: PreTrainedModel,
    inputs: Sequence[Inputs],
    *,
    answers: Sequence[Sequence[int]] | None = None,
    answer_tokens: int = 8,
    ablation: Ablation = "mean",
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    prompts: Sequence[str] = (),
) -> HeadProfile:
    """Score every head by what its removal takes from the answer. For each (layer, head):

        importance = mean over prompts and answer tokens t of log p(t) - log p'(t)

    with p the model's probabilities, and p' those of the model in which that head's output is replaced, in every row,
    by its mean at the last rows of the prompts, or by zero; both read the same answer (nats; above 0 the head helps,
    below it is in the way). Ablation of single heads as in arXiv 1905.10650, there on a task's score; log-probabilities
    are ours. Costs one row of a forward for each head and prompt. Edits of a wrapped model do not act meanwhile.

    Args:
        inputs: processor outputs, one prompt or one padded batch each.
        answers: token ids of an answer to each prompt, prompt after prompt; None = the greedy answers of the unedited
            model, up to the end-of-sequence token.
        answer_tokens: longest greedy answer.
        ablation: what stands for the head's output.
        batch_size: copies of each input in a forward; each has another head ablated.
        seed: recorded in the profile; nothing here is random.
        progress: show a bar.
        prompts: recorded in the profile.

    Returns:
        A profile with the score "importance", and the means.

    Raises:
        OptionError: another ablation, batch_size or answer_tokens below 1.
        InputError: no inputs, inputs without token ids or without an image; not one answer for each prompt, an empty
            one, ids that are not text of the vocabulary; greedy answers that are all empty.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    check(ablation, batch_size)
    if answer_tokens < 1:
        raise OptionError(f"answer_tokens must be at least 1, got {answer_tokens}")
    anatomy, batches = find_family(model).anatomy(model), prepared(model, inputs)
    if answers is None:
        said = [greedy_answer(model, batch, answer_tokens) for batch in batches]
    else:
        said = given_answers(model, batches, answers)
    steps = sum(int((answer >= 0).sum()) for answer in said)
    if not steps:
        raise InputError("all answers are empty, so there is nothing to predict; ask something that the model answers")
    _, means = head_outputs(model, anatomy, batches)
    each = Ablations(model, anatomy, means, ablation, batch_size)
    total = torch.zeros(anatomy.layers, anatomy.heads)
    with each.bar(len(batches), progress) as bar:
        for batch, answer in zip(batches, said, strict=True):
            total += each.run(answered(model, batch, answer), answer.shape[1] + 1, partial(_likelihood, answer), bar)
    return head_profile(anatomy, {"importance": total / steps}, seed, prompts, means)


def _likelihood(answer: Tensor, logits: Tensor) -> Tensor:
    """Log-probability of all answer tokens ``[batch, steps]`` together, ``[copies]``.

    Args:
        logits: ``[copies, batch, steps + 1, words]``, of the rows that predict them and the last one.
    """
    logits = logits[:, :, :-1]
    wanted = answer.clamp_min(0).expand(logits.shape[:-1])[..., None]
    found = logits.log_softmax(-1).gather(-1, wanted.to(logits.device))[..., 0]
    return found.masked_fill(answer < 0, 0).sum((1, 2))
