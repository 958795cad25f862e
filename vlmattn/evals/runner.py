"""Runs suites with and without presets on one model: same samples, same batches, same decoding for every preset."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vlmattn
from vlmattn import compat
from vlmattn.errors import InputError, OptionError, StateError
from vlmattn.evals.asking import Progress, Unfit, ask_all, refuse_moving
from vlmattn.evals.batching import batches, lengths
from vlmattn.evals.costs import costs
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
from vlmattn.evals.journal import Batch, Journal, write_json
from vlmattn.evals.processes import Processes
from vlmattn.evals.scoring import SEED, Scored
from vlmattn.evals.sources import questions_hash
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFiles
from vlmattn.files import write_whole
from vlmattn.recipe import Recipe
from vlmattn.texts import read_json
from vlmattn.wrapping import handle_of, record_of

ON_ERROR = ("stop", "skip")


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

    ``none`` is always part of it. Nothing is sampled; what else the model's generation config says (beams, penalties)
    holds for all presets and is written down. Answers are written batch by batch (journal*.jsonl); after a kill the
    same call goes on where it stopped, in the same batches: it refuses other weights, settings or files of presets, and
        asks again about questions
    and image files that have changed. Started by ``torchrun`` or ``accelerate launch``, the processes share the
    batches; which batches there are does not depend on how many processes there are, so neither do the answers.

    Args:
        model, processor: a bare model and its processor (left padding).
        presets: names, recipe files or recipes; see ``Recipe.of``.
        out: results folder; one that all processes see.
        say: where plain progress lines go when there is no terminal.
        command: what was typed, for the record.
        batch_size: at most so many questions at once. Where memory is short they are asked in parts, and the summary
            says so.
        batch_tokens: at most so many prompt tokens at once, padding counted; None for no bound.
        on_error: "stop" at an image that is missing or damaged, or "skip" its questions, for all presets, and name
            them.

    Raises:
        StateError: ``out`` holds a run with other settings, or another run works in it; the model is wrapped; memory is
            short for one question; an image file has changed during the run.
        UnknownNameError: no such preset.
        OptionError: a recipe that does not fit the model, or is given twice; an option out of range.
        InputError: an image is missing or damaged, an id is there twice, no sample can be read, ``out`` cannot be
            written.
    """
    if (handle := handle_of(model)) is not None:  # its edit would answer for none
        raise StateError(
            f"the model is wrapped with '{handle.recipe.name}'; give evaluate the bare model: vlmattn.unwrap(model)"
        )
    recipes = recipes_of(presets)
    _check(suites, batch_size, batch_tokens, on_error)
    run = _Run(model, processor, suites, recipes, out, say, on_error)
    settings = run.settings(model_name, batch_size, batch_tokens)
    processor.tokenizer.padding_side = "left"
    return run.result(run.answered(settings, restart), settings, command)


@dataclass(frozen=True)
class _Run:
    """What all steps of a run need; see ``evaluate``."""

    model: Any
    processor: Any
    suites: Sequence[Suite]
    recipes: Mapping[str, Recipe]
    out: Path
    say: Callable[[str], None]
    on_error: str
    processes: Processes = field(default_factory=Processes)

    def settings(self, name: str, batch_size: int, batch_tokens: int | None) -> dict[str, Any]:
        """Everything that decides the answers."""
        return {
            "model": name,
            "weights": fingerprint(self.model),
            "config": config_hash(self.model),
            "attention": compat.attention_name(self.model.config),
            "processor": processor_hash(self.processor),
            "recipes": {name: recipe.to_dict() for name, recipe in self.recipes.items()},
            "files": self._tried(),
            "suites": {suite.name: dict(suite.settings) for suite in self.suites},
            "decoding": decoding(self.model, self.suites),
            "batch_size": batch_size,
            "batch_tokens": batch_tokens,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantisation": quantisation(self.model),
            "seed": SEED,
            "versions": versions(),
            "libraries": libraries(),
        }

    def _tried(self) -> dict[str, str]:
        """Hashes of the files that recipes use; what does not fit the model is an error now, not hours later."""
        files: dict[str, str] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again when it answers
            for recipe in self.recipes.values():
                with self._applied(recipe):
                    refuse_missing(self.model, recipe.name)
                    if (record := record_of(self.model)) is not None:
                        files |= files_of(recipe, record.anatomy)
        return files

    def _applied(self, recipe: Recipe) -> AbstractContextManager[Any]:
        return nullcontext() if recipe.is_none else vlmattn.applied(self.model, recipe, processor=self.processor)

    def answered(self, settings: Mapping[str, Any], restart: bool) -> list[Batch]:
        """Answer what no earlier attempt has; the batches of all processes and attempts."""
        bounds = settings["batch_size"], settings["batch_tokens"]
        work = {
            suite.name: batches(suite.samples(), lengths(self.model, self.processor, suite.samples()), *bounds)
            for suite in self.suites
        }
        wanted = {
            (name, preset, number): samples
            for name, parts in work.items()
            for preset in self.recipes
            for number, samples in enumerate(parts)
        }
        with Journal(self.out, settings, self.processes, restart, Unfit(wanted)) as journal:
            self._say_first(settings, journal)
            for recipe in self.recipes.values():
                with warnings.catch_warnings(), self._applied(recipe):
                    warnings.filterwarnings("ignore", message="vlmattn: .* never fired")  # the report says so
                    for suite in self.suites:
                        self._ask_left(suite, recipe.name, work[suite.name], journal)
            order = list(self.recipes), list(work)
            done = journal.finish(lambda b: (order[0].index(b.preset), order[1].index(b.suite), b.number))
            refuse_moving(done)
        return done

    def _say_first(self, settings: Mapping[str, Any], journal: Journal) -> None:
        if self.processes.first:
            self.say(f"decoding: {decoding_in_words(settings['decoding'])}")
            if journal.done:
                answers = sum(len(batch.answers) for batch in journal.done.values())
                self.say(f"resuming: {answers} answers are already in {self.out}")
            for note in journal.notes:
                self.say(f"asked again: {note}")

    def _ask_left(self, suite: Suite, preset: str, work: Sequence[Sequence[Sample]], journal: Journal) -> None:
        """This process's share of the batches that no earlier attempt has answered."""
        left = [
            (number, samples)
            for number, samples in enumerate(work)
            if not journal.has((suite.name, preset, number), (sample.id for sample in samples))
        ]
        mine = self.processes.share(left)
        before = len(suite.samples()) - sum(len(samples) for _, samples in left)
        with Progress(f"{preset} · {suite.name}", mine, before, self.processes, self.say) as progress:
            ask_all(self.model, self.processor, suite, preset, mine, journal, self.on_error, progress)

    def result(self, done: Sequence[Batch], settings: Mapping[str, Any], command: str) -> Result:
        """Score what was answered, and write it down."""
        answers = {(b.suite, b.preset, key): text for b in done for key, text in b.answers.items()}
        scored: dict[str, Scored] = {}
        summary: dict[str, Any] = {}
        if self.processes.first:  # a judge is asked once, not by every process
            scored = {suite.name: Scored(suite, list(self.recipes), answers) for suite in self.suites}
            summary = {
                **settings,
                "command": command,
                "hardware": hardware(),
                "processes": self.processes.count,
                "questions": {suite.name: questions_hash(suite) for suite in self.suites},
                **_figures(self.suites, scored, done, list(self.recipes)),
            }
            lines = (json.dumps(line, ensure_ascii=False) for found in scored.values() for line in found.lines())
            write_whole(self.out / "answers.jsonl", "".join(line + "\n" for line in lines))
            write_json(self.out / "summary.json", summary)
        return Result(self.processes.told(summary), self.suites, answers, scored, self.processes.first)


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
    by_split, overall = zip(*(found.tables() for found in scored.values()), strict=True)
    return {
        **costs(done, presets),
        "skipped": [{"suite": suite, "id": key, "why": why} for (suite, key), why in unreadable.items()],
        "titles": {suite.name: suite.title for suite in suites},
        "metrics": {suite.name: [metric.to_dict() for metric in suite.metrics] for suite in suites},
        "mean_of_splits": {suite.name: suite.mean_of_splits for suite in suites},
        "tables": list(itertools.chain(*by_split)),
        "overall": list(itertools.chain(*overall)),
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
        _check_samples(suite, on_error)


def _check_samples(suite: Suite, on_error: str) -> None:
    """Refuse ids that are there twice, and images that are not there."""
    ids = Counter(sample.id for sample in suite.samples())
    if twice := [key for key, count in ids.items() if count > 1]:
        raise InputError(f"suite {suite.name}: id '{twice[0]}' is there twice ({len(twice)} such ids)")
    paths = {
        path for sample in suite.samples() if isinstance(sample.images, ImageFiles) for path in sample.images.paths
    }
    missing = (
        sorted(path for path in paths if not os.path.isfile(path)) if on_error == "stop" else []
    )  # False for any odd name
    if missing:
        raise InputError(
            f"suite {suite.name}: image not found: {missing[0]} ({len(missing)} of {len(paths)} images); give the"
            " folder that holds them with --images, or leave their questions out with --on-error skip"
        )


def refuse_missing(model: Any, preset: str) -> None:
    """Raise if a recipe needs inputs of its own with every call."""
    record = record_of(model)
    rule = record.now.acting.decoding if record is not None else None
    for branch in rule.branches if rule is not None else ():
        if branch.needs:
            raise OptionError(
                f"preset '{preset}' needs {', '.join(branch.needs)} for its branch '{branch.name}' with every call,"
                " which an eval cannot give; leave it out"
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
