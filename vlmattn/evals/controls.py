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
    where = {
        preset: (run, summary)
        for run, summary in reversed(list(zip(runs, summaries, strict=True)))
        if run.is_dir()
        for preset in summary["recipes"]
    }
    for preset, (run, summary) in where.items():
        for control in controls_of(preset, summary["recipes"][preset]):
            if control in where:
                rows = compare(where[control][0], run, [(control, preset)], examples=0).rows
                first = {suite: metrics[0]["name"] for suite, metrics in summary["metrics"].items()}
                found[preset, control] = [row for row in rows if row.metric == first[row.suite]]
    return found
