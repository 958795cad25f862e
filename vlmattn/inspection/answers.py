"""Answers of the bare model, and forwards that read a prompt together with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.errors import InputError
from vlmattn.inspection.measuring import bare
from vlmattn.models import find_family
from vlmattn.request import TEXT


def stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id
    return frozenset(found if isinstance(found, list) else () if found is None else (found,))


def greedy_answer(model: PreTrainedModel, batch: dict[str, Any], tokens: int) -> Tensor:
    """The greedy answer of the bare model ``[batch, steps]``, at most ``tokens`` long, -1 from its end on."""
    with bare(model):
        out = model.generate(**batch, max_new_tokens=tokens, do_sample=False, num_beams=1)
    answer: Tensor = out[:, batch["input_ids"].shape[1] :]
    last = torch.isin(answer, torch.tensor([-1, *stop_tokens(model)], device=answer.device))
    last = last | (find_family(model).token_types(model, answer) != TEXT)  # a placeholder would ask for an image
    return answer.masked_fill(last.cumsum(1) > 0, -1)


def given_answers(
    model: PreTrainedModel, batches: Sequence[dict[str, Any]], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Token ids of an answer to each prompt, as ``greedy_answer`` has them for each batch.

    Raises:
        InputError: not one answer for each prompt, an empty one, ids that are not text of the vocabulary.
    """
    sizes = [len(batch["input_ids"]) for batch in batches]
    words = model.config.get_text_config().vocab_size
    if len(answers) != sum(sizes):
        raise InputError(f"{len(answers)} answers were given for {sum(sizes)} prompts; give token ids for each prompt")
    rows = [torch.tensor(list(answer), dtype=torch.long, device=model.device) for answer in answers]
    for row in rows:
        if (
            not len(row)
            or bool(((row < 0) | (row >= words)).any())
            or bool(find_family(model).token_types(model, row[None]).any())
        ):
            raise InputError(f"an answer must be one or more ids of text tokens below {words}, got {row.tolist()}")
    parts = torch.split(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1), sizes)
    return [part[:, : int((part >= 0).sum(1).max())] for part in parts]


def answered(model: PreTrainedModel, batch: dict[str, Any], answer: Tensor) -> dict[str, Any]:
    """The prompt and its answer ``[batch, steps]`` (-1 from its end on) as inputs of one forward."""
    ids, given = batch["input_ids"], {name: value for name, value in batch.items() if name != "input_ids"}
    # The model knows what generate() gives with new tokens: PaliGemma's are of another type than its prompt.
    grown = model._update_model_kwargs_for_generation({}, given, num_new_tokens=answer.shape[1])
    fill = ids[:, -1:].expand_as(answer)  # what stands after the end of an answer is not looked at
    return {**grown, "input_ids": torch.cat([ids, torch.where(answer >= 0, answer, fill)], 1)}
