"""Which questions are asked together: those of like length, and fewer of them when memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from vlmattn.errors import InputError, StateError
from vlmattn.evals.prompts import encode, refuse_marks
from vlmattn.evals.suites.base import Sample

_T = TypeVar("_T")


def lengths(model: Any, processor: Any, samples: Sequence[Sample]) -> list[int]:
    """About how many tokens each prompt has: of its text, and per image as in the first sample that can be read.

    Raises:
        InputError: a prompt holds a mark for pictures.
    """
    refuse_marks(processor, (sample.prompt for sample in samples))  # before any is asked
    texts = [len(ids) for ids in processor.tokenizer([sample.prompt for sample in samples])["input_ids"]]
    for sample in samples:
        try:
            pictures = sample.images()
        except InputError:  # the run will name it
            continue
        whole = int(encode(model, processor, [sample.prompt], [pictures])["input_ids"].shape[1])
        text = len(processor.tokenizer(sample.prompt)["input_ids"])
        each = (whole - text) / max(len(pictures), 1)
        return [length + round(each * sample.image_count) for length, sample in zip(texts, samples, strict=True)]
    return texts


def batches(samples: Sequence[Sample], lengths: Sequence[int], size: int, tokens: int | None) -> list[list[Sample]]:
    """Samples of like length together, the longest first: what does not fit into memory shows early.

    The batches follow from the arguments alone, so that every process and every attempt makes the same ones.

    Args:
        lengths: tokens of the prompts, in the order of the samples.
        size: at most so many samples in a batch.
        tokens: at most so many tokens in a batch, padding counted; at least one sample.
    """
    order = sorted(range(len(samples)), key=lambda index: -lengths[index])
    found: list[list[Sample]] = []
    longest = 0
    for index in order:
        full = not found or len(found[-1]) == size or (tokens is not None and longest * (len(found[-1]) + 1) > tokens)
        if full:
            found.append([])
            longest = lengths[index]
        found[-1].append(samples[index])
    return found


class Parts:
    """Runs a batch whole, or in halves of halves when memory is short; what was too much once is not tried again.

    Attributes:
        most: how many items are tried at once from now on.
        cut: whether the last call went in parts.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.most: int | None = None
        self.cut = False

    def __call__(self, run: Callable[[Sequence[_T]], list[str]], items: Sequence[_T]) -> list[str]:
        """
        Raises:
            StateError: one item alone is too much.
        """
        found: list[str] = []
        start = 0
        while start < len(items):
            part = items[start : start + (self.most or len(items))]
            try:
                found += run(part)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise StateError(
                        "memory is short for a single question; use a smaller --dtype, --load-in, a preset with fewer"
                        " image tokens, or smaller images"
                    ) from error
                self.most = (len(part) + 1) // 2
            else:
                start += len(part)
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # outside of the except block, which keeps the tensors of the failed run
            self._say(f"memory is short for {len(part)} questions at once; going on with {self.most}")
        self.cut = self.most is not None and self.most < len(items)
        return found


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator, or the allocator of the CPU, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
