"""Shows a result: a table for the terminal, and a markdown table; the page is in page.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from vlmattn.evals.environment import decoding_in_words
from vlmattn.evals.stats import FEWEST
from vlmattn.pages import markdown_cell

if TYPE_CHECKING:
    from vlmattn.evals.runner import Result
    from vlmattn.evals.suites.base import Suite


def by_suite(result: Result) -> Iterator[tuple[Suite, str, list[dict[str, Any]]]]:
    """(suite, condition, its tables), in the order of the run."""
    for suite in result.suites:
        conditions = dict.fromkeys(t["condition"] for t in result.summary["tables"] if t["suite"] == suite.name)
        for condition in conditions:
            yield (
                suite,
                condition,
                [t for t in result.summary["tables"] if (t["suite"], t["condition"]) == (suite.name, condition)],
            )


#: Of a verdict on a terminal.
STYLES = {"better": "green", "worse": "red", "": ""}


def _number(value: float) -> str:
    return f"{value:.1f}"


def bounds(cell: Mapping[str, Any]) -> tuple[float, float] | None:
    """The ends of the interval of a value or a difference, None if it has none."""
    return None if cell["low"] is None or cell["high"] is None else (float(cell["low"]), float(cell["high"]))


def whiskers(cells: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far the intervals of values reach below and above them, for error bars; 0 where there are none."""
    ends = [bounds(cell) or (cell["value"], cell["value"]) for cell in cells]
    below = [cell["value"] - low for cell, (low, _) in zip(cells, ends, strict=True)]
    above = [high - cell["value"] for cell, (_, high) in zip(cells, ends, strict=True)]
    return [below, above]


def spread(cell: Mapping[str, Any]) -> str:
    """The interval of a value, or that there is none."""
    ends = bounds(cell)
    return "no interval" if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}"


def change(cell: Mapping[str, Any]) -> str:
    """A difference to ``none`` with its interval."""
    d = cell["difference"]
    ends = bounds(d)
    return f"{d['value']:+.1f} " + ("(no interval)" if ends is None else f"[{ends[0]:+.1f}, {ends[1]:+.1f}]")


def verdict(cell: Mapping[str, Any], better: str) -> str:
    """ "better" or "worse" when the interval of the difference leaves out 0, else ""; ``better`` is the metric's."""
    d = cell.get("difference")
    ends = None if d is None else bounds(d)
    if d is None or ends is None or not better or ends[0] <= 0 <= ends[1]:
        return ""
    return "better" if (d["value"] > 0) == (better == "higher") else "worse"


def p_value(row: dict[str, Any]) -> str:
    """McNemar's p as papers print it, "" for ``none``."""
    p = row.get("mcnemar_p")
    return "" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def _heading(suite: Suite, condition: str, tables: Sequence[dict[str, Any]]) -> str:
    images, samples = (max(table[name] for table in tables) for name in ("images", "samples"))
    return f"{suite.title}\n{condition} · {images} images, {samples} answers"


def figures_table(
    columns: Sequence[str], title: str | None = None, first: str = "", fold: bool = False, **more: Any
) -> RichTable:
    """A table for the terminal: a column of names (folded where it is too wide, if ``fold``), and columns of figures.

    Names of data in the title are no markup.
    """
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    view = RichTable(title=None if title is None else Text(title), **look, **more)
    view.add_column(first, no_wrap=not fold, overflow="fold")
    for name in columns:
        view.add_column(name, justify="right", no_wrap=True)
    return view


def terminal_tables(result: Result) -> Group:
    """One table per suite and condition: headline metric, its difference to ``none``, McNemar's p, the other metrics.

    Fits into 80 columns.
    """
    blocks: list[RichTable | Text] = []
    for suite, condition, tables in by_suite(result):
        others = [metric.short for metric in suite.metrics[1:]]
        columns = [suite.headline.short, "difference [95 % CI]", "p", *others]
        view = figures_table(columns, _heading(suite, condition, tables))
        for table in tables:
            view.add_row(Text(table["split"], style="bold"))
            for preset, row in table["rows"].items():
                cells, first = row["metrics"], row["metrics"][suite.headline.name]
                difference = "" if preset == "none" else change(first)
                view.add_row(
                    Text(f" {preset}"),  # names such as pai[alpha=0.3] are no markup
                    _number(first["value"]),
                    Text(difference, style=STYLES[verdict(first, suite.headline.better)]),
                    p_value(row),
                    *(_number(cells[metric.name]["value"]) for metric in suite.metrics[1:]),
                )
        blocks.append(view)
    blocks += [Text(note, style="yellow") for note in notes(result)]
    return Group(*blocks)


def notes(result: Result) -> list[str]:
    """What a reader must know beside the figures."""
    found = []
    if (how := decoding_in_words(result.summary["decoding"])) != "greedy decoding":
        found.append(f"All answers: {how}, as the model's generation config says.")
    for preset, report in result.summary["reports"].items():
        idle = [name for name, count in report["fired"].items() if not count]
        if idle:
            found.append(
                f"{preset}: {', '.join(idle)} never found anything to do on this model and had no part in the answers."
            )
    if skipped := result.summary["skipped"]:
        found.append(
            f"{len(skipped)} questions are left out for all presets, their images cannot be read: {skipped[0]['why']}"
            + (f", and others ({len(skipped)} in summary.json)" if len(skipped) > 1 else "")
        )
    if cut := {preset: cost["cut_batches"] for preset, cost in result.summary["cost"].items() if cost["cut_batches"]}:
        parts = ", ".join(f"{preset} {count}" for preset, count in cut.items())
        found.append(
            f"Memory was short: batches were answered in parts ({parts}), so not all presets had the same batches;"
            " answers may differ by rounding. A smaller --batch-size avoids it."
        )
    if any(bounds(each) is None for each in _intervals(result.summary)):
        found.append(
            f"No interval: fewer than {FEWEST} images, or all of them agree; resampling them cannot say how"
            " sure such a figure is."
        )
    return found


def _intervals(summary: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All values and differences of a summary."""
    for table in (*summary["tables"], *summary["overall"]):
        for row in table["rows"].values():
            for cell in row["metrics"].values():
                yield cell
                if "difference" in cell:
                    yield cell["difference"]


def markdown_tables(result: Result) -> str:
    """The same tables in markdown: for a README."""
    lines = []
    for suite, condition, tables in by_suite(result):
        others = [metric.name for metric in suite.metrics[1:]]
        header = ["", "preset", suite.headline.name, "difference [95 % CI]", "p", *others]
        lines += [f"**{markdown_cell(_heading(suite, condition, tables))}**", "", "| " + " | ".join(header) + " |"]
        lines.append("|" + "|".join(["---", "---", *["---:"] * (len(header) - 2)]) + "|")
        for table in tables:
            for preset, row in table["rows"].items():
                values = [f"{row['metrics'][name]['value']:.1f}" for name in (suite.headline.name, *others)]
                label = f"{markdown_cell(table['split'])} ({table['samples']})" if preset == "none" else ""
                difference = "" if preset == "none" else change(row["metrics"][suite.headline.name])
                cells = [label, markdown_cell(preset), values[0], difference, p_value(row), *values[1:]]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *map(markdown_cell, notes(result))]).strip() + "\n"
