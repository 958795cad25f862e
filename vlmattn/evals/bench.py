"""What presets cost on one model and machine: first token, decode step, answer and memory, beside the bare model.

Also random models, so that it works without any weights: what an edit costs does not depend on what a model has
learned.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor
from transformers import AutoModelForImageTextToText

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError, UnknownNameError
from vlmattn.evals.prompts import encode as encode_prompts
from vlmattn.evals.runner import recipes_of, refuse_missing
from vlmattn.evals.timing import Row, paired, peak_bytes, rows, synchronise
from vlmattn.models import find_family
from vlmattn.recipe import Recipe
from vlmattn.request import IMAGE
from vlmattn.wrapping import handle_of

FIRST, STEP, PEAK = "first token", "decode step", "memory beyond weights"  # what is measured, besides whole answers
_BASE = "none"


class Clock:
    """A streamer for ``generate`` that notes when each token comes. It starts when it is made."""

    def __init__(self) -> None:
        synchronise()
        self.begun = time.perf_counter()
        self._times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt, then the tokens of one step ``[batch]``."""
        synchronise()
        self._times.append(time.perf_counter())

    def end(self) -> None:
        """Streamers have it."""

    @property
    def tokens(self) -> int:
        """How often tokens came."""
        return len(self._times) - 1

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self._times[1] - self.begun

    @property
    def step(self) -> float:
        """Seconds of the median step after it."""
        return statistics.median(after - before for before, after in pairwise(self._times[1:]))

    @property
    def total(self) -> float:
        """Seconds to the last token."""
        return self._times[-1] - self.begun


Run = Callable[[int], Clock]  # generates so many tokens


def bench(
    model: Any,
    inputs: Mapping[str, Any],
    presets: Sequence[str | Recipe],
    rounds: int = 9,
    new_tokens: int = 64,
    processor: Any = None,
    beside: Mapping[str, Run] | None = None,
) -> list[Row]:
    """Generate with every preset in every round, and compare with the bare model (``none``) of the same round.

    Decoding is greedy and every answer has ``new_tokens`` tokens. Before the rounds every candidate generates two
    tokens twice: to warm up, and to measure memory.

    Args:
        model: a bare model.
        inputs: for ``model.generate``: one prompt or a batch, with at least one image.
        presets: names, recipe files or recipes; see ``Recipe.of``. ``none`` is always part of it.
        processor: for methods that must know where the user's turn ends.
        beside: other candidates on the bare model, by name.

    Returns:
        Rows of ``timing.rows`` about "first token", "decode step", "``new_tokens`` tokens" (with tokens per second)
        and, where it can be measured, "memory beyond weights" (the peak over prompt and first step), each with what was
        run. Methods that choose whole answers (OPERA) have no first token and no step.

    Raises:
        StateError: the model is wrapped.
        InputError: a prompt without image.
        OptionError: fewer than one round or two tokens; a recipe given twice, or one that does not fit the model.
        UnknownNameError: no such preset.
    """
    check(presets, rounds, new_tokens)
    if handle_of(model) is not None:
        raise StateError("the model is wrapped; give bench the bare model: vlmattn.unwrap(model)")
    facts = _facts(model, inputs, new_tokens)
    runs = {recipe.name: _generation(model, inputs, recipe, processor) for recipe in recipes_of(presets).values()}
    runs |= beside or {}
    clocks: dict[str, list[Clock]] = {name: [] for name in runs}
    with torch.inference_mode():
        for run in runs.values():  # what does not fit the model is an error now, not rounds later
            run(2)
        peaks = {name: peak_bytes(lambda run=run: run(2), model.device) for name, run in runs.items()}  # type: ignore[misc]
        note = {name: lambda name=name, run=run: clocks[name].append(run(new_tokens)) for name, run in runs.items()}  # type: ignore[misc]
        paired(note, rounds, warm_up=0)
    table = _times(clocks, new_tokens, len(inputs["input_ids"]))
    known = {name: [float(peak)] for name, peak in peaks.items() if peak is not None}
    if known.get(_BASE):
        table += rows(PEAK, known, _BASE, "mb")
    return [row | facts for row in table]


def check(presets: Sequence[str | Recipe], rounds: int, new_tokens: int) -> None:
    """Raise for what can be told before there is a model; see ``bench``."""
    if rounds < 1:
        raise OptionError(f"rounds must be at least 1, got {rounds}")
    if new_tokens < 2:
        raise OptionError(f"there must be at least 2 new tokens (one decode step), got {new_tokens}")
    recipes_of(presets)


def _facts(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> Row:
    """What is run; refuses prompts without image."""
    ids = inputs["input_ids"]
    images = (find_family(model).token_types(model, ids) == IMAGE).sum(1)
    if not images.all():
        raise InputError("a prompt has no image token, and then presets have little to do; give every prompt an image")
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch_size": len(ids),
        "prompt_tokens": ids.shape[1],
        "image_tokens": int(images[0]),
        "new_tokens": new_tokens,
    }


def _generation(model: Any, inputs: Mapping[str, Any], recipe: Recipe, processor: Any) -> Run:
    """Generates with a recipe; wrapping is done once in practice, and not timed."""

    def run(new_tokens: int) -> Clock:
        lengths = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        with nullcontext() if recipe.is_none else vlmattn.applied(model, recipe, processor=processor):
            refuse_missing(model, recipe.name)
            clock = Clock()
            model.generate(**inputs, **lengths, do_sample=False, pad_token_id=0, streamer=clock)
        return clock

    return run


def _times(clocks: Mapping[str, Sequence[Clock]], new_tokens: int, batch: int) -> list[Row]:
    """Rows about the first token, a step and the whole answer."""
    stepwise = {name: of for name, of in clocks.items() if all(clock.tokens == new_tokens for clock in of)}
    table = rows(FIRST, {name: [clock.first for clock in of] for name, of in stepwise.items()}, _BASE)
    table += rows(STEP, {name: [clock.step for clock in of] for name, of in stepwise.items()}, _BASE)
    whole = {name: [clock.total for clock in of] for name, of in clocks.items()}
    for row in rows(f"{new_tokens} tokens", whole, _BASE):
        seconds = statistics.median(whole[str(row["candidate"])])
        table.append(row | {"tokens_per_s": round(batch * new_tokens / seconds, 2)})
    return table


def encode(processor: Any, model: Any, picture: Any, prompt: str, batch_size: int = 1) -> dict[str, Tensor]:
    """The same prompt about one picture, ``batch_size`` times."""
    return dict(encode_prompts(model, processor, [prompt] * batch_size, [[picture]] * batch_size))


def _config(told: Mapping[str, Any]) -> Any:
    """A configuration as ``random_models.yaml`` tells it, made anew."""
    own = copy.deepcopy(dict(told))
    return getattr(transformers, own.pop("config"))(**own)


_TOLD = yaml.safe_load(Path(__file__).with_name("random_models.yaml").read_text(encoding="utf-8"))
RANDOM_MODELS: dict[str, Callable[[], Any]] = {name: partial(_config, told) for name, told in _TOLD.items()}
_QWEN_GRID = 72  # patches of a picture of 1008 x 1008, which become 36 x 36 image tokens


def random_model(name: str = "random-llava", dtype: str = "auto", device: str | None = None) -> Any:
    """A model with random weights in eval mode, made where it will be.

    Args:
        name: one of ``RANDOM_MODELS``.
        dtype: "auto" is bfloat16 on a GPU and float32 elsewhere.
        device: None takes a GPU if there is one.

    Raises:
        UnknownNameError: no such random model.
    """
    if name not in RANDOM_MODELS:
        raise UnknownNameError("random model", name, RANDOM_MODELS)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    torch.manual_seed(0)
    with place:
        model = AutoModelForImageTextToText.from_config(RANDOM_MODELS[name](), dtype=getattr(torch, dtype))
    return model.to(place).eval()


def random_inputs(
    model: Any, batch_size: int = 1, images: int = 1, before: int = 2, after: int = 40
) -> dict[str, Tensor]:
    """The same prompt ``batch_size`` times: ``before`` words, images, ``after`` words."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    start, end = list(range(1, 1 + before)), list(range(10, 10 + after))
    if config.model_type == "llava":
        tokens, size = [config.image_token_id] * config.image_seq_length, config.vision_config.image_size
        shape: tuple[int, ...] = (images * batch_size, 3, size, size)
    else:
        tower = config.vision_config
        tokens = [config.image_token_id] * (_QWEN_GRID // tower.spatial_merge_size) ** 2
        tokens = [config.vision_start_token_id, *tokens, config.vision_end_token_id]
        patch = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        shape = (images * batch_size * _QWEN_GRID**2, patch)
    ids = torch.tensor([[*start, *tokens * images, *end]] * batch_size)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(shape, generator=generator).to(model.dtype),
    }
    if config.model_type != "llava":
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        inputs["image_grid_thw"] = torch.tensor([[1, _QWEN_GRID, _QWEN_GRID]] * images * batch_size)
    return {name: value.to(model.device) for name, value in inputs.items()}
