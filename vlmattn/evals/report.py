"""Shows a result: a table for the terminal, a markdown table, and one HTML page that needs nothing from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from vlmattn import pages

if TYPE_CHECKING:
    from vlmattn.evals.runner import Result
    from vlmattn.evals.suites.base import Suite

_EXAMPLES = 3  # repaired and broken answers each, per preset and suite


def _by_suite(result: Result) -> Iterator[tuple[Suite, str, list[dict[str, Any]]]]:
    """(suite, condition, its tables), in the order of the run."""
    for suite in result.suites:
        conditions = dict.fromkeys(t["condition"] for t in result.summary["tables"] if t["suite"] == suite.name)
        for condition in conditions:
            yield (
                suite,
                condition,
                [t for t in result.summary["tables"] if (t["suite"], t["condition"]) == (suite.name, condition)],
            )


def _number(value: float) -> str:
    return f"{value:.1f}"


def change(cell: dict[str, Any]) -> str:
    """A difference to ``none`` with its interval."""
    d = cell["difference"]
    return f"{d['value']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]"


def verdict(cell: dict[str, Any], better: str) -> str:
    """ "better" or "worse" when the interval of the difference leaves out 0, else ""; ``better`` is the metric's."""
    d = cell.get("difference")
    if d is None or not better or d["low"] <= 0 <= d["high"]:
        return ""
    return "better" if (d["value"] > 0) == (better == "higher") else "worse"


def p_value(row: dict[str, Any]) -> str:
    """McNemar's p as papers print it, "" for ``none``."""
    p = row.get("mcnemar_p")
    return "" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def _heading(suite: Suite, condition: str, tables: Sequence[dict[str, Any]]) -> str:
    images, samples = (max(table[name] for table in tables) for name in ("images", "samples"))
    return f"{suite.title}\n{condition} · {images} images, {samples} answers"


def terminal_tables(result: Result) -> Group:
    """One table per suite and condition: headline metric, its difference to ``none``, McNemar's p, the other metrics.

    Fits into 80 columns.
    """
    blocks: list[RichTable | Text] = []
    style = {"better": "green", "worse": "red", "": ""}
    for suite, condition, tables in _by_suite(result):
        view = RichTable(
            title=_heading(suite, condition, tables),
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        view.add_column("", no_wrap=True)
        for name in (
            suite.headline.short,
            "difference [95 % CI]",
            "p",
            *(metric.short for metric in suite.metrics[1:]),
        ):
            view.add_column(name, justify="right", no_wrap=True)
        for table in tables:
            view.add_row(Text(table["split"], style="bold"))
            for preset, row in table["rows"].items():
                cells, first = row["metrics"], row["metrics"][suite.headline.name]
                difference = "" if preset == "none" else change(first)
                view.add_row(
                    Text(f" {preset}"),  # names such as pai[alpha=0.3] are no markup
                    _number(first["value"]),
                    Text(difference, style=style[verdict(first, suite.headline.better)]),
                    p_value(row),
                    *(_number(cells[metric.name]["value"]) for metric in suite.metrics[1:]),
                )
        blocks.append(view)
    blocks += [Text(note, style="yellow") for note in notes(result)]
    return Group(*blocks)


def notes(result: Result) -> list[str]:
    """What a reader must know beside the figures."""
    found = []
    for preset, report in result.summary["reports"].items():
        idle = [name for name, count in report["fired"].items() if not count]
        if idle:
            found.append(
                f"{preset}: {', '.join(idle)} never found anything to do on this model and had no part in the answers."
            )
    return found


def markdown_tables(result: Result) -> str:
    """The same tables in markdown: for a README."""
    lines = []
    for suite, condition, tables in _by_suite(result):
        others = [metric.name for metric in suite.metrics[1:]]
        header = ["", "preset", suite.headline.name, "difference [95 % CI]", "p", *others]
        lines += [
            f"**{_heading(suite, condition, tables).replace(chr(10), chr(32))}**",
            "",
            "| " + " | ".join(header) + " |",
        ]
        lines.append("|" + "|".join(["---", "---", *["---:"] * (len(header) - 2)]) + "|")
        for table in tables:
            for preset, row in table["rows"].items():
                cells = row["metrics"]
                first = cells[suite.headline.name]
                label = f"{table['split']} ({table['samples']})" if preset == "none" else ""
                difference = "" if preset == "none" else change(first)
                values = [f"{cells[name]['value']:.1f}" for name in others]
                lines.append(
                    "| "
                    + " | ".join([label, preset, f"{first['value']:.1f}", difference, p_value(row), *values])
                    + " |"
                )
        lines.append("")
    return "\n".join([*lines, *notes(result)]).strip() + "\n"


def html_report(result: Result) -> str:
    """The whole report as one page: tables, charts with intervals, examples where presets disagree."""
    summary, parts = result.summary, []
    presets = list(summary["recipes"])
    many = len(presets) > len(pages.COLOURS)  # bars could not be told apart
    colours = {preset: pages.COLOURS[0 if many else i] for i, preset in enumerate(presets)}
    for suite in result.suites:
        parts.append(f"<section><h2>{html.escape(suite.title)}</h2>")
        if many:
            parts.append(_differences(suite, result, presets[1:]))
        else:
            parts.append(_chart(suite, [(c, t) for s, c, t in _by_suite(result) if s is suite], colours))
        for owner, condition, tables in _by_suite(result):
            if owner is suite:
                parts.append(_html_table(suite, condition, tables, colours))
        parts.append(_examples(suite, result, presets[1:]))
        parts.append("</section>")
    warnings = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in notes(result))
    versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    machine = ", ".join(f"{name}: {value}" for name, value in summary["hardware"].items() if value)
    recipes = html.escape(
        "\n\n".join(
            f"{name}: {recipe['interventions'] + recipe.get('pruning', [])}"
            for name, recipe in summary["recipes"].items()
        )
    )
    body = f"""<h1>Does it hallucinate less?</h1>
<p>Model <b>{html.escape(summary["model"])}</b>, presets {", ".join(f"<b>{html.escape(p)}</b>" for p in presets)}; greedy decoding,
the same samples and batches for all. Differences are to <b>none</b>, with 95&nbsp;% intervals from a paired bootstrap over images;
p is McNemar's exact test. <span class="better">Green</span> and <span class="worse">red</span>: the interval leaves out 0, which
one interval in twenty does by chance alone.</p>
{warnings}{"".join(parts)}
<section><h2>How it was run</h2><p>{html.escape(versions)}<br>{html.escape(machine)}<br>seed {summary["seed"]},
batch size {summary["batch_size"]}, {html.escape(summary["dtype"])}</p>
<details><summary>Recipes</summary><pre>{recipes}</pre></details></section>"""
    return pages.document(f"vlmattn eval: {summary['model']}", body)


def _html_table(suite: Suite, condition: str, tables: Sequence[dict[str, Any]], colours: dict[str, str]) -> str:
    head = "".join(f"<th title='{html.escape(m.about)}'>{m.name}</th>" for m in suite.metrics)
    rows = []
    for table in tables:
        for preset, row in table["rows"].items():
            cells = []
            for metric in suite.metrics:
                cell = row["metrics"][metric.name]
                small = f"{cell['low']:.1f} to {cell['high']:.1f}" if preset == "none" else change(cell)
                cells.append(
                    f"<td class='{verdict(cell, metric.better)}'>{_number(cell['value'])}<small>{small}</small></td>"
                )
            label = (
                f"{html.escape(table['split'])}<small>{table['samples']} answers</small>" if preset == "none" else ""
            )
            dot = f"<i style='background:{colours[preset]}'></i>"
            changed = row.get("changed", "")
            first = " class='first'" if preset == "none" else ""
            rows.append(
                f"<tr{first}><th>{label}</th><th class='preset'>{dot}{html.escape(preset)}</th>{''.join(cells)}<td>{p_value(row)}</td><td>{changed}</td></tr>"
            )
    images = max(table["images"] for table in tables)
    return (
        f"<h3>{html.escape(condition)} <small>{images} images</small></h3><div class='wide'><table><thead><tr><th></th><th></th>{head}"
        f"<th title='McNemar'>p</th><th title='answers that differ from none'>changed</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _chart(suite: Suite, conditions: Sequence[tuple[str, Sequence[dict[str, Any]]]], colours: dict[str, str]) -> str:
    """Headline metric with its intervals, as inline SVG."""
    from matplotlib.figure import Figure

    panels = len(conditions)
    figure = Figure(figsize=(max(4.0, 3.6 * panels), 3.0), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    lowest = 100.0
    for axis, (condition, tables) in zip(axes, conditions, strict=True):
        width = 0.8 / len(colours)
        for number, (preset, colour) in enumerate(colours.items()):
            cells = [table["rows"][preset]["metrics"][suite.headline.name] for table in tables]
            values = [cell["value"] for cell in cells]
            errors = [
                [v - c["low"] for v, c in zip(values, cells, strict=True)],
                [c["high"] - v for v, c in zip(values, cells, strict=True)],
            ]
            places = [i + (number - (len(colours) - 1) / 2) * width for i in range(len(tables))]
            axis.bar(
                places,
                values,
                width * 0.92,
                color=colour,
                yerr=errors,
                ecolor="#222",
                capsize=2,
                label=preset,
                error_kw={"lw": 1},
            )
            lowest = min(lowest, *(cell["low"] for cell in cells))
        axis.set_xticks(range(len(tables)), [table["split"] for table in tables])
        axis.set_title(condition, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#ddd", lw=0.6)
        axis.set_axisbelow(True)
    axes[0].set_ylabel(f"{suite.headline.name} (%)")
    if suite.headline.better == "higher" and lowest > 50:
        axes[0].set_ylim(bottom=50)  # chance
        axes[0].set_ylabel(f"{suite.headline.name} (%), axis from 50")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(colours),
        frameon=False,
        fontsize=9,
    )
    return pages.figure(figure)


def _differences(suite: Suite, result: Result, presets: Sequence[str]) -> str:
    """Headline metric of many presets: differences to none over all splits with their intervals, as inline SVG."""
    from matplotlib.figure import Figure

    panels = [table for table in result.summary["overall"] if table["suite"] == suite.name]
    figure = Figure(figsize=(2.4 + 3.6 * len(panels), 1.2 + 0.21 * len(presets)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    metric = suite.headline
    for axis, table in zip(axes, panels, strict=True):
        for place, preset in enumerate(presets):
            cell = table["rows"][preset]["metrics"][metric.name]
            d = cell["difference"]
            colour = {"better": "#009E73", "worse": "#D55E00", "": "#777777"}[verdict(cell, metric.better)]
            spread = [[d["value"] - d["low"]], [d["high"] - d["value"]]]
            axis.errorbar(d["value"], place, xerr=spread, fmt="o", ms=4, lw=1.2, capsize=2, color=colour)
        axis.axvline(0, color="#222", lw=0.8)
        axis.set_xscale("symlog", linthresh=5)
        axis.set_xticks(
            ticks := [-50, -20, -5, -2, 0, 2, 5, 20, 50], [f"{t:+d}" if t else "0" for t in ticks], fontsize=8
        )
        axis.set_title(
            f"{table['condition']}, none: {table['rows']['none']['metrics'][metric.name]['value']:.1f}", fontsize=10
        )
        axis.set_xlabel(f"{metric.name}, difference to none ({metric.better} is better)", fontsize=9)
        axis.grid(axis="x", color="#ddd", lw=0.6)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_yticks(range(len(presets)), presets, fontsize=8)
    axes[0].set_ylim(len(presets) - 0.5, -0.5)
    return pages.figure(figure)


def _examples(suite: Suite, result: Result, presets: Sequence[str]) -> str:
    cards = []
    for preset in presets:
        found: dict[str, list[str]] = {"repaired": [], "broken": []}
        for sample in suite.samples():
            bare, edited = (result.answers[suite.name, name, sample.id] for name in ("none", preset))
            was, now = (suite.right(suite.score(sample, text)) for text in (bare, edited))
            kind = "repaired" if now and not was else "broken" if was and not now else ""
            if kind and len(found[kind]) < _EXAMPLES:
                pictures = "".join(pages.image(picture) for picture in sample.images())
                found[kind].append(
                    f"<div class='card {kind}'>{pictures}<p><b>{html.escape(sample.prompt)}</b><br>{html.escape(sample.condition)};"
                    f" truth: {html.escape(suite.expected(sample))}</p><p>none: {html.escape(bare)}</p>"
                    f"<p>{html.escape(preset)}: {html.escape(edited)} <em>{kind}</em></p></div>"
                )
        cards += found["repaired"] + found["broken"]
    if not cards:
        return "<p class='note'>No answer became right or wrong by any preset.</p>"
    return f"<h3>Where presets disagree <small>the first {_EXAMPLES} repaired and broken answers of each</small></h3><div class='cards'>{''.join(cards)}</div>"
