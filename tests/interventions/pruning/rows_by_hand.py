"""A prompt of one sequence through the layers of a bare model by hand: no cache, no masks of the library, everything anew in each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import IMAGE_TOKEN
from torch import Tensor, nn

Drop = Callable[["Rows", int], Tensor | None]
"""``drop(rows, layer)``: indices of the rows that go on to a layer, or None."""


class Rows:
    """Rows of a sequence on their way through the decoder.

    Attributes:
        hidden: ``[rows, hidden]``; slots: which tokens they are; positions: as the rotary module takes them.
        seen: attention ``[heads, rows, rows]`` of the layer before, on the rows that it had.
    """

    def __init__(self, model: Any, hidden: Tensor, positions: Tensor, visual: Tensor, prompt: int) -> None:
        self.decoder, self.prompt = model.model.language_model, prompt
        self.hidden, self.positions, self.visual = hidden, positions, visual
        self.slots = torch.arange(len(hidden))
        self.seen: Tensor | None = None

    @property
    def last(self) -> int:
        """The row of the last prompt token."""
        return int((self.slots == self.prompt - 1).nonzero())

    @property
    def image_rows(self) -> Tensor:
        return self.visual[self.slots].nonzero().flatten()

    def only(self, stay: Tensor, compact: bool) -> None:
        self.hidden, self.slots = self.hidden[stay], self.slots[stay]
        self.positions = self.positions[..., stay]
        if compact:
            self.positions = torch.arange(len(stay)).expand(self.positions.shape)

    def attention(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Weights ``[heads, rows, rows]`` and output ``[rows, hidden]`` of a layer's attention."""
        attn: Any = layer.self_attn
        cos, sin = self.decoder.rotary_emb(self.hidden[None], self.positions)
        normed = layer.input_layernorm(self.hidden)
        query, key, value = (part(normed).view(len(normed), -1, attn.head_dim).transpose(0, 1) for part in (attn.q_proj, attn.k_proj, attn.v_proj))  # fmt: skip
        query, key = (part * cos[0] + turned(part) * sin[0] for part in (query, key))
        times = len(query) // len(key)
        key, value = key.repeat_interleave(times, 0), value.repeat_interleave(times, 0)
        scores = query @ key.transpose(1, 2) / attn.head_dim**0.5
        later = torch.ones(scores.shape[1:]).triu(1).bool()
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return weights, attn.o_proj((weights @ value).transpose(0, 1).flatten(1))

    def through(self, layer: nn.Module) -> None:
        self.seen, out = self.attention(layer)
        self.hidden = self.hidden + out
        self.hidden = self.hidden + layer.mlp(layer.post_attention_layernorm(self.hidden))


def turned(part: Tensor) -> Tensor:
    first, second = part.chunk(2, -1)
    return torch.cat([-second, first], -1)


def decoder_inputs(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings ``[tokens, hidden]``, image features in place, and position ids of a sequence, as the bare model makes them."""
    caught: dict[str, Any] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: caught.update(kwargs), with_kwargs=True
    )
    model(**inputs, use_cache=False)
    hook.remove()
    length = inputs["input_ids"].shape[1]
    positions = caught.get("position_ids")
    if positions is None:
        positions = torch.arange(length)[None]
    return caught["inputs_embeds"][0], positions[1:] if len(positions) == 4 else positions


def longer(inputs: dict[str, Tensor], tokens: list[int]) -> dict[str, Tensor]:
    """The same prompt with more tokens behind it."""
    more = torch.tensor([tokens], dtype=torch.long).expand(len(inputs["input_ids"]), -1)
    found = dict(inputs, input_ids=torch.cat([inputs["input_ids"], more], 1))
    found["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    if "mm_token_type_ids" in inputs:
        found["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more).int()], 1)
    return found


def logits_by_hand(model: Any, inputs: dict[str, Tensor], tokens: list[int], drop: Drop, compact: bool) -> Tensor:
    """Logits ``[vocabulary]`` after a prompt of one sequence and some generated tokens."""
    embeds, positions = decoder_inputs(model, longer(inputs, tokens))
    visual = torch.cat([inputs["input_ids"][0] == IMAGE_TOKEN, torch.zeros(len(tokens), dtype=torch.bool)])
    rows = Rows(model, embeds, positions, visual, inputs["input_ids"].shape[1])
    for index, layer in enumerate(rows.decoder.layers):
        if (stay := drop(rows, index)) is not None:
            rows.only(stay, compact)
        rows.through(layer)
    found: Tensor = model.lm_head(rows.decoder.norm(rows.hidden[-1]))
    return found


def generated_by_hand(
    model: Any, inputs: dict[str, Tensor], new: int, drop: Drop, compact: bool, never: list[int]
) -> tuple[Tensor, list[int]]:
    """Greedy logits ``[new, vocabulary]`` and tokens."""
    logits: list[Tensor] = []
    tokens: list[int] = []
    for _ in range(new):
        logits.append(logits_by_hand(model, inputs, tokens, drop, compact))
        allowed = logits[-1].clone()
        allowed[[*never, 2]] = float("-inf")  # 2 ends a sequence
        tokens.append(int(allowed.argmax()))
    return torch.stack(logits), tokens


def best_rows(rows: Rows, scores: Tensor, count: int) -> Tensor:
    """All rows of text, and the ``count`` rows of image tokens with the highest scores, in order."""
    images = rows.image_rows
    stay = images[scores[images].argsort(descending=True)[:count]]
    others = (~rows.visual[rows.slots]).nonzero().flatten()
    return torch.cat([others, stay]).sort().values


def fastv(layer: int, ratio: float) -> Drop:
    """By the finished layer before: what the last prompt token attended to, mean over heads."""

    def drop(rows: Rows, index: int) -> Tensor | None:
        if index != layer:
            return None
        assert rows.seen is not None
        return best_rows(rows, rows.seen[:, rows.last].mean(0), round(ratio * len(rows.image_rows)))

    return drop


def pyramiddrop(layers: list[int], ratios: list[float]) -> Drop:
    """By the attention that the next layer would pay, on the rows and positions that are there."""

    def drop(rows: Rows, index: int) -> Tensor | None:
        if index not in layers:
            return None
        weights, _ = rows.attention(rows.decoder.layers[index])
        count = int(ratios[layers.index(index)] * int(rows.visual.sum()))
        return best_rows(rows, weights[:, rows.last].mean(0), count)

    return drop
