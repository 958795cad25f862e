"""Runs search methods on a wrapped model: the method chooses the tokens, and here are the rows that grow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from vlmattn import compat
from vlmattn.compat import SearchOutput
from vlmattn.decoding.search import Hypothesis, LastLook, Process, Search
from vlmattn.errors import InputError, UnsupportedError
from vlmattn.models import OF_ALL, OF_TOKENS
from vlmattn.request import TEXT, Request
from vlmattn.wrapping.branches import NOT_PASSED_ON, run, to_device
from vlmattn.wrapping.call import CALL, Call, TowerView
from vlmattn.wrapping.on_cache import request_on, ride

# Which prompt of the batch the logits processors work on, in this thread.
_ROW: ContextVar[int | None] = ContextVar("vlmattn_row", default=None)

_CHOOSES = "chooses the tokens by itself"
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "prompt_lookup_num_tokens": None, "guidance_scale": 1,
    "length_penalty": 1, "early_stopping": False, "max_time": None, "stop_strings": None,
}  # fmt: skip


def refuse_ways(model: PreTrainedModel, rule: str, kwargs: Mapping[str, Any]) -> None:
    """Ways of generating that a search method cannot have.

    Raises:
        UnsupportedError: one of them.
    """
    for name, neutral in _NEUTRAL.items():
        if compat.setting_of(model, kwargs, name) not in (None, neutral):
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


def row_by_row(allowed: Callable[[int, Tensor], list[int]] | None) -> Callable[[int, Tensor], list[int]] | None:
    """A ``prefix_allowed_tokens_fn`` that is only asked about the row of the batch whose scores are processed."""
    if allowed is None:
        return None
    return lambda batch, ids: allowed(batch, ids) if batch == _ROW.get() else [0]  # of other rows nobody reads anything


def searching(search: Search, inputs: Mapping[str, Any]) -> Callable[..., Any]:
    """A decoding method for ``generate(custom_generate=...)``; ``inputs`` are those of the call."""

    def decode(
        model: PreTrainedModel, input_ids: Tensor, logits_processor: Any, generation_config: Any, **_: Any
    ) -> Tensor | SearchOutput:
        call = CALL.get()
        assert call is not None
        new = generation_config.max_length - input_ids.shape[1]
        ends = compat.end_tokens(generation_config)
        answers = [
            search.search(_Rows(call, one), ends, new, _process(logits_processor, input_ids, row))
            for row, one in enumerate(_apart(call, inputs, input_ids))
        ]
        value = compat.padding_token(generation_config)
        tokens = pad_sequence([answer.tokens for answer in answers], batch_first=True, padding_value=value)
        found = torch.cat([input_ids, tokens.to(input_ids)], 1)
        if not generation_config.return_dict_in_generate:
            return found
        return _Told(call, inputs, found, answers, value).output(generation_config)

    return decode


def _process(processors: Any, prompts: Tensor, row: int) -> Process:
    """Logits processors, which were made for the whole batch, for rows that one of its prompts has grown.

    Each of these rows takes the place of its prompt in the batch; the other prompts go on with the same tokens.
    """

    def process(generated: Tensor, scores: Tensor) -> Tensor:
        if not len(processors):
            return scores
        token = _ROW.set(row)
        try:
            found = [
                processors(torch.cat([prompts, ids.expand(len(prompts), -1)], 1), one.repeat(len(prompts), 1))[row]
                for ids, one in zip(generated.to(prompts), scores, strict=True)
            ]
        finally:
            _ROW.reset(token)
        return torch.stack(found)

    return process


@dataclass
class _Told:
    """What generate() returns beside the tokens of a search.

    Attributes:
        sequences: int64 ``[batch, tokens]``, prompts with their answers; answers: of each prompt; padding: id behind
            short ones.
    """

    call: Call
    inputs: Mapping[str, Any]
    sequences: Tensor
    answers: list[Hypothesis]
    padding: int

    @property
    def prompt(self) -> int:
        return self.sequences.shape[1] - self.new

    @property
    def new(self) -> int:
        return max(len(answer.tokens) for answer in self.answers)

    def output(self, config: Any) -> SearchOutput:
        device = self.sequences.device
        lengths = torch.tensor([[len(answer.tokens)] for answer in self.answers], device=device)
        rows = torch.arange(len(self.answers), dtype=torch.int32, device=device)[:, None]
        found = SearchOutput(
            sequences=self.sequences,
            beam_indices=rows.where(torch.arange(self.new, device=device) < lengths, -1),
        )
        vocabulary = self.call.model.get_output_embeddings().weight.shape[0]
        if config.output_scores:
            found.sequences_scores = torch.tensor([answer.score for answer in self.answers], device=device)
            found.scores = self._scores(vocabulary)
        wanted = config.output_logits or config.output_attentions or config.output_hidden_states
        if self.new and (wanted or config.use_cache is not False):
            self._read(found, config)
        return found

    def _scores(self, vocabulary: int) -> tuple[Tensor, ...]:
        """Log-probabilities ``[batch, vocabulary]`` that each token was chosen by; behind an answer only padding's."""
        rows = []
        for answer in self.answers:
            scores = answer.scores(vocabulary)
            behind = scores.new_full((self.new - len(scores), vocabulary), -torch.inf)
            behind[:, self.padding] = 0
            rows.append(torch.cat([scores, behind]))
        return torch.stack(rows, 1).to(self.sequences.device).unbind()

    def _read(self, found: SearchOutput, config: Any) -> None:
        """Let the model read the prompts and then their answers once more, for what it has to say of them."""
        cache, new = compat.new_cache(self.call.model), self.new - 1
        kept = {name: getattr(config, name) for name in ("output_attentions", "output_hidden_states")}
        call = replace(self.call, prompt_length=self.prompt, plain_mask=True, token=object(), tower=TowerView())
        outs = [run(call, cache, **step | kept) for step in self._steps(new)]
        if config.use_cache is not False:
            compat.set_output_cache(found, cache)
        if config.output_logits:
            found.logits = torch.cat([out.logits for out in outs], 1).float().unbind(1)
        if config.output_hidden_states:
            later = (tuple(states[:, n : n + 1] for states in outs[1].hidden_states) for n in range(new))
            found.hidden_states = (outs[0].hidden_states, *later)
        if config.output_attentions:
            found.attentions = (outs[0].attentions, *(self._attention_of(outs[1], n) for n in range(new)))

    def _attention_of(self, out: Any, n: int) -> tuple[Tensor | None, ...]:
        """What answer token ``n`` attended to, by layer."""
        stop = self.prompt + n + 1
        return tuple(None if one is None else one[:, :, n : n + 1, :stop] for one in out.attentions or ())

    def _steps(self, new: int) -> list[dict[str, Any]]:
        """Inputs of the prompts, and of the ``new`` tokens of the answers behind them, if there are some."""
        model, device = self.call.model, self.sequences.device
        prompts, answers = self.sequences[:, : self.prompt], self.sequences[:, self.prompt : -1]
        given = self.inputs.get("attention_mask")
        mask = torch.ones_like(prompts) if given is None else given.to(prompts)
        names = set(inspect.signature(type(model).forward).parameters) - NOT_PASSED_ON
        inputs = {name: to_device(value, device) for name, value in self.inputs.items() if name in names}
        inputs |= {"input_ids": prompts, "attention_mask": mask}
        positions = self.call.record.family.positions(model, inputs)
        steps = [{**inputs, "position_ids": positions, "logits_to_keep": 1}]
        if new:
            later = positions[..., -1:] + torch.arange(1, new + 1, device=device)
            longer = pad(mask, (0, new), value=1)
            steps.append({"input_ids": answers, "attention_mask": longer, "position_ids": later, "logits_to_keep": new})
        return steps


def _apart(call: Call, inputs: Mapping[str, Any], ids: Tensor) -> list[dict[str, Any]]:
    """The inputs of each row by itself, without padding."""
    family = call.record.family
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    if empty := (~real.bool().any(1)).nonzero().flatten().tolist():
        raise InputError(f"row {empty[0]} of the prompts is nothing but padding; leave it out of the batch")
    if bool((real.diff(dim=1) < 0).any()):
        raise InputError("the prompts must be padded on the left; set processor.tokenizer.padding_side = 'left'")
    given = {**inputs, "input_ids": ids}
    counts = family.per_row(call.model, given)
    apart = []
    for row in range(len(ids)):
        kept = real[row].bool()
        one: dict[str, Any] = {"input_ids": ids[row : row + 1, kept], "attention_mask": real[row : row + 1, kept]}
        one |= {name: inputs[name] for name in OF_ALL if name in inputs}
        for name in OF_TOKENS:
            if isinstance(inputs.get(name), Tensor):
                one[name] = inputs[name].to(ids.device)[row : row + 1, kept]
        for name, rows in counts.items():
            axis = family.pixel_axis if name.startswith("pixel_values") else 0
            part = inputs[name].to(ids.device).split(rows, axis)[row]
            if rows[row]:
                one[name] = part
        apart.append(family.by_itself(one))
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
        self.visual = (call.record.family.token_types(call.model, ids)[0] != TEXT).to(ids.device)
        self._call = replace(call, prompt_length=self.prompt_length, plain_mask=True, token=object(), tower=TowerView())
        self._positions = call.record.family.positions(call.model, inputs)
        self._generated = 0

    def start(self) -> tuple[Tensor, Tensor]:
        cache = compat.new_cache(self._call.model)
        logits = self._forward(cache, **self._inputs, position_ids=self._positions)
        if any(getattr(layer, "is_sliding", False) or not hasattr(layer, "keys") for layer in cache.layers):
            raise UnsupportedError("a search needs full attention in every layer, and this model's cache forgets")
        request = request_on(cache)
        assert request is not None
        self._now = _Now(cache, request)
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
        cache = compat.new_cache(self._call.model)
        for number, (keys, values) in enumerate(layers):
            cache.update(keys[rows], values[rows], number)
        self._set(cache, request.moved(rows))
        self._generated = 0
        return self._append(generated) if generated.shape[1] else logits[rows]

    def _set(self, cache: DynamicCache, request: Request) -> None:
        self._now = _Now(cache, request)
        ride(cache, request, self._call.plan)

    def _append(self, tokens: Tensor) -> Tensor:
        """Logits ``[rows, vocabulary]`` after tokens ``[rows, new]`` behind what there is."""
        count = tokens.shape[1]
        steps = torch.arange(1, count + 1, device=tokens.device) + self._generated
        positions = self._positions[..., -1:] + steps
        positions = positions.expand(*positions.shape[:-2], len(tokens), count)
        self._generated += count
        return self._forward(self._now.cache, input_ids=tokens, position_ids=positions)

    def _forward(self, cache: DynamicCache, **inputs: Any) -> Tensor:
        out = run(self._call, cache, **inputs, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1].float()
        return logits
