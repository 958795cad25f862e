"""An oracle for decoding rules: each row alone and unpadded, the whole text read anew for every token, rules written out here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny import IMAGE_TOKEN, prompt
from torch import Tensor

Inputs = dict[str, Tensor]
SideStream = Callable[[list[int]], Tensor]  # tokens so far -> logits [vocabulary] of the next one


def three(family: str) -> list[Inputs]:
    """Prompts of different lengths, one with two images."""
    return [prompt(family, words=4), prompt(family, words=7, seed=3), prompt(family, images=2, words=2, seed=4)]


def reread(model: Any, inputs: Inputs) -> SideStream:
    """The model as it is, without a cache; image tokens lie in the prompt only."""

    def logits(answer: list[int]) -> Tensor:
        full = dict(inputs)
        more = torch.tensor([answer], dtype=torch.int64)
        full["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        full["attention_mask"] = torch.ones_like(full["input_ids"])
        if "mm_token_type_ids" in inputs:
            full["mm_token_type_ids"] = (full["input_ids"] == IMAGE_TOKEN).int()
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None
        return model(**full, use_cache=False).logits[0, -1].float()

    return logits


def noised(inputs: Inputs, step: int = 500, seed: int = 0) -> Inputs:
    beta = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    left = torch.cumprod(1 - beta, 0)[step]
    pixels = inputs["pixel_values"]
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return {**inputs, "pixel_values": left.sqrt() * pixels + (1 - left).sqrt() * noise}


def blank(inputs: Inputs) -> Inputs:
    return {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}


def dropped(inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    kept = ids[:, ~torch.isin(ids[0], torch.tensor([IMAGE_TOKEN, 96, 97]))]
    return {"input_ids": kept}


def with_ids(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    return {**inputs, "input_ids": change(inputs["input_ids"][0])[None]}


def cut(scores: Tensor, main: Tensor, beta: float) -> Tensor:
    return scores if not beta else scores.masked_fill(main < math.log(beta) + main.max(), -math.inf)


def decode(
    streams: Sequence[SideStream], rule: Callable[[list[Tensor], int], Tensor], new: int
) -> tuple[list[int], Tensor]:
    """Greedy tokens, and the scores ``[new, vocabulary]`` they come from; ``rule`` gets all logits and t = 1, 2, ..."""
    answer: list[int] = []
    scores = []
    for t in range(1, new + 1):
        scores.append(rule([stream(answer) for stream in streams], t))
        answer.append(int(scores[-1].index_fill(0, torch.tensor([2]), -math.inf).argmax()))  # the end is held back
    return answer, torch.stack(scores)


def attention(model: Any, inputs: Inputs) -> Tensor:
    """Attention of the last prompt row, mean over heads ``[layer, key]``, from eager attention."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    found = model(
        **{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, output_attentions=True
    ).attentions
    model.set_attn_implementation(before)
    return torch.stack([layer[0, :, -1].mean(0) for layer in found])
