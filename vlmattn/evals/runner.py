"""Runs suites with and without presets on one model: same samples, same batches, same decoding for every preset."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError
from vlmattn.evals.batching import Parts, batches, lengths
from vlmattn.evals.environment import (
    config_hash,
    decoding,
    decoding_in_words,
    files_of,
    fingerprint,
    hardware,
    libraries,
    processor_hash,
    quantisation,
    versions,
)
from vlmattn.evals.journal import Batch, Journal, Key, write_json
from vlmattn.evals.processes import Processes
from vlmattn.evals.prompts import answer
from vlmattn.evals.scoring import SEED, Scored
from vlmattn.evals.sources import file_hash, image_hash, image_names, question_hash, questions_hash
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFiles
from vlmattn.evals.timing import peak_bytes
from vlmattn.files import write_whole
from vlmattn.recipe import Recipe
from vlmattn.texts import read_json
from vlmattn.wrapping import handle_of, record_of

ON_ERROR = ("stop", "skip")
_Work = Sequence[tuple[int, Sequence[Sample]]]  # batches with their numbers


@dataclass
class Result:
    """What ``evaluate`` returns: the summary (as written to summary.json) and what the report needs besides.

    Attributes:
        scored: by suite; what was answered by every preset, and how well. Empty in all processes but the first.
        first: whether this is the process that writes and prints.
    """

    summary: dict[str, Any]
    suites: Sequence[Suite]
    answers: dict[tuple[str, str, str], str] = field(repr=False)
    scored: dict[str, Scored] = field(repr=False)
    first: bool = True


def evaluate(
    model: Any,
    processor: Any,
    suites: Sequence[Suite],
    presets: Sequence[str | Recipe],
    out: Path,
    model_name: str,
    batch_size: int = 50,
    restart: bool = False,
    say: Callable[[str], None] = print,
    command: str = "",
    batch_tokens: int | None = None,
    on_error: str = "stop",
) -> Result:
    """Ask every sample with every preset, score, compare with ``none``, and write ``out``.

    ``none`` is always part of it. Nothing is sampled; what else the model's generation config says (beams, penalties) holds for
    all presets and is written down. Answers are written batch by batch (journal*.jsonl); after a kill the same call goes on
    where it stopped, in the same batches: it refuses other weights, settings or files of presets, and asks again about questions
    and image files that have changed. Started by ``torchrun`` or ``accelerate launch``, the processes share the batches; which
    batches there are does not depend on how many processes there are, so neither do the answers.

    Args:
        model, processor: a bare model and its processor (left padding).
        presets: names, recipe files or recipes; see ``Recipe.of``.
        out: results folder; one that all processes see.
        say: where plain progress lines go when there is no terminal.
        command: what was typed, for the record.
        batch_size: at most so many questions at once. Where memory is short they are asked in parts, and the summary says so.
        batch_tokens: at most so many prompt tokens at once, padding counted; None for no bound.
        on_error: "stop" at an image that is missing or damaged, or "skip" its questions, for all presets, and name them.

    Raises:
        StateError: ``out`` holds a run with other settings, or another run works in it; the model is wrapped; memory is short
            for one question; an image file has changed during the run.
        UnknownNameError: no such preset.
        OptionError: a recipe that does not fit the model, or is given twice; an option out of range.
        InputError: an image is missing or damaged, an id is there twice, no sample can be read, ``out`` cannot be written.
    """
    if (handle := handle_of(model)) is not None:  # its edit would answer for none
        raise StateError(
            f"the model is wrapped with '{handle.recipe.name}'; give evaluate the bare model: vlmattn.unwrap(model)"
        )
    recipes = recipes_of(presets)
    _check(suites, batch_size, batch_tokens, on_error)
    files: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again when it answers
        for recipe in recipes.values():  # what does not fit the model is an error now, not hours later
            with _applied(model, recipe, processor):
                refuse_missing(model, recipe.name)
                if (record := record_of(model)) is not None:
                    files |= files_of(recipe, record.anatomy)
    settings = {
        "model": model_name,
        "weights": fingerprint(model),
        "config": config_hash(model),
        "attention": model.config._attn_implementation,
        "processor": processor_hash(processor),
        "recipes": {name: recipe.to_dict() for name, recipe in recipes.items()},
        "files": files,
        "suites": {suite.name: dict(suite.settings) for suite in suites},
        "decoding": decoding(model, suites),
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantisation": quantisation(model),
        "seed": SEED,
        "versions": versions(),
        "libraries": libraries(),
    }
    processor.tokenizer.padding_side = "left"
    processes = Processes()
    work = {
        suite.name: batches(suite.samples(), lengths(model, processor, suite.samples()), batch_size, batch_tokens)
        for suite in suites
    }
    wanted = {
        (name, preset, number): samples
        for name, parts in work.items()
        for preset in recipes
        for number, samples in enumerate(parts)
    }
    with Journal(out, settings, processes, restart, _Unfit(wanted)) as journal:
        if processes.first:
            say(f"decoding: {decoding_in_words(settings['decoding'])}")
            if journal.done:
                say(f"resuming: {sum(len(b.answers) for b in journal.done.values())} answers are already in {out}")
            for note in journal.notes:
                say(f"asked again: {note}")
        for name, recipe in recipes.items():
            with warnings.catch_warnings(), _applied(model, recipe, processor):
                warnings.filterwarnings("ignore", message="vlmattn: .* never fired")  # the report says so
                for suite in suites:
                    left = [
                        (number, samples)
                        for number, samples in enumerate(work[suite.name])
                        if not journal.has((suite.name, name, number), (sample.id for sample in samples))
                    ]
                    mine = processes.share(left)
                    before = len(suite.samples()) - sum(len(samples) for _, samples in left)
                    with _Progress(f"{name} · {suite.name}", mine, before, processes, say) as progress:
                        _ask(model, processor, suite, name, mine, journal, on_error, progress)
        done = journal.finish(lambda b: (list(recipes).index(b.preset), list(work).index(b.suite), b.number))
        _refuse_moving(done)
    answers = {(b.suite, b.preset, key): text for b in done for key, text in b.answers.items()}
    scored: dict[str, Scored] = {}
    summary: dict[str, Any] = {}
    if processes.first:  # a judge is asked once, not by every process
        scored = {suite.name: Scored(suite, list(recipes), answers) for suite in suites}
        of_run = {
            "command": command,
            "hardware": hardware(),
            "processes": processes.count,
            "questions": {suite.name: questions_hash(suite) for suite in suites},
        }
        summary = {**settings, **of_run, **_figures(suites, scored, done, list(recipes))}
        lines = (json.dumps(line, ensure_ascii=False) for found in scored.values() for line in found.lines())
        write_whole(out / "answers.jsonl", "".join(line + "\n" for line in lines))
        write_json(out / "summary.json", summary)
    return Result(processes.told(summary), suites, answers, scored, processes.first)


def _figures(
    suites: Sequence[Suite], scored: Mapping[str, Scored], done: Sequence[Batch], presets: Sequence[str]
) -> dict[str, Any]:
    """What follows from the answers: tables, costs, and what was left out.

    Raises:
        InputError: a suite of which no sample could be read.
    """
    unreadable = {(batch.suite, key): why for batch in done for key, why in batch.unreadable.items()}
    for suite in suites:
        if not scored[suite.name].samples:
            raise InputError(f"suite {suite.name}: no sample could be read; {next(iter(unreadable.values()))}")
    tables = [found.tables() for found in scored.values()]
    return {
        **_costs(done, presets),
        "skipped": [{"suite": suite, "id": key, "why": why} for (suite, key), why in unreadable.items()],
        "titles": {suite.name: suite.title for suite in suites},
        "metrics": {suite.name: [metric.to_dict() for metric in suite.metrics] for suite in suites},
        "mean_of_splits": {suite.name: suite.mean_of_splits for suite in suites},
        "tables": [table for by_split, _ in tables for table in by_split],
        "overall": [table for _, overall in tables for table in overall],
    }


def read_summary(out: Path) -> dict[str, Any]:
    """summary.json of a results folder, {} if there is none yet.

    Raises:
        InputError: it is damaged.
    """
    path = out / "summary.json"
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict) or (found and not isinstance(found.get("recipes"), dict)):
        raise InputError(f"{path}: not the summary of a run; run vlmattn eval again, it keeps the answers")
    return found


class _Unfit:
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


def _refuse_moving(done: Sequence[Batch]) -> None:
    """Raise if presets were asked about different versions of one image."""
    seen: dict[tuple[str, str], list[str]] = {}
    for batch in done:
        for key, source in batch.sources.items():
            if seen.setdefault((batch.suite, key), source) != source:
                raise StateError(
                    f"suite {batch.suite}: the image of '{key}' changed during the run, so the presets saw different ones; run the"
                    " same command again, it asks again about what has changed"
                )


def _check(suites: Sequence[Suite], batch_size: int, batch_tokens: int | None, on_error: str) -> None:
    """Refuse what would otherwise be noticed hours later."""
    if batch_size < 1:
        raise OptionError(f"the batch size must be at least 1, got {batch_size}")
    if batch_tokens is not None and batch_tokens < 1:
        raise OptionError(f"the tokens of a batch must be at least 1, got {batch_tokens}")
    if on_error not in ON_ERROR:
        raise OptionError(f"on_error must be one of {', '.join(ON_ERROR)}, got '{on_error}'")
    if twice := [name for name, count in Counter(suite.name for suite in suites).items() if count > 1]:
        raise OptionError(f"suite '{twice[0]}' is given twice")
    for suite in suites:
        ids = Counter(sample.id for sample in suite.samples())
        if twice := [key for key, count in ids.items() if count > 1]:
            raise InputError(f"suite {suite.name}: id '{twice[0]}' is there twice ({len(twice)} such ids)")
        if on_error == "stop":
            paths = {path for s in suite.samples() if isinstance(s.images, ImageFiles) for path in s.images.paths}
            if missing := sorted(path for path in paths if not os.path.isfile(path)):  # False for any odd name
                raise InputError(
                    f"suite {suite.name}: image not found: {missing[0]} ({len(missing)} of {len(paths)} images); give the"
                    " folder that holds them with --images, or leave their questions out with --on-error skip"
                )


def _applied(model: Any, recipe: Recipe, processor: Any) -> AbstractContextManager[Any]:
    return vlmattn.applied(model, recipe, processor=processor) if not recipe.is_none else nullcontext()


def refuse_missing(model: Any, preset: str) -> None:
    """Raise if a recipe needs inputs of its own with every call."""
    record = record_of(model)
    rule = record.now.acting.decoding if record is not None else None
    for branch in rule.branches if rule is not None else ():
        if branch.needs:
            raise OptionError(
                f"preset '{preset}' needs {', '.join(branch.needs)} for its branch '{branch.name}' with every call, which an"
                " eval cannot give; leave it out"
            )


def recipes_of(presets: Sequence[str | Recipe]) -> dict[str, Recipe]:
    """Recipes by name, ``none`` first and always there."""
    recipes = {"none": Recipe("none")}
    for preset in presets:
        recipe = Recipe.of(preset)
        if not recipe.is_none:
            if recipe.name in recipes:
                raise OptionError(f"preset '{recipe.name}' is given twice")
            recipes[recipe.name] = recipe
    return recipes


class _Progress:
    """How far a suite is with one preset: a bar on a terminal, a line now and then elsewhere, from the first process only."""

    def __init__(self, label: str, mine: _Work, before: int, processes: Processes, say: Callable[[str], None]) -> None:
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

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def _ask(
    model: Any,
    processor: Any,
    suite: Suite,
    preset: str,
    work: _Work,
    journal: Journal,
    on_error: str,
    progress: _Progress,
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
                    f"suite {suite.name}, sample '{sample.id}': {error}; mend it and run the same command again, or leave"
                    " such questions out with --on-error skip"
                ) from error
            unreadable[sample.id] = str(error)
    return readable, unreadable, sources


def _peak(model: Any, run: Callable[[], object]) -> int | None:
    """Memory that ``run`` takes on top of what is in use, on an accelerator; a CPU's figure would cost more than it is worth."""
    if model.device.type == "cuda":
        return peak_bytes(run, model.device)
    run()
    return None


def _costs(done: Sequence[Batch], presets: Sequence[str]) -> dict[str, Any]:
    """What methods did and what they took, from the journal: of all attempts and processes."""
    reports: dict[str, Any] = {}
    cost: dict[str, dict[str, Any]] = {}
    for preset in presets:
        own = [batch for batch in done if batch.preset == preset]
        seconds, tokens = sum(b.seconds for b in own), sum(b.tokens for b in own)
        peaks = [b.peak_bytes for b in own if b.peak_bytes is not None]
        cost[preset] = {
            "seconds_per_sample": round(seconds / max(sum(len(b.answers) for b in own), 1), 5),
            "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
            "peak_bytes": max(peaks, default=None),
            "cut_batches": sum(b.cut for b in own),
        }
        if preset != "none":
            reports[preset] = _report(own)
    return {"reports": reports, "cost": cost}


def _report(batches: Sequence[Batch]) -> dict[str, Any]:
    """The reports of batches as one: counts are sums, image tokens means over the samples."""
    fired: Counter[str] = Counter()
    backends: dict[str, Counter[str]] = {}
    for batch in batches:
        fired.update(batch.report.get("fired", {}))
        for phase, calls in batch.report.get("backends", {}).items():
            backends.setdefault(phase, Counter()).update(calls)
    found: dict[str, Any] = {
        "fired": dict(fired),
        "backends": {phase: dict(calls) for phase, calls in backends.items()},
    }
    counted = [batch for batch in batches if "image_tokens" in batch.report]
    if counted:
        weights = [len(batch.answers) for batch in counted]

        def mean(values: Iterable[float]) -> float:
            return sum(w * v for w, v in zip(weights, values, strict=True)) / max(sum(weights), 1)

        tokens = [batch.report["image_tokens"] for batch in counted]
        found["image_tokens"] = {
            "prompt": mean(t["prompt"] for t in tokens),
            "per_layer": [mean(row) for row in zip(*(t["per_layer"] for t in tokens), strict=True)],
            "equivalent": mean(t["equivalent"] for t in tokens),
        }
    return found
