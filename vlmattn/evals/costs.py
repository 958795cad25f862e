"""What methods did and what they took, from the journal: of all attempts and processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmattn.evals.journal import Batch


def costs(done: Sequence[Batch], presets: Sequence[str]) -> dict[str, Any]:
    """By preset: seconds, tokens and memory (``cost``), and what methods counted (``reports``)."""
    by_preset = {preset: [batch for batch in done if batch.preset == preset] for preset in presets}
    return {
        "reports": {preset: _report(own) for preset, own in by_preset.items() if preset != "none"},
        "cost": {preset: _cost(own) for preset, own in by_preset.items()},
    }


def _cost(batches: Sequence[Batch]) -> dict[str, Any]:
    seconds, tokens = sum(b.seconds for b in batches), sum(b.tokens for b in batches)
    return {
        "seconds_per_sample": round(seconds / max(sum(len(b.answers) for b in batches), 1), 5),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        "peak_bytes": max((b.peak_bytes for b in batches if b.peak_bytes is not None), default=None),
        "cut_batches": sum(b.cut for b in batches),
    }


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
    if counted := [batch for batch in batches if "image_tokens" in batch.report and batch.answers]:
        weights = [len(batch.answers) for batch in counted]
        found["image_tokens"] = {
            name: np.average(
                [batch.report["image_tokens"][name] for batch in counted], axis=0, weights=weights
            ).tolist()
            for name in ("prompt", "per_layer", "equivalent")
        }
    return found
