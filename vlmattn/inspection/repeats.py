"""Heads that find what was there before: echo and induction scores on random tokens that repeat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlmattn.errors import OptionError
from vlmattn.inspection.measuring import attention_of, by_layer, head_profile
from vlmattn.interventions.profiles import HeadProfile
from vlmattn.models import find_family
from vlmattn.request import LayerContext, Weights

_ROWS = 64  # whose attention is looked at in one go


@torch.no_grad()
def score_repeats(
    model: PreTrainedModel, *, length: int = 2500, times: int = 4, first: Sequence[int] | None = None, seed: int = 0
) -> HeadProfile:
    """Score every head on ``length`` random tokens that are said ``times`` times, as RazorAttention does (2407.15891).

    With A the attention of a head, mean over the rows i of all repetitions but the first:

        echo       sum_{j < i, j the same token's place in an earlier repetition} A_ij
        induction  sum over the same j of A_i,j+1, the token that came next there

    Edits of a wrapped model do not act meanwhile.

    Args:
        length, times: tokens drawn evenly from all ids, and repetitions; the paper has 2500 and 4.
        first: tokens before them; None = the model's first token, if it has one.
        seed: of the draw.

    Returns:
        A profile with both scores. ``profile.merged(...)`` joins it with another of the same model.

    Raises:
        OptionError: fewer than two tokens or repetitions.
        UnsupportedError: a family or an attention implementation that is not supported.
    """
    if length < 2 or times < 2:
        raise OptionError(f"length and times must be at least 2, got {length} and {times}")
    anatomy, config = find_family(model).anatomy(model), model.config.get_text_config()
    lead = [token for token in [config.bos_token_id] if isinstance(token, int)] if first is None else list(first)
    special = {token for token in vars(model.config).values() if type(token) is int}
    words = torch.tensor([token for token in range(config.vocab_size) if token not in special])  # no images
    drawn = words[torch.randint(len(words), (length,), generator=torch.Generator().manual_seed(seed))]
    ids = torch.cat([torch.tensor(lead, dtype=torch.long), drawn.repeat(times)])[None].to(model.device)
    begin = len(lead)

    def keep(context: LayerContext, weights: Weights) -> Tensor:
        total = torch.zeros(())
        for start in range(begin + length, context.keys, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, context.keys), device=context.device)
            earlier = rows[:, None] - length * torch.arange(1, times, device=rows.device)  # [rows, repetitions]
            there = earlier >= begin
            seen = weights(start, start + len(rows))[0]  # [heads, rows, keys]
            found = [
                (seen.gather(2, (earlier.clamp_min(0) + ahead).expand(len(seen), -1, -1)) * there).sum((1, 2))
                for ahead in (0, 1)
            ]
            total = total.to(rows.device) + torch.stack(found, 1)
        return total / (length * (times - 1))

    found = by_layer(attention_of(model, {"input_ids": ids}, keep), anatomy).cpu()
    scores = {"echo": found[..., 0], "induction": found[..., 1]}
    return head_profile(anatomy, scores, seed, [f"{length} random tokens, {times} times"])
