"""Chooses the options of a method on a few validation samples, as papers do per task; its figures are no test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import product
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError, OptionError, StateError, UnknownNameError
from vlmattn.evals.journal import write_json
from vlmattn.evals.runner import Result, evaluate, read_summary
from vlmattn.evals.suites.base import Suite
from vlmattn.evals.suites.subset import Subset
from vlmattn.files import write_whole
from vlmattn.recipe import Recipe

#: Stream of the generated scenes, and order of the samples: not the scenes of ``vlmattn eval``, nor of the training.
TUNE_SEED = 13
SAMPLES = 32  # as in the SoFA paper
_MOST = 1000  # settings; more is a slip in a range
_LABEL = "validation"


@dataclass(frozen=True)
class Setting:
    """One point of the grid and what it scored on the validation samples.

    Attributes:
        low, high: ends of the 95 % interval of the value, None where there is none.
        changed: answers that differ from those without the method.
        fired: how often the method found something to do.
    """

    name: str
    options: Mapping[str, Any]
    value: float
    low: float | None
    high: float | None
    changed: int
    fired: int


@dataclass(frozen=True)
class Tuned:
    """What ``tune`` found.

    Attributes:
        recipe: the chosen setting; also in ``tuned.yaml``.
        chosen: its figures.
        settings: all of them, in the order of the grid.
        none: the bare model's value of the metric.
        metric, better: the suite's headline metric, and whether "higher" or "lower" is better.
        samples: ids of the validation samples.
    """

    recipe: Recipe
    chosen: Setting
    settings: tuple[Setting, ...]
    none: float
    metric: str
    better: str
    samples: tuple[str, ...]

    @property
    def tied(self) -> tuple[Setting, ...]:
        """Settings as good as the chosen one, itself included."""
        return tuple(setting for setting in self.settings if setting.value == self.chosen.value)

    def notes(self) -> list[str]:
        """What a reader must know beside the figures."""
        found = [
            f"These are figures of the {len(self.samples)} {_LABEL} samples that chose the setting, and flatter it."
        ]
        if not any(setting.changed for setting in self.settings):
            found.append("No setting changed an answer, so nothing was chosen: the first setting stands by default.")
        elif len(self.tied) > 1:
            found.append(
                f"{', '.join(setting.name for setting in self.tied)} are equally good here; the first of them"
                " was taken."
            )
        if idle := [setting.name for setting in self.settings if setting.fired == 0]:
            found.append(f"{', '.join(idle)}: never fired on this model.")
        return found


def settings_of(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Recipe, dict[str, Any]]]:
    """Every combination of the grid's values as name -> (recipe, options); the last option varies fastest.

    Raises:
        OptionError: a recipe of several methods, no values, too many, the same value twice, a value out of range.
        UnknownNameError: the method has no such option.
    """
    _options(recipe, grid)
    if not grid or not all(grid.values()):
        raise OptionError("a grid needs at least one option, and each option at least one value")
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > _MOST:
        raise OptionError(f"the grid has {count} settings, at most {_MOST} are tried; take fewer values")
    found: dict[str, tuple[Recipe, dict[str, Any]]] = {}
    for values in product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        setting = Recipe.of(recipe, **options)
        if setting.name in found:
            raise OptionError(f"the setting '{setting.name}' is in the grid twice")
        found[setting.name] = setting, options
    return found


def parse_grid(recipe: Recipe, texts: Sequence[str]) -> dict[str, list[Any]]:
    """A grid as typed: ``sigma=0.25,0.5``, or ``sigma=0:1:.1`` for start:stop:step with both ends.

    Values are of the type of the option; lists of whole numbers cannot be typed.

    Raises:
        InputError: not ``name=values``, or the values are not of the option's type.
        OptionError, UnknownNameError: as ``settings_of``.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not (name and equals and values):
            raise InputError(f"--grid must look like sigma=0.25,0.5 or sigma=0:1:.1 (start:stop:step), got '{text}'")
        if name in pairs:
            raise InputError(
                f"--grid names '{name}' twice; give all its values at once, as in {name}={pairs[name]},..."
            )
        pairs[name] = values
    defaults = _options(recipe, pairs)
    return {name: _values(name, values, defaults[name]) for name, values in pairs.items()}


def _options(recipe: Recipe, names: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the recipe's method with their defaults, once ``names`` are all among them."""
    if len(recipe.methods) != 1:
        raise OptionError(f"only a recipe of one method can be tuned; '{recipe.name}' has {len(recipe.methods)}")
    (method,) = recipe.methods
    known = {spec.name: spec.default for spec in dataclasses.fields(method)}
    for name in names:
        if name not in known:
            raise UnknownNameError(f"option of '{method.info.name}'", name, known)
    return known


def _values(name: str, text: str, default: Any) -> list[Any]:
    """The values that a text lists for an option with this default."""
    words = [word.strip() for word in text.split(",")]
    if isinstance(default, str):
        return list(words)
    if isinstance(default, bool):
        if not {word.lower() for word in words} <= {"true", "false"}:
            raise InputError(f"--grid {name} takes true and false, got '{text}'")
        return [word.lower() == "true" for word in words]
    if not isinstance(default, (int, float)):
        raise InputError(
            f"--grid cannot hold values of '{name}', which are lists; use vlmattn.evals.tune.tune in Python"
        )
    numbers = [number for word in words for number in _numbers(name, word)]
    return [int(n) if isinstance(default, int) and n.is_finite() and n == int(n) else float(n) for n in numbers]


def _numbers(name: str, word: str) -> list[Decimal]:
    try:
        return _range(name, word) if ":" in word else [Decimal(word)]
    except InvalidOperation:
        raise InputError(f"--grid {name} takes numbers (0.25,0.5) or start:stop:step (0:1:.1), got '{word}'") from None


def _range(name: str, word: str) -> list[Decimal]:
    """``start:stop:step`` with both ends, in decimal: 0:1:.1 has eleven numbers and ends in 1."""
    parts = [Decimal(part.strip()) for part in word.split(":")]
    if len(parts) != 3 or not all(part.is_finite() for part in parts):
        raise InvalidOperation
    start, stop, step = parts
    if step <= 0 or stop < start:
        raise InputError(f"--grid {name}: '{word}' must go up from start to stop in steps above 0")
    steps = (stop - start) / step
    if steps >= _MOST:
        raise OptionError(f"--grid {name}: '{word}' has {int(steps) + 1} values, at most {_MOST} are tried")
    return [start + i * step for i in range(int(steps) + 1)]


def tune(
    model: Any,
    processor: Any,
    suite: Suite,
    recipe: Any,
    grid: Mapping[str, Sequence[Any]],
    out: Path,
    model_name: str,
    samples: int = SAMPLES,
    seed: int = TUNE_SEED,
    batch_size: int = 50,
    restart: bool = False,
    say: Callable[[str], None] = print,
    command: str = "",
    batch_tokens: int | None = None,
    on_error: str = "stop",
) -> Tuned:
    """Try every setting of a grid on the same few samples and keep the best, greedily decoded.

    The validation samples are the first ``samples`` of the suite in an order shuffled by ``seed``, each counted once.
    The best setting is the one with the best headline metric of the suite, the first in the grid among equals. Writes
    ``tuned.yaml`` (a recipe file) and ``tune.json`` (all settings and how they were tried) beside what ``evaluate``
    writes, and resumes as ``evaluate`` does.

    Its figures are those of the samples that made the choice; ``test_once`` has those of others.

    Args:
        recipe: any form of a recipe of one method; see ``Recipe.of``.
        grid: option -> values to try; several options are tried in every combination.

    Raises:
        OptionError: several methods, a value out of range, more samples than the suite has, a metric without direction.
        UnknownNameError: the method has no such option.
        StateError: ``out`` holds a run with other settings; the model is wrapped.
    """
    base = Recipe.of(recipe)
    found = settings_of(base, grid)
    metric = suite.headline
    if metric.better not in ("higher", "lower"):
        raise OptionError(f"{metric.name} of suite '{suite.name}' has no better side, so no setting can be the best")
    subset = Subset.draw(suite, samples, seed, _LABEL)
    recipes = [setting for setting, _ in found.values()]
    result = evaluate(
        model, processor, [subset], recipes, out, model_name, batch_size, restart, say, command, batch_tokens, on_error
    )
    tuned = _chosen(found, result, subset)
    if result.first:
        write_json(out / "tune.json", _record(tuned, base, grid, suite, seed, result.summary))
        write_whole(out / "tuned.yaml", tuned.recipe.to_yaml())
    return tuned


def _chosen(found: Mapping[str, tuple[Recipe, dict[str, Any]]], result: Result, subset: Subset) -> Tuned:
    """The best of the settings."""
    metric, (table,) = subset.headline, result.summary["tables"]
    settings = []
    for name, (_, options) in found.items():
        row, fired = table["rows"][name], sum(result.summary["reports"][name]["fired"].values())
        cell = row["metrics"][metric.name]
        settings.append(Setting(name, options, cell["value"], cell["low"], cell["high"], row["changed"], fired))
    best = max(settings, key=lambda setting: setting.value if metric.better == "higher" else -setting.value)
    return Tuned(
        recipe=found[best.name][0],
        chosen=best,
        settings=tuple(settings),
        none=table["rows"]["none"]["metrics"][metric.name]["value"],
        metric=metric.name,
        better=metric.better,
        samples=tuple(sample.id for sample in subset.samples()),
    )


def untouched(suite: Suite, tuned: Tuned) -> list[str]:
    """Ids of the samples that share no image with one that the choice was made on."""
    chosen = set(tuned.samples)
    images = {sample.image_id for sample in suite.samples() if sample.id in chosen}
    return [sample.id for sample in suite.samples() if sample.image_id not in images]


def test_once(
    model: Any, processor: Any, suite: Suite, recipe: Any, tuned: Tuned, out: Path, model_name: str, **options: Any
) -> Result:
    """Ask the samples that had no part in the choice, of the bare model, the preset as it was, and the chosen setting.

    Samples that share an image with a validation sample are left out. The figures stay in ``out/test``: later calls
    read them again, and a second choice is not tested on the samples that have been looked at.

    Args:
        suite, recipe, out: as they were given to ``tune``.
        tuned: what it returned.
        options: for ``evaluate``.

    Raises:
        StateError: ``out/test`` has the figures of another choice.
        OptionError: no sample is left.
    """
    folder = out / "test"
    seen = read_summary(folder)
    if seen and tuned.recipe.name not in seen["recipes"]:
        raise StateError(
            f"the test samples of {out} were looked at with {', '.join(seen['recipes'])}; a second choice would be"
            " made on them. Take other samples (--seed, or other files) and another --out, or --no-test"
        )
    rest = untouched(suite, tuned)
    if not rest:
        raise OptionError(
            "no sample is left to test on: all share an image with a validation sample; take fewer --shots"
        )
    subset = Subset(suite, rest, "test", whole=False)
    recipes = {found.name: found for found in (Recipe.of(recipe), tuned.recipe)}
    return evaluate(model, processor, [subset], list(recipes.values()), folder, model_name, **options)


def _record(
    tuned: Tuned, base: Recipe, grid: Mapping[str, Sequence[Any]], suite: Suite, seed: int, summary: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``tune.json`` holds."""
    count = len(tuned.samples)
    same = ("command", "model", "weights", "dtype", "decoding", "batch_size", "versions", "hardware")
    return {
        "notes": tuned.notes(),
        "chosen": tuned.chosen.name,
        "preset": base.to_dict(),
        "grid": {name: list(values) for name, values in grid.items()},
        "metric": tuned.metric,
        "better": tuned.better,
        "none": {"value": tuned.none, "n": count},
        "settings": [{**setting.__dict__, "options": dict(setting.options), "n": count} for setting in tuned.settings],
        "suite": suite.name,
        "suite_settings": dict(suite.settings),
        "seed": seed,
        "samples": list(tuned.samples),
        **{name: summary[name] for name in same},
    }
