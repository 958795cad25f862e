"""Runs suites with and without presets on one model: same samples, same batches, same decoding for every preset."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError
from vlmattn.evals.journal import Journal, write_json
from vlmattn.evals.stats import Bootstrap, Metric, mcnemar
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.recipe import Recipe
from vlmattn.wrapping import handle_of

SEED = 0
_RUNNING = "reports.json"  # of the presets done so far; once all are, the summary has it


@dataclass
class Result:
    """What ``evaluate`` returns: the summary (as written to summary.json) and what the report needs besides."""

    summary: dict[str, Any]
    suites: Sequence[Suite]
    answers: dict[tuple[str, str, str], str] = field(repr=False)


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
) -> Result:
    """Ask every sample with every preset, score, compare with ``none``, and write ``out``.

    ``none`` is always part of it. Answers are written batch by batch (answers.jsonl); after a kill the same call goes
    on where it stopped, in the same batches. Decoding is greedy.

    Args:
        model, processor: a bare model and its processor (left padding).
        presets: names, recipe files or recipes; see ``Recipe.of``.
        out: results folder.
        say: where plain progress lines go when there is no terminal.
        command: what was typed, for the record.

    Raises:
        StateError: ``out`` holds a run with other settings; the model is wrapped.
        UnknownNameError: no such preset.
        OptionError: a recipe that does not fit the model, or is given twice; a batch size below 1.
    """
    if (handle := handle_of(model)) is not None:  # its edit would answer for none
        raise StateError(
            f"the model is wrapped with '{handle.recipe.name}'; give evaluate the bare model: vlmattn.unwrap(model)"
        )
    recipes = recipes_of(presets)
    if batch_size < 1:
        raise OptionError(f"the batch size must be at least 1, got {batch_size}")
    settings = {
        "model": model_name,
        "weights": fingerprint(model),
        "recipes": {name: recipe.to_dict() for name, recipe in recipes.items()},
        "suites": {suite.name: dict(suite.settings) for suite in suites},
        "decoding": {"do_sample": False, "max_new_tokens": {suite.name: suite.max_new_tokens for suite in suites}},
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": SEED,
        "versions": versions(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again when it answers
        for recipe in recipes.values():  # what does not fit the model is an error now, not hours later
            with _applied(model, recipe, processor):
                refuse_missing(model, recipe.name)
    processor.tokenizer.padding_side = "left"
    with Journal(out, settings, restart) as journal:
        if not journal.resumed:
            (out / _RUNNING).unlink(missing_ok=True)
        earlier = _earlier(out) if journal.resumed else {}
        reports: dict[str, Any] = earlier.get("reports", {})
        seconds: dict[str, float] = earlier.get("seconds_per_sample", {})
        if journal.resumed:
            say(f"resuming: {journal.resumed} answers are already in {out}")
        for name, recipe in recipes.items():
            begun, before = time.monotonic(), len(journal.answers)
            with warnings.catch_warnings(), _applied(model, recipe, processor):
                warnings.filterwarnings("ignore", message="vlmattn: .* never fired")  # the report says so
                for suite in suites:
                    _ask(model, processor, suite, name, journal, batch_size, say)
                asked = len(journal.answers) - before
                if asked:
                    seconds[name] = round((time.monotonic() - begun) / asked, 5)
                if asked and not recipe.is_none:
                    report = model.vlmattn.report()
                    reports[name] = {key: report[key] for key in ("fired", "backends", "image_tokens") if key in report}
            write_json(out / _RUNNING, {"reports": reports, "seconds_per_sample": seconds})
        answers = dict(journal.answers)
    tables, overall = [], []
    for suite in suites:
        by_split, of_all = _tables(suite, list(recipes), answers)
        tables += by_split
        overall += of_all
    summary = {
        **settings,
        "command": command,
        "hardware": hardware(),
        "reports": reports,
        "seconds_per_sample": seconds,
        "titles": {suite.name: suite.title for suite in suites},
        "metrics": {suite.name: [_about(metric) for metric in suite.metrics] for suite in suites},
        "tables": tables,
        "overall": overall,
    }
    write_json(out / "summary.json", summary)
    (out / _RUNNING).unlink()
    return Result(summary, suites, answers)


def read_summary(out: Path) -> dict[str, Any]:
    """summary.json of a results folder, {} if there is none yet."""
    path = out / "summary.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _earlier(out: Path) -> dict[str, Any]:
    """Reports and seconds of the presets that an earlier attempt went through, whether or not it came to its end."""
    path = out / _RUNNING
    return dict(json.loads(path.read_text())) if path.exists() else read_summary(out)


def _about(metric: Metric) -> dict[str, str]:
    """What a reader of summary.json must know of a metric; the first one of a suite is its headline."""
    return {"name": metric.name, "better": metric.better, "about": metric.about}


def _applied(model: Any, recipe: Recipe, processor: Any) -> AbstractContextManager[Any]:
    return vlmattn.applied(model, recipe, processor=processor) if not recipe.is_none else nullcontext()


def refuse_missing(model: Any, preset: str) -> None:
    """Raise if a recipe needs inputs of its own with every call."""
    handle = handle_of(model)
    rule = handle.active_plan.decoding if handle is not None else None
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


def _batches(samples: Sequence[Sample], size: int) -> Iterator[tuple[int, Sequence[Sample]]]:
    for start in range(0, len(samples), size):
        yield start // size, samples[start : start + size]


def _ask(
    model: Any, processor: Any, suite: Suite, preset: str, journal: Journal, size: int, say: Callable[[str], None]
) -> None:
    samples = suite.samples()
    terminal = sys.stderr.isatty()
    label, said = f"{preset} · {suite.name}", time.monotonic()
    done = 0
    with tqdm(total=len(samples), desc=label, disable=not terminal, leave=False, unit="answer") as bar:
        for number, batch in _batches(samples, size):
            if any((suite.name, preset, sample.id) not in journal.answers for sample in batch):
                prompts = [sample.prompt for sample in batch]
                images = [sample.images() for sample in batch]
                texts = answer(model, processor, prompts, images, suite.max_new_tokens)
                journal.add(suite.name, preset, number, [sample.id for sample in batch], texts)
            done += len(batch)
            bar.update(len(batch))
            if not terminal and (time.monotonic() - said > 20 or done == len(samples)):
                say(f"{label}: {done}/{len(samples)}")
                said = time.monotonic()


def answer(model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Any], max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch of prompts, each about its own list of images."""
    if not getattr(processor, "chat_template", None):
        raise InputError("the model's processor has no chat template; use a checkpoint that comes with one")
    texts = []
    for prompt, pictures in zip(prompts, images, strict=True):
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
    bos = processor.tokenizer.bos_token
    inputs = processor(
        text=texts,
        images=[picture for pictures in images for picture in pictures],
        padding=True,
        return_tensors="pt",
        add_special_tokens=not (bos and texts[0].startswith(bos)),  # many templates write the first token themselves
    ).to(model.device, dtype=model.dtype)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    fresh = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(fresh, skip_special_tokens=True)]


_Answers = dict[tuple[str, str, str], str]
_Table = dict[str, Any]


def _tables(suite: Suite, presets: Sequence[str], answers: _Answers) -> tuple[list[_Table], list[_Table]]:
    """One table per condition and split, and one per condition over all of its splits.

    The latter counts an answer once for each split it belongs to: for POPE it is the mean over the splits, as papers
    report it.
    """
    samples = suite.samples()
    records = {
        preset: suite.records({sample.id: answers[suite.name, preset, sample.id] for sample in samples})
        for preset in presets
    }
    columns: dict[tuple[str, str], list[int]] = {}
    for index, sample in enumerate(samples):
        for split in sample.splits:
            columns.setdefault((sample.condition, split), []).append(index)
    whole: dict[str, list[int]] = {}
    for (condition, _), members in columns.items():
        whole.setdefault(condition, []).extend(members)

    def table(condition: str, split: str, members: Sequence[int]) -> _Table:
        rows = _rows(suite, records, answers, members)
        count, images = len(set(members)), len({samples[i].image_id for i in members})
        facts = {"suite": suite.name, "condition": condition, "split": split, "samples": count, "images": images}
        return {**facts, "rows": rows}

    return (
        [table(condition, split, members) for (condition, split), members in columns.items()],
        [table(condition, "all", members) for condition, members in whole.items()],
    )


def _rows(
    suite: Suite, records: Mapping[str, Sequence[dict[str, float]]], answers: _Answers, members: Sequence[int]
) -> dict[str, Any]:
    """Every metric of every preset over some samples, and its difference to ``none``; a sample may count repeatedly."""
    samples = suite.samples()
    bootstrap = Bootstrap([samples[i].image_id for i in members], seed=SEED)
    matrix = {p: np.array([[of[i][f] for f in suite.fields] for i in members]) for p, of in records.items()}
    once = list(dict.fromkeys(members))
    rows = {}
    for preset in records:
        cells = {}
        for metric in suite.metrics:
            cell: dict[str, Any] = bootstrap.interval(metric, suite.fields, matrix[preset]).to_dict()
            if preset != "none":
                change = bootstrap.difference(metric, suite.fields, matrix[preset], matrix["none"])
                cell["difference"] = change.to_dict()
            cells[metric.name] = cell
        row: dict[str, Any] = {"metrics": cells}
        if preset != "none":
            right = {p: [suite.right(records[p][i]) for i in once] for p in ("none", preset)}
            row["mcnemar_p"] = mcnemar(right["none"], right[preset])
            row["changed"] = sum(
                answers[suite.name, "none", samples[i].id] != answers[suite.name, preset, samples[i].id] for i in once
            )
        rows[preset] = row
    return rows


def fingerprint(model: torch.nn.Module) -> str:
    """A short hash of names, shapes and first values of all weights, so that answers of other weights are not resumed."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if weight.device.type != "meta":
            digest.update(str(weight.detach().flatten()[:8].tolist()).encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions that can change a result."""
    return {
        "vlmattn": vlmattn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def hardware() -> dict[str, Any]:
    """Where it ran."""
    cuda = torch.cuda.is_available()
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
