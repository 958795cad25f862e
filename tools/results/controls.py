"""Presets beside their controls: what does as much, at random, where the method claims to know better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmattn.evals.compare import Compared, compare

_TOKENS = ("knockout_as_many", "knockout_others")
#: Preset, or method of the preset -> presets that a gain has to survive.
CONTROLS: Mapping[str, tuple[str, ...]] = {
    "knockout_sinks": _TOKENS,
    "var": ("knockout_sinks", *_TOKENS),  # is it what VAR does with the sinks' attention, or that they lose it?
    "vhr": ("heads_random_half",),
    "heads_amplify": ("heads_amplify_random",),
}
#: What acts at random: all controls but one that is a part of VAR, and a preset of its own.
AT_RANDOM = frozenset(name for names in CONTROLS.values() for name in names) - {"knockout_sinks"}


def controls_of(preset: str, recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The controls of a preset or of a recipe of one method."""
    edits = recipe.get("interventions", ())
    method = edits[0]["method"] if len(edits) == 1 and not recipe.get("decoding") and not recipe.get("pruning") else ""
    return CONTROLS.get(preset) or CONTROLS.get(method, ())


def against_controls(
    runs: Sequence[Path], summaries: Sequence[Mapping[str, Any]]
) -> dict[tuple[str, str], list[Compared]]:
    """(preset, control) -> the headline metric of each suite and condition, preset minus control, paired over images.

    Args:
        runs: results folders; a summary file alone has no answers to compare, and its presets are left out.
        summaries: of the same runs.
    """
    found: dict[tuple[str, str], list[Compared]] = {}
    where: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for run, summary in zip(runs, summaries, strict=True):
        if run.is_dir():
            where |= {preset: (run, summary) for preset in summary["recipes"] if preset not in where}
    for preset, (run, summary) in where.items():
        first = {suite: metrics[0]["name"] for suite, metrics in summary["metrics"].items()}
        for control in controls_of(preset, summary["recipes"][preset]):
            if control in where:
                rows = compare(where[control][0], run, [(control, preset)], examples=0).rows
                found[preset, control] = [row for row in rows if row.metric == first[row.suite]]
    return found
