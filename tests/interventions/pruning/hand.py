"""A decoder run by hand on the modules of a bare tiny model: no engine, no cache class, every key in sight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from tiny import build, generate, prompt
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

import vlmattn

See = Callable[[int, int, Tensor, Tensor], Tensor]
"""``see(layer, step, query, key)``: bool ``[kv_heads or 1, queries, keys]``, what each row of one sequence may see; step 0 is the prompt."""


def positions_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Position ids of a prompt of one sequence as the rotary module takes them."""
    length = inputs["input_ids"].shape[1]
    if model.config.model_type == "llava":
        return torch.arange(length)[None]
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return model.model.get_rope_index(**{name: inputs[name] for name in names})[0]


def embedded(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What enters the decoder for a prompt: ``[1, tokens, hidden]``."""
    caught = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        caught["embeds"] = kwargs["inputs_embeds"]

    hook = model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return caught["embeds"]


def causal(queries: int, keys: int) -> Tensor:
    return torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]


class Hand:
    """One sequence through the decoder of ``model``; keys and values by layer are lists in plain sight."""

    def __init__(self, model: Any, see: See) -> None:
        self.model, self.see, self.step = model, see, 0
        self.decoder = model.model.language_model
        self.keys: list[Tensor | None] = [None] * len(self.decoder.layers)
        self.values: list[Tensor | None] = [None] * len(self.decoder.layers)

    @torch.no_grad()
    def run(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Logits of the last row; ``hidden`` ``[1, rows, hidden]``."""
        cos, sin = self.decoder.rotary_emb(hidden, positions)
        for index, layer in enumerate(self.decoder.layers):
            normed, attn = layer.input_layernorm(hidden), layer.self_attn
            heads = [part(normed).view(1, normed.shape[1], -1, attn.head_dim).transpose(1, 2) for part in (attn.q_proj, attn.k_proj, attn.v_proj)]  # fmt: skip
            query, key = (part * cos[:, None] + rotate_half(part) * sin[:, None] for part in heads[:2])
            before = self.keys[index]
            self.keys[index] = key = key if before is None else torch.cat([before, key], 2)
            before = self.values[index]
            self.values[index] = value = heads[2] if before is None else torch.cat([before, heads[2]], 2)
            repeat = query.shape[1] // key.shape[1]
            seen = self.see(index, self.step, query[0], key[0])
            shown = seen.expand(key.shape[1], -1, -1).repeat_interleave(repeat, 0)
            wide = (query[0], key[0].repeat_interleave(repeat, 0), value[0].repeat_interleave(repeat, 0))
            out = self.attend(*wide, shown).transpose(0, 1).flatten(1)[None]
            hidden = hidden + attn.o_proj(out)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.step += 1
        return self.model.lm_head(self.decoder.norm(hidden[:, -1:]))[0, 0]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """Head outputs of one sequence, all ``[heads, ...]``."""
        scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value

    def generate(self, inputs: dict[str, Tensor], new: int) -> Tensor:
        """Greedy logits ``[new, vocabulary]`` of a prompt."""
        positions = positions_of(self.model, inputs)
        logits = [self.run(embedded(self.model, inputs), positions)]
        for _ in range(new - 1):
            positions = positions[..., -1:].amax(0, keepdim=True).expand(positions[..., -1:].shape) + 1
            token = logits[-1].argmax()[None, None]
            logits.append(self.run(self.model.get_input_embeddings()(token), positions))
        return torch.stack(logits)


def check_isolation(policy: Any, new: int) -> None:
    """Two threads do not meet, and an unwrapped model is as before."""
    inputs, bare = prompt("llava", 2), generate(build("llava"), prompt("llava", 2), new)
    model = vlmattn.wrap(build("llava"), policy)
    alone, found = generate(model, inputs, new), {}

    def ask(number: int) -> None:
        found[number] = generate(model, inputs, new)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(out, alone) for out in found.values())
    vlmattn.unwrap(model)
    assert torch.equal(generate(model, inputs, new), bare)
