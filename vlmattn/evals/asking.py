"""Asks the batches of a suite, and writes each down as it is answered."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from vlmattn.errors import InputError, StateError
from vlmattn.evals.batching import Parts
from vlmattn.evals.journal import Batch, Journal, Key
from vlmattn.evals.processes import Processes
from vlmattn.evals.prompts import answer
from vlmattn.evals.sources import file_hash, image_hash, image_names, question_hash
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.timing import peak_bytes
from vlmattn.wrapping import handle_of

Work = Sequence[tuple[int, Sequence[Sample]]]  # batches with their numbers


class Unfit:
    """Why a batch of an earlier attempt cannot be used, "" if it can. Image files are read once."""

    def __init__(self, wanted: Mapping[Key, Sequence[Sample]]) -> None:
        self._wanted, self._hash = wanted, functools.cache(file_hash)

    def __call__(self, batch: Batch) -> str:
        samples = {sample.id: sample for sample in self._wanted.get(batch.key, ())}
        if samples.keys() != batch.answers.keys() | batch.unreadable.keys():
            return f"the questions of {batch.suite} are others now"
        for key, (question, images) in batch.sources.items():
            if question != question_hash(samples[key]):
                return f"the question '{key}' of {batch.suite} or its truth has changed"
            if images != image_hash(samples[key], self._hash):
                return f"the image of '{key}' of {batch.suite} has changed ({image_names(samples[key])})"
        return ""


def refuse_moving(done: Sequence[Batch]) -> None:
    """Raise if presets were asked about different versions of one image."""
    seen: dict[tuple[str, str], list[str]] = {}
    for batch in done:
        for key, source in batch.sources.items():
            if seen.setdefault((batch.suite, key), source) != source:
                raise StateError(
                    f"suite {batch.suite}: the image of '{key}' changed during the run, so the presets saw different"
                    " ones; run the same command again, it asks again about what has changed"
                )


class Progress:
    """How far a suite is with one preset, said by the first process: a bar on a terminal, else lines."""

    def __init__(self, label: str, mine: Work, before: int, processes: Processes, say: Callable[[str], None]) -> None:
        self._label = label if processes.count == 1 else f"{label} (process {processes.rank + 1} of {processes.count})"
        self._say, self._said = say, time.monotonic()
        terminal = sys.stderr.isatty()
        self._lines = processes.first and not terminal
        self._done = before // processes.count
        self._total = self._done + sum(len(samples) for _, samples in mine)
        off = not (processes.first and terminal)
        self._bar = tqdm(
            total=self._total, initial=self._done, desc=self._label, disable=off, leave=False, unit="answer"
        )

    def advance(self, count: int) -> None:
        self._done += count
        self._bar.update(count)
        if self._lines and (self._done == self._total or time.monotonic() - self._said > 20):
            self._say(f"{self._label}: {self._done}/{self._total}")
            self._said = time.monotonic()

    def say(self, line: str) -> None:
        """A line that must be read, whichever process says it."""
        self._bar.clear()
        self._say(f"{self._label}: {line}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def ask_all(
    model: Any,
    processor: Any,
    suite: Suite,
    preset: str,
    work: Work,
    journal: Journal,
    on_error: str,
    progress: Progress,
) -> None:
    """Answer batches and write each down as it is done."""
    handle, parts = handle_of(model), Parts(progress.say)

    def ask(part: Sequence[tuple[Sample, Any]]) -> list[str]:
        prompts, images = [sample.prompt for sample, _ in part], [pictures for _, pictures in part]
        return answer(model, processor, prompts, images, suite.max_new_tokens)

    for number, samples in work:
        readable, unreadable, sources = _read(suite, samples, on_error)
        if handle is not None:
            handle.set(handle.recipe)  # a report of its own for every batch: whatever is killed, the sums are right
        texts: list[str] = []
        begun = time.monotonic()
        peak = _peak(model, lambda readable=readable, texts=texts: texts.extend(parts(ask, readable)))  # type: ignore[misc]
        seconds = time.monotonic() - begun
        report = {} if handle is None else handle.report()
        journal.add(
            Batch(
                suite=suite.name,
                preset=preset,
                number=number,
                answers={sample.id: text for (sample, _), text in zip(readable, texts, strict=True)},
                unreadable=unreadable,
                sources=sources,
                seconds=round(seconds, 5),
                tokens=sum(len(processor.tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts),
                peak_bytes=peak,
                cut=parts.cut,
                report={key: report[key] for key in ("fired", "backends", "image_tokens") if key in report},
            )
        )
        progress.advance(len(samples))


def _read(
    suite: Suite, samples: Sequence[Sample], on_error: str
) -> tuple[list[tuple[Sample, Any]], dict[str, str], dict[str, list[str]]]:
    """Samples with their pictures, why others have none, and hashes of what the former are made from."""
    readable, unreadable, sources = [], {}, {}
    for sample in samples:
        # hashed before it is read: a file that changes in between is asked about again, not believed
        source = [question_hash(sample), image_hash(sample)]
        try:
            readable.append((sample, sample.images()))
            sources[sample.id] = source
        except InputError as error:
            if on_error == "stop":
                raise InputError(
                    f"suite {suite.name}, sample '{sample.id}': {error}; mend it and run the same command again, or"
                    " leave such questions out with --on-error skip"
                ) from error
            unreadable[sample.id] = str(error)
    return readable, unreadable, sources


def _peak(model: Any, run: Callable[[], object]) -> int | None:
    """Memory that ``run`` takes on top of what is in use, on an accelerator; None on a CPU."""
    if model.device.type == "cuda":
        return peak_bytes(run, model.device)
    run()
    return None
