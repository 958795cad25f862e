"""The report as one HTML page by itself: who leads, charts, cost, and where presets disagree."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlmattn import pages
from vlmattn.evals.environment import decoding_in_words
from vlmattn.evals.report.gallery import gallery
from vlmattn.evals.report.tables import bounds, by_suite, change, notes, p_value, spread, verdict, whiskers

if TYPE_CHECKING:
    from vlmattn.evals.runner import Result
    from vlmattn.evals.suites.base import Sample, Suite

    Maps = Mapping[tuple[str, str], Sequence[Any]]

_SIGNS = {True: "✓", False: "✗"}


def html_report(result: Result, attention: Maps | None = None) -> str:
    """The whole page.

    Args:
        attention: by suite and sample id, for each image what ``vlmattn.inspection.image_attention`` says, drawn over
            the images of the gallery.
    """
    summary, presets = result.summary, list(result.summary["recipes"])
    many = len(presets) > len(pages.COLOURS)  # bars could not be told apart
    colours = {preset: pages.COLOURS[0 if many else i] for i, preset in enumerate(presets)}
    parts = [
        _leaderboard(result, colours),
        *(_section(suite, result, colours, attention or {}) for suite in result.suites),
    ]
    warnings = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in notes(result))
    versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    machine = ", ".join(f"{name}: {value}" for name, value in summary["hardware"].items() if value)
    lines = (f"{name}: {each['interventions'] + each.get('pruning', [])}" for name, each in summary["recipes"].items())
    recipes = html.escape("\n\n".join(lines))
    command = f"<pre>{html.escape(summary['command'])}</pre>" if summary["command"] else ""
    body = f"""<h1>Does it hallucinate less?</h1>
<p>Model <b>{html.escape(summary["model"])}</b>, presets {", ".join(f"<b>{html.escape(p)}</b>" for p in presets)};
{html.escape(decoding_in_words(summary["decoding"]))}, the same samples and batches for all.
Differences are to <b>none</b>, with 95&nbsp;% intervals from a paired bootstrap over images;
p is McNemar's exact test. <span class="better">Green</span> and <span class="worse">red</span>: the interval
leaves out 0, which one interval in twenty does by chance alone.</p>
{warnings}{"".join(parts)}
<section><h2>How it was run</h2>{command}<p>{html.escape(versions)}<br>{html.escape(machine)}<br>seed {summary["seed"]},
batch size {summary["batch_size"]}, {html.escape(summary["dtype"])}, {summary["processes"]} process(es)</p>
<details><summary>Recipes</summary><pre>{recipes}</pre></details></section>"""
    return pages.document(f"vlmattn eval: {summary['model']}", body)


def _section(suite: Suite, result: Result, colours: Mapping[str, str], attention: Maps) -> str:
    """Chart, tables and examples of a suite."""
    conditions = [(condition, tables) for owner, condition, tables in by_suite(result) if owner is suite]
    many = len(set(colours.values())) < len(colours)
    chart = _differences(suite, result, list(colours)[1:]) if many else _chart(suite, conditions, colours)
    tables = "".join(_table(suite, condition, own, colours) for condition, own in conditions)
    return f"<section><h2>{html.escape(suite.title)}</h2>{chart}{tables}{_gallery(suite, result, attention)}</section>"


def _cell(cell: Mapping[str, Any], better: str, p: str = "") -> str:
    """A value with its interval, or with its difference to none."""
    small = change(cell) if "difference" in cell else spread(cell)
    test = f"<small>p {p}</small>" if p else ""
    return f"<td class='{verdict(cell, better)}'>{cell['value']:.1f}<small>{small}</small>{test}</td>"


def _leaderboard(result: Result, colours: Mapping[str, str]) -> str:
    """All presets by the first suite's headline metric, over all splits, with what they cost beside accuracy."""
    summary = result.summary
    heads = {suite.name: suite.headline for suite in result.suites}
    tables = summary["overall"]
    first = tables[0]
    better = heads[first["suite"]].better

    def place(preset: str) -> float:
        value = float(first["rows"][preset]["metrics"][heads[first["suite"]].name]["value"])
        return value if better == "lower" else -value

    columns = "".join(
        f"<th>{html.escape(table['suite'])}<small>{html.escape(table['condition'])}:"
        f" {html.escape(heads[table['suite']].name)}</small></th>"
        for table in tables
    )
    rows = []
    for preset in sorted(summary["recipes"], key=place):
        cells = [
            _cell(
                table["rows"][preset]["metrics"][heads[table["suite"]].name],
                heads[table["suite"]].better,
                p_value(table["rows"][preset]),
            )
            for table in tables
        ]
        rows.append(
            "<tr><th class='preset'><i"
            f" style='background:{colours[preset]}'></i>{html.escape(preset)}</th>{''.join(cells)}"
            f"{_cost_cells(summary['cost'], preset)}</tr>"
        )
    direction = {"higher": "the highest", "lower": "the lowest", "": "any"}[better]
    return (
        f"<section><h2>All presets</h2><p>Headline metrics over all splits; {direction}"
        f" {html.escape(heads[first['suite']].name)} of"
        f" {html.escape(first['suite'])}, {html.escape(first['condition'])}, comes first.</p><div"
        " class='wide'><table><thead><tr>"
        f"<th></th>{columns}<th>tokens/s</th><th>s/sample</th><th>memory</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f"</div>{_trade(result, colours)}</section>"
    )


def _cost_cells(costs: Mapping[str, Any], preset: str) -> str:
    """Speed, relative to none, and memory on top of the model, where it was measured."""
    own, base = costs[preset], costs["none"]
    ratio = ""
    if preset != "none" and own["tokens_per_second"] and base["tokens_per_second"]:
        ratio = f"<small>{own['tokens_per_second'] / base['tokens_per_second']:.2f}x</small>"
    speed = "" if own["tokens_per_second"] is None else f"{own['tokens_per_second']:.1f}"
    memory = "not measured" if own["peak_bytes"] is None else f"{own['peak_bytes'] / 1e9:.2f} GB"
    return f"<td>{speed}{ratio}</td><td>{own['seconds_per_sample']:.3f}</td><td>{memory}</td>"


def _trade(result: Result, colours: Mapping[str, str]) -> str:
    """Headline metrics against speed, as inline SVG."""
    from vlmattn.drawing import Figure

    costs, panels = result.summary["cost"], result.summary["overall"]
    presets = [preset for preset in result.summary["recipes"] if costs[preset]["tokens_per_second"]]
    if len(presets) < 2:
        return ""
    heads = {suite.name: suite.headline for suite in result.suites}
    drawn = []
    for table in panels:
        figure = Figure(figsize=(3.9, 2.9), layout="constrained")
        axis, metric = figure.subplots(), heads[table["suite"]]
        for preset in presets:
            cell, speed = table["rows"][preset]["metrics"][metric.name], costs[preset]["tokens_per_second"]
            axis.errorbar(
                speed, cell["value"], yerr=whiskers([cell]), fmt="o", ms=5, lw=1, capsize=2, color=colours[preset]
            )
            place = (speed, cell["value"])
            axis.annotate(preset, place, xytext=(4, 4), textcoords="offset points", fontsize=8, color="#444")
        axis.set_title(f"{table['suite']} {table['condition']}", fontsize=10)
        axis.set_xlabel("tokens per second", fontsize=9)
        axis.set_ylabel(f"{metric.name} ({metric.better} is better)" if metric.better else metric.name, fontsize=9)
        axis.margins(x=0.25)
        axis.grid(color="#ddd", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        drawn.append(pages.figure(figure))
    return (
        "<h3>What it costs <small>taken during the run, with the work of the processor; not a benchmark</small></h3>"
        f"<div class='panels'>{''.join(drawn)}</div>"
    )


def _table(suite: Suite, condition: str, tables: Sequence[dict[str, Any]], colours: Mapping[str, str]) -> str:
    head = "".join(f"<th title='{html.escape(m.about)}'>{html.escape(m.name)}</th>" for m in suite.metrics)
    rows = []
    for table in tables:
        for preset, row in table["rows"].items():
            cells = [_cell(row["metrics"][metric.name], metric.better) for metric in suite.metrics]
            label = (
                f"{html.escape(table['split'])}<small>{table['samples']} answers</small>" if preset == "none" else ""
            )
            dot = f"<i style='background:{colours[preset]}'></i>"
            changed = row.get("changed", "")
            first = " class='first'" if preset == "none" else ""
            rows.append(
                f"<tr{first}><th>{label}</th><th"
                f" class='preset'>{dot}{html.escape(preset)}</th>{''.join(cells)}"
                f"<td>{p_value(row)}</td><td>{changed}</td></tr>"
            )
    images = max(table["images"] for table in tables)
    return (
        f"<h3>{html.escape(condition)} <small>{images} images</small></h3><div"
        f" class='wide'><table><thead><tr><th></th><th></th>{head}<th title='McNemar'>p</th><th title='answers that"
        f" differ from none'>changed</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _chart(suite: Suite, conditions: Sequence[tuple[str, Sequence[dict[str, Any]]]], colours: Mapping[str, str]) -> str:
    """Headline metric with its intervals: one inline SVG per condition, all on one scale."""
    from vlmattn.drawing import Figure

    name, presets = suite.headline.name, list(colours)
    every = [
        table["rows"][preset]["metrics"][name] for _, tables in conditions for table in tables for preset in presets
    ]
    ends = [bounds(cell) or (cell["value"], cell["value"]) for cell in every]
    least, top = min(low for low, _ in ends), max(high for _, high in ends) * 1.04 or 1
    from_half = suite.headline.better == "higher" and least > 50  # chance
    drawn = []
    for condition, tables in conditions:
        figure = Figure(figsize=(max(3.9, 0.9 + 0.95 * len(tables)), 3.1), layout="constrained")
        axis = figure.subplots()
        _bars(axis, name, tables, colours)
        axis.set_title(condition, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#ddd", lw=0.6)
        axis.set_axisbelow(True)
        axis.set_ylim(50 if from_half else min(0, least), top)
        axis.set_ylabel(f"{name}, axis from 50" if from_half else name, fontsize=9)
        legend: dict[str, Any] = {
            "loc": "outside lower center",
            "ncols": min(len(colours), 4),
            "frameon": False,
            "fontsize": 8,
        }
        figure.legend(*axis.get_legend_handles_labels(), **legend)
        drawn.append(pages.figure(figure))
    return f"<div class='panels'>{''.join(drawn)}</div>"


def _bars(axis: Any, name: str, tables: Sequence[dict[str, Any]], colours: Mapping[str, str]) -> None:
    """A group of bars for each table, a bar for each preset, with their intervals."""
    width, crowded = 0.8 / len(colours), len(tables) > 4
    for number, (preset, colour) in enumerate(colours.items()):
        cells = [table["rows"][preset]["metrics"][name] for table in tables]
        places = [i + (number - (len(colours) - 1) / 2) * width for i in range(len(tables))]
        look: dict[str, Any] = {"yerr": whiskers(cells), "ecolor": "#222", "capsize": 2, "error_kw": {"lw": 1}}
        axis.bar(places, [cell["value"] for cell in cells], width * 0.92, color=colour, label=preset, **look)
    look = {"rotation": 30, "ha": "right", "fontsize": 8} if crowded else {"ha": "center", "fontsize": 9}
    axis.set_xticks(range(len(tables)), [table["split"] for table in tables], **look)


def _differences(suite: Suite, result: Result, presets: Sequence[str]) -> str:
    """Headline metric of many presets: differences to none over all splits with their intervals, as inline SVG."""
    from vlmattn.drawing import Figure

    panels = [table for table in result.summary["overall"] if table["suite"] == suite.name]
    figure = Figure(figsize=(2.4 + 3.6 * len(panels), 1.2 + 0.21 * len(presets)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    metric = suite.headline
    for axis, table in zip(axes, panels, strict=True):
        for place, preset in enumerate(presets):
            cell = table["rows"][preset]["metrics"][metric.name]
            d = cell["difference"]
            colour = {"better": "#009E73", "worse": "#D55E00", "": "#777777"}[verdict(cell, metric.better)]
            axis.errorbar(d["value"], place, xerr=whiskers([d]), fmt="o", ms=4, lw=1.2, capsize=2, color=colour)
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


def _gallery(suite: Suite, result: Result, attention: Maps) -> str:
    chosen = gallery(suite, result)
    if not chosen:
        return "<p class='note'>No answer became right or wrong by any preset.</p>"
    seen = any((suite.name, sample.id) in attention for sample in chosen)
    about = "; red: where the bare model looks when it answers" if seen else ""
    cards = "".join(_card(suite, result, sample, attention.get((suite.name, sample.id), ())) for sample in chosen)
    return (
        f"<h3>Where presets disagree <small>{len(chosen)} questions that a preset answers rightly and none wrongly, or"
        f" the other way round{about}</small></h3><div class='cards'>{cards}</div>"
    )


def _card(suite: Suite, result: Result, sample: Sample, maps: Sequence[Any]) -> str:
    """One question: its images, and who said what."""
    scored = result.scored[suite.name]
    pictures = sample.images()
    if len(maps) != len(pictures):  # not measured, or parts of an image counted as images
        maps = [()] * len(pictures)
    shown = [
        pages.image(picture) + (pages.image(pages.heated(picture, own)) if own else "")
        for picture, own in zip(pictures, maps, strict=True)
    ]
    said: dict[tuple[str, bool], list[str]] = {}
    for preset in result.summary["recipes"]:
        said.setdefault((result.answers[suite.name, preset, sample.id], scored.right(preset, sample)), []).append(
            preset
        )
    lines = "".join(
        f"<p class='{'better' if right else 'worse'}'>{_SIGNS[right]} <b>{html.escape(', '.join(names))}</b>:"
        f" {html.escape(text)}</p>"
        for (text, right), names in said.items()
    )
    repaired = not scored.right("none", sample)
    return (
        "<div class='card"
        f" {'repaired' if repaired else 'broken'}'>{''.join(shown)}<p><b>{html.escape(sample.prompt)}</b><br>"
        f"{html.escape(sample.condition)}; truth: {html.escape(suite.expected(sample))}</p>{lines}</div>"
    )
