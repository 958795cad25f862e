"""Watching one answer: ``look(model, processor, inputs)`` gives a ``Trace``."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vlmattn.anatomy import Anatomy
from vlmattn.errors import InputError, OptionError, UnsupportedError, VlmattnError
from vlmattn.inspection.answers import given_answers
from vlmattn.inspection.measuring import Inputs, prepared_one
from vlmattn.inspection.recorder import Recorder
from vlmattn.inspection.trace import GROUPS, Trace, new_trace, write_row
from vlmattn.models import Family, Turns, find_family, marker_ids_of
from vlmattn.request import TEXT, USER, Watcher
from vlmattn.wrapping import borrowed

_RIVALS = 5  # tokens named beside each answer token
_MEMORY = 2e9  # bytes of attention that are held before a folder is asked for


def look(
    model: PreTrainedModel,
    processor: Any,
    inputs: Inputs,
    recipe: Any = None,
    *,
    answer: Sequence[int] | None = None,
    max_new_tokens: int = 64,
    rows: Sequence[int] = (),
    folder: str | os.PathLike[str] | None = None,
) -> Trace:
    """Let a model answer one prompt and keep what it attends to, layer by layer and head by head.

    The model runs as ever, with a cache and its own attention (sdpa or eager); only the few rows that are kept are
    computed once more, one layer at a time. Attention is what the layers used: with a recipe, after its masks, changed
    scores and group gains; gains of whole heads are kept beside it.

    Args:
        inputs: what the processor made of one prompt with images, without padding.
        recipe: what acts meanwhile, as for ``wrap``; None = what is on the model, or nothing.
        answer: token ids to say instead of the greedy answer, to see how likely they are.
        max_new_tokens: longest answer.
        rows: further rows of the prompt to keep, by token (from the end below 0).
        folder: new folder to write the attention to while it is computed; None = keep it in memory.

    Raises:
        InputError: several prompts, padding, no image tokens, a row that is not in the prompt, an answer that is empty
            or not of text tokens, more attention than 2 GB without a folder (or than the disk holds), a folder that
            exists.
        OptionError: no new tokens.
        UnsupportedError: a family or an attention implementation that is not supported, a recipe that searches or keeps
            heads apart.
    """
    family, given, types = prompt_of(model, inputs)
    if answer is not None:
        given_answers(model, [given], [answer])
    elif max_new_tokens < 1:
        raise OptionError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    prompt, steps = types.shape[1], max_new_tokens if answer is None else len(answer)
    kept = _checked_rows(rows, prompt)
    _check_size(family.anatomy(model), len(kept) + steps, prompt + steps, folder)

    def run(place: Path | None) -> Trace:
        return _run(model, processor, (family, given, types), recipe, answer, steps, {*kept, prompt - 1}, place)

    if folder is None:
        return run(None)
    with new_trace(folder) as place:
        run(place).write_facts(place)
    return Trace.load(folder)


def _run(
    model: PreTrainedModel,
    processor: Any,
    prompt: tuple[Family, dict[str, Any], Tensor],
    recipe: Any,
    answer: Sequence[int] | None,
    steps: int,
    rows: set[int],
    place: Path | None,
) -> Trace:
    """The trace of an answer; its rows are written to ``place`` if there is one."""
    family, given, types = prompt
    anatomy = family.anatomy(model)
    store = _Store(anatomy, place)
    recorder = Recorder(rows, store.layers, store.keep)
    found, name = _answered(model, processor, given, recipe, recorder, answer, steps)
    facts = _facts(model, family, processor, given, types, found)
    facts |= _states(recorder, anatomy.layers, len(facts["tokens"]) - 1)
    if others := sorted(set(range(anatomy.layers)) - set(store.layers)):
        what = "have no attention over the tokens (a state of them, or cross-attention to images), so it is not shown"
        what += "; image_attention maps cross-attention to images" if anatomy.cross else ""
        facts["notes"] += (f"layers {', '.join(map(str, others))} {what}",)
    store.flush()
    return Trace(recipe=name, source=anatomy.source, layers=store.layers, rows=store.rows, gains=store.gains, **facts)


def prompt_of(model: PreTrainedModel, inputs: Inputs) -> tuple[Family, dict[str, Any], Tensor]:
    """The family, the prompt on the model's device with its mask, and types of its tokens ``[1, tokens]``.

    Raises:
        InputError: several prompts, padding, no image tokens.
        UnsupportedError: a family that is not supported, or whose image is not among the tokens.
    """
    family, given = find_family(model), prepared_one(model, inputs)
    if family.anatomy(model).leading:
        raise UnsupportedError(f"{type(model).__name__} puts its image before the tokens; it cannot be looked at")
    types = family.types_of_call(model, given)
    if not bool((types != TEXT).any()):
        raise InputError(
            "no image tokens in the prompt, so there is nothing to look at; put the image placeholder into it"
            " (processor.apply_chat_template does)"
        )
    if given.get("attention_mask") is None:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    return family, given, types


class _Store:
    """Where the rows go: into memory, or onto the disk as soon as they are whole."""

    def __init__(self, anatomy: Anatomy, folder: Path | None) -> None:
        self.layers = tuple(range(anatomy.layers)) if anatomy.attending is None else anatomy.attending
        self.rows: dict[int, Tensor] = {}
        self.gains: dict[int, Tensor] = {}
        self._folder, self._missing = folder, {}  # type: tuple[Path | None, dict[int, int]]

    def keep(self, row: int, layer: int, attention: Tensor, gain: Tensor) -> None:
        if row not in self.rows:
            self.rows[row] = attention.new_zeros(len(self.layers), *attention.shape)
            self.gains[row] = gain.new_ones(len(self.layers), len(gain))
            self._missing[row] = len(self.layers)
        place = self.layers.index(layer)
        self.rows[row][place], self.gains[row][place] = attention, gain
        self._missing[row] -= 1
        if self._folder is not None and not self._missing[row]:
            write_row(self._folder, row, self.rows.pop(row))

    def flush(self) -> None:
        """Write rows that did not reach every layer."""
        if self._folder is not None:
            for row in list(self.rows):
                write_row(self._folder, row, self.rows.pop(row))


class _Forced(LogitsProcessor):  # type: ignore[misc]
    """Says given tokens."""

    def __init__(self, answer: Sequence[int], prompt: int) -> None:
        self._answer, self._prompt = answer, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self._answer[input_ids.shape[1] - self._prompt]
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([wanted], device=scores.device), 0.0)


@contextmanager
def watched(model: PreTrainedModel, processor: Any, recipe: Any, watcher: Watcher) -> Iterator[str]:
    """A recipe in force and a watcher at work, in this thread only and within the block; gives the recipe's name."""
    with borrowed(model, processor) as record, ExitStack() as stack:
        if recipe is not None or not record.now.enabled:
            stack.enter_context(record.temporarily("none" if recipe is None else recipe))
        stack.enter_context(record.watched(watcher))
        yield record.now.recipe.name


def _answered(
    model: PreTrainedModel,
    processor: Any,
    given: Mapping[str, Any],
    recipe: Any,
    recorder: Recorder,
    answer: Sequence[int] | None,
    steps: int,
) -> tuple[dict[str, Any], str]:
    """The answer's tokens, their log-probabilities and rivals, and notes; and the recipe's name."""
    prompt = given["input_ids"].shape[1]
    options: dict[str, Any] = dict(
        max_new_tokens=steps, min_new_tokens=0, do_sample=False, num_beams=1, num_return_sequences=1,
        return_dict_in_generate=True, output_logits=True, cache_implementation=None, use_cache=True,
    )  # fmt: skip
    if answer is not None:
        options["logits_processor"] = LogitsProcessorList([_Forced(answer, prompt)])
        # Janus drops the processor of the caller; alone this cannot say what a decoding rule ruled out
        options["prefix_allowed_tokens_fn"] = lambda _, ids: [answer[len(ids) - prompt]]
    with warnings.catch_warnings(record=True) as caught, watched(model, processor, recipe, recorder) as name:
        warnings.simplefilter("always")
        with torch.inference_mode():
            out = model.generate(**given, **options)
    said = out.sequences[0, prompt:]
    if answer is not None and said.tolist() != list(answer):
        raise InputError(
            f"the model said {len(said)} tokens of the answer of {len(answer)}: it ends at an end token, and the"
            " tokens must be ones that it can say"
        )
    logprobs = torch.stack(out.logits, 1)[0].float().log_softmax(-1)
    best = logprobs.topk(_RIVALS)
    notes = dict.fromkeys(str(w.message) for w in caught if str(w.message).startswith("vlmattn"))
    return {
        "answer": tuple(said.tolist()),
        "logprobs": logprobs.gather(1, said[:, None])[:, 0].cpu(),
        "rivals": [
            list(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
        "notes": tuple(notes),
    }, name


def _facts(
    model: PreTrainedModel,
    family: Family,
    processor: Any,
    given: Mapping[str, Any],
    types: Tensor,
    found: dict[str, Any],
) -> dict[str, Any]:
    """What is known of the tokens."""
    prompt, answer = types.shape[1], found["answer"]
    marker_ids = marker_ids_of(family, processor)
    numbers = family.image_numbers(model, given, types, marker_ids)[0].cpu()
    counts = [int((numbers == image).sum()) for image in range(int(numbers.max()) + 1)]
    tokenizer = getattr(processor, "tokenizer", processor)
    decode = partial(_word, tokenizer)
    ids = [*given["input_ids"][0].tolist(), *answer]
    return found | {
        "tokens": tuple(map(decode, ids)),
        "groups": (
            *_groups(processor, given["input_ids"].cpu(), types.cpu()),
            *(GROUPS.index("answer"),) * len(answer),
        ),
        "images": (*numbers.tolist(), *(-1,) * len(answer)),
        "pieces": tuple(
            family.image_layout(model, given, image, count, marker_ids) for image, count in enumerate(counts)
        ),
        "prompt": prompt,
        "said": str(tokenizer.decode(answer, skip_special_tokens=True)).strip(),
        "rivals": tuple(tuple((decode(token), value) for token, value in pairs) for pairs in found["rivals"]),
    }


def _word(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _groups(processor: Any, ids: Tensor, types: Tensor) -> list[int]:
    """Groups of the prompt's tokens; without a chat template the text from the first image on is the question."""
    visual = types[0] != TEXT
    try:
        asked = Turns.of(processor).roles(ids, types, torch.ones_like(ids, dtype=torch.bool))[0][0] == USER
    except VlmattnError:
        asked = visual.cumsum(0) > 0
    system, image, question = (GROUPS.index(name) for name in ("system", "image", "question"))
    return torch.where(visual, image, torch.where(asked, question, system)).tolist()  # type: ignore[no-any-return]


def _states(recorder: Recorder, layers: int, tokens: int) -> dict[str, Any]:
    """What entered the layers, by token."""
    phi, norms, likeness = torch.full((3, layers, tokens), float("nan"))
    dims = torch.full((layers, tokens), -1)
    for layer, slots in recorder.slots.items():
        at = torch.cat(slots)
        phi[layer, at], norms[layer, at] = torch.cat(recorder.phi[layer]), torch.cat(recorder.norms[layer])
        likeness[layer, at], dims[layer, at] = torch.cat(recorder.likeness[layer]), torch.cat(recorder.dims[layer])
    return {"phi": phi, "dims": dims, "norms": norms, "likeness": likeness}


def _checked_rows(rows: Sequence[int], prompt: int) -> set[int]:
    for row in rows:
        if not -prompt <= row < prompt:
            raise InputError(f"row {row} is out of range: the prompt has {prompt} tokens (0 to {prompt - 1})")
    return {row % prompt for row in rows}


def _check_size(anatomy: Anatomy, rows: int, keys: int, folder: str | os.PathLike[str] | None) -> None:
    """Raise if that much attention would not fit."""
    layers = anatomy.layers if anatomy.attending is None else len(anatomy.attending)
    size = 4.0 * rows * layers * anatomy.heads * keys
    what = f"{size / 1e9:.1f} GB ({rows} rows x {layers} layers x {anatomy.heads} heads x {keys} keys)"
    if folder is None and size > _MEMORY:
        raise InputError(
            f"too much to keep in memory: {what}; give a folder to write it to, or fewer rows and max_new_tokens"
        )
    if folder is not None:
        parent = next(path for path in Path(folder).absolute().parents if path.exists())
        free = shutil.disk_usage(parent).free
        if size > free:
            raise InputError(f"too much to write: {what}, and {parent} has {free / 1e9:.1f} GB free")
