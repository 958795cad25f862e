"""Many turns about the same images in one row: they share the prefix, and do not see each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NO_TURN = -1


@dataclass(frozen=True)
class Turn:
    """One question and its answer: token ids, and the weight in the loss of each answer token."""

    ask: Sequence[int]
    reply: Sequence[int]
    weight: Sequence[float]


@dataclass
class Row:
    """One image prefix and all its turns; ``turn`` 0 is the prefix, and every turn starts at the same position."""

    ids: list[int]
    position: list[int]
    turn: list[int]
    target: list[int]
    weight: list[float]

    @classmethod
    def of(cls, prefix: Sequence[int], dialogue: Iterable[Turn]) -> Row:
        start = len(prefix)
        out = cls(list(prefix), list(range(start)), [0] * start, [0] * start, [0.0] * start)
        for number, turn in enumerate(dialogue, start=1):
            tokens = [*turn.ask, *turn.reply]
            out.ids += tokens
            out.position += range(start, start + len(tokens))
            out.turn += [number] * len(tokens)
            out.target += [*tokens[1:], 0]
            out.weight += [0.0] * (len(turn.ask) - 1) + list(turn.weight) + [0.0]
        return out


def pack(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows as a batch: ids, position, target, weight ``[rows, tokens]``, float mask ``[rows, 1, tokens, tokens]``."""
    length = max(len(row.ids) for row in rows)

    def padded(name: str, fill: float, dtype: torch.dtype) -> Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.tensor([value + [fill] * (length - len(value)) for value in values], dtype=dtype)

    turn = padded("turn", _NO_TURN, torch.long)
    same = (turn[:, :, None] == turn[:, None, :]) | (turn[:, None, :] == 0)
    visible = same & torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "ids": padded("ids", 0, torch.long),
        "position": padded("position", 0, torch.long),
        "mask": torch.zeros(len(rows), 1, length, length).masked_fill(~visible[:, None], -1e9),
        "target": padded("target", 0, torch.long),
        "weight": padded("weight", 0.0, torch.float),
    }


def answers(llava: Any, batch: dict[str, Tensor], patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[n, vocabulary]`` where a packed batch has weight, with their targets and weights.

    Args:
        llava: a LLaVA of transformers, whose parts are called one by one.
        patches: projected patches of all images, in order.
    """
    inner, used = llava.model, batch["weight"] > 0
    embeddings = inner.language_model.embed_tokens(batch["ids"])
    embeddings = embeddings.masked_scatter(
        (batch["ids"] == llava.config.image_token_id)[..., None], patches.reshape(-1, patches.shape[-1])
    )
    hidden = inner.language_model(
        inputs_embeds=embeddings, attention_mask=batch["mask"], position_ids=batch["position"], use_cache=False
    ).last_hidden_state
    return llava.lm_head(hidden[used]), batch["target"][used], batch["weight"][used]
