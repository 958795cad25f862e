"""Shared by all benchmarks: interleaved candidates, paired ratios, rows with machine and versions."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from vlmattn.evals.runner import hardware, versions


def paired(candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each candidate in each round. All candidates run in every round, so that drift hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in tqdm(range(warm_up + rounds), leave=False):
        for name, run in candidates.items():
            begun = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def rows(what: str, seconds: Mapping[str, Sequence[float]], base: str) -> list[dict[str, object]]:
    """One CSV row per candidate: median seconds and the paired ratio to ``base`` with its quartiles."""
    found = []
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        found.append(
            {
                "what": what,
                "candidate": name,
                "median_s": round(statistics.median(values), 5),
                "ratio": round(middle, 3),
                "ratio_q1": round(low, 3),
                "ratio_q3": round(high, 3),
                "n": len(values),
                "date": datetime.date.today().isoformat(),
                "cpu": platform.processor() or platform.machine(),
                **{name: value for name, value in hardware().items() if name in ("threads", "gpu")},
                **versions(),
            }
        )
    return found


def write_csv(path: Path, table: Sequence[Mapping[str, object]]) -> None:
    """Write the rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    partial.replace(path)
