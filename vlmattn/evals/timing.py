"""Paired measurements: interleaved candidates, ratios to a base within a round, CSV rows with machine and versions."""

from __future__ import annotations

import ctypes
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from vlmattn.evals.environment import hardware, versions
from vlmattn.files import csv_text, make_folder, write_whole

Row = dict[str, object]
_UNITS = {"ms": 1e3, "mb": 1e-6}  # per second, per byte


def synchronise() -> None:
    """Wait until every CUDA device has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired(candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each candidate in each round. All candidates run in every round, so that drift hits them alike.

    Args:
        candidates: what to run, by name; run in this order.
        rounds: measured rounds.
        warm_up: rounds before them that are thrown away.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with tqdm(total=(warm_up + rounds) * len(candidates), leave=False, disable=None) as bar:
        for number in range(warm_up + rounds):
            for name, run in candidates.items():
                bar.set_description_str(name)
                synchronise()
                begun = time.perf_counter()
                run()
                synchronise()
                if number >= warm_up:
                    seconds[name].append(time.perf_counter() - begun)
                bar.update()
    return seconds


def rows(what: str, values: Mapping[str, Sequence[float]], base: str, unit: str = "ms") -> list[Row]:
    """One CSV row per candidate: median, paired ratio to ``base`` with quartiles, and the median of what it costs more.

    Args:
        values: seconds (``unit`` "ms") or bytes (``unit`` "mb") of each candidate in each round.
    """
    scale, found = _UNITS[unit], []
    for name, own in values.items():
        pairs = list(zip(own, values[base], strict=True))
        low, middle, high = quartiles([value / other for value, other in pairs])
        found.append(
            {
                "what": what,
                "candidate": name,
                "base": base,
                "unit": unit,
                "median": round(statistics.median(own) * scale, 5),
                "extra": round(statistics.median(value - other for value, other in pairs) * scale, 5),
                "ratio": round(middle, 3),
                "ratio_q1": round(low, 3),
                "ratio_q3": round(high, 3),
                "n": len(pairs),
                **machine(),
            }
        )
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; never outside of what was measured."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def machine() -> Row:
    """Date, machine and versions."""
    facts = {name: value for name, value in hardware().items() if name in ("threads", "gpu")}
    cpu = platform.processor() or platform.machine()
    return {"date": datetime.date.today().isoformat(), "cpu": cpu, **facts, **versions()}


def line(row: Mapping[str, object]) -> str:
    """A row as a line of text."""
    return (
        f"{row['what']:42} {row['candidate']:28} {row['median']:11.3f} {row['unit']}"
        f"   x{row['ratio']:.3f} [{row['ratio_q1']:.3f}, {row['ratio_q3']:.3f}] n={row['n']} to {row['base']}"
    )


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """By how much ``run`` raises the memory in use at its peak: of a CUDA device, or of this process for a CPU (Linux).

    A process keeps some of what it frees, so that its figure is rough. None where it cannot be measured.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    try:
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        resident = _status("VmRSS")
    except (OSError, LookupError):
        return None
    run()
    return max(_status("VmHWM") - resident, 0)


def _give_back() -> None:
    """Let the C library return what was freed, or it would hide what is allocated next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """Bytes of one field of /proc/self/status."""
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(f"{field}:"):
            return int(entry.split()[1]) * 1024
    raise LookupError(field)


def write_csv(path: Path, table: Sequence[Mapping[str, object]]) -> None:
    """Write the rows, whole or not at all; a column that a row does not have stays empty."""
    make_folder(path.parent)
    write_whole(path, csv_text(table))
