"""Runs search methods on a wrapped model: the method chooses the tokens, and here are the rows that grow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from vlmattn import compat
from vlmattn.decoding.search import LastLook, Search
from vlmattn.errors import InputError, UnsupportedError
from vlmattn.models import OF_TOKENS
from vlmattn.request import TEXT, Request
from vlmattn.wrapping.branches import new_cache, setting_of
from vlmattn.wrapping.call import CALL, Call, TowerView
from vlmattn.wrapping.merged import REQUEST

_CHOOSES = "chooses the tokens by itself"
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None, "guidance_scale": 1, "length_penalty": 1,
    "early_stopping": False, "max_time": None, "stop_strings": None,
}  # fmt: skip


def refuse_ways(model: PreTrainedModel, rule: str, kwargs: Mapping[str, Any]) -> None:
    """Ways of generating that a search method cannot have.

    Raises:
        UnsupportedError: one of them.
    """
    for name, neutral in _NEUTRAL.items():
        if setting_of(model, kwargs, name) not in (None, neutral):
            raise UnsupportedError(f"'{rule}' {_CHOOSES}; leave {name} at {neutral}")
    for name in ("do_sample", "stopping_criteria", "assistant_model", "custom_generate"):
        if kwargs.get(name):
            raise UnsupportedError(f"'{rule}' {_CHOOSES} and cannot have {name}; leave it out")
    if compat.cache_of(kwargs) is not None or any(
        kwargs.get(name) is not None for name in ("inputs_embeds", "position_ids")
    ):
        raise UnsupportedError(
            f"'{rule}' needs input_ids of the whole prompt, without past_key_values or inputs_embeds or position_ids"
        )


def searching(search: Search, inputs: Mapping[str, Any]) -> Callable[..., Any]:
    """A decoding method for ``generate(custom_generate=...)``; ``inputs`` are those of the call."""

    def decode(
        model: PreTrainedModel, input_ids: Tensor, logits_processor: Any, generation_config: Any, **_: Any
    ) -> Tensor | GenerateDecoderOnlyOutput:
        call = CALL.get()
        assert call is not None
        new = generation_config.max_length - input_ids.shape[1]
        eos = generation_config._eos_token_tensor
        ends = frozenset(() if eos is None else eos.flatten().tolist())
        answers = []
        for row, one in enumerate(_apart(call, inputs, input_ids)):
            ids = input_ids[row : row + 1]

            def process(generated: Tensor, scores: Tensor, ids: Tensor = ids) -> Tensor:
                processed: Tensor = logits_processor(torch.cat([ids.expand(len(generated), -1), generated], 1), scores)
                return processed

            answers.append(search.search(_Rows(call, one), ends, new, process))
        padding = generation_config._pad_token_tensor
        value = 0 if padding is None else int(padding)
        tokens = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=value)
        found = torch.cat([input_ids, tokens.to(input_ids)], 1)
        return GenerateDecoderOnlyOutput(sequences=found) if generation_config.return_dict_in_generate else found

    return decode


def _apart(call: Call, inputs: Mapping[str, Any], ids: Tensor) -> list[dict[str, Any]]:
    """The inputs of each row by itself, without padding."""
    family = call.handle._family
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    if bool((real.diff(dim=1) < 0).any()):
        raise InputError("the prompts must be padded on the left; set processor.tokenizer.padding_side = 'left'")
    given = {**inputs, "input_ids": ids}
    counts = family.per_row(call.model, given)
    apart = []
    for row in range(len(ids)):
        kept = real[row].bool()
        one: dict[str, Any] = {"input_ids": ids[row : row + 1, kept], "attention_mask": real[row : row + 1, kept]}
        for name in OF_TOKENS:
            if isinstance(inputs.get(name), Tensor):
                one[name] = inputs[name].to(ids.device)[row : row + 1, kept]
        for name, rows in counts.items():
            part = inputs[name].to(ids.device).split(rows)[row]
            if len(part):
                one[name] = part
        apart.append(one)
    return apart


@dataclass
class _Now:
    """Keys, values and request of the rows as they are."""

    cache: DynamicCache
    request: Request


class _Rows:
    """One prompt that grows along several rows (``decoding.search.Rows``)."""

    def __init__(self, call: Call, inputs: dict[str, Any]) -> None:
        ids = inputs["input_ids"]
        self._inputs, self.prompt_length = inputs, ids.shape[1]
        self.visual = (call.handle._family.token_types(call.model, ids)[0] != TEXT).to(ids.device)
        self._call = replace(call, prompt_length=self.prompt_length, plain_mask=True, token=object(), sight=TowerView())
        self._positions = call.handle._family.positions(call.model, inputs)
        self._generated = 0

    def start(self) -> tuple[Tensor, Tensor]:
        cache = new_cache(self._call.model)
        logits = self._forward(cache, **self._inputs, position_ids=self._positions)
        if any(getattr(layer, "is_sliding", False) or not hasattr(layer, "keys") for layer in cache.layers):
            raise UnsupportedError("a search needs full attention in every layer, and this model's cache forgets")
        self._now = _Now(cache, getattr(cache, REQUEST))
        self._prompt = [(layer.keys, layer.values) for layer in cache.layers], self._now.request, logits
        return logits, LastLook.read(self._now.request)

    def grow(self, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.keep(parents)
        self._call.ledger.add(("fired", self._call.plan.rule))
        return self._append(tokens[:, None]), LastLook.read(self._now.request)

    def keep(self, rows: Tensor) -> None:
        self._now.cache.batch_select_indices(rows)
        self._set(self._now.cache, self._now.request.moved(rows))

    def rewind(self, generated: Tensor) -> Tensor:
        layers, request, logits = self._prompt
        rows = generated.new_zeros(len(generated))
        cache = new_cache(self._call.model)
        for number, (keys, values) in enumerate(layers):
            cache.update(keys[rows], values[rows], number)
        self._set(cache, request.moved(rows))
        self._generated = 0
        return self._append(generated) if generated.shape[1] else logits[rows]

    def _set(self, cache: DynamicCache, request: Request) -> None:
        self._now = _Now(cache, request)
        setattr(cache, REQUEST, request)

    def _append(self, tokens: Tensor) -> Tensor:
        """Logits ``[rows, vocabulary]`` after tokens ``[rows, new]`` behind what there is."""
        count = tokens.shape[1]
        steps = torch.arange(1, count + 1, device=tokens.device) + self._generated
        positions = self._positions[..., -1:] + steps
        positions = positions.expand(*positions.shape[:-2], len(tokens), count)
        self._generated += count
        return self._forward(self._now.cache, input_ids=tokens, position_ids=positions)

    def _forward(self, cache: DynamicCache, **inputs: Any) -> Tensor:
        token = CALL.set(self._call)
        try:
            out = self._call.model(
                **inputs, **{compat.cache_name(): cache}, use_cache=True, return_dict=True, logits_to_keep=1
            )
        finally:
            CALL.reset(token)
        logits: Tensor = out.logits[:, -1].float()
        return logits
