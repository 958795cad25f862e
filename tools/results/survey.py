"""A page on many presets: one row each, from the summary of a finished ``vlmattn eval``.

    python -m tools.results.survey --run runs/all --out docs/results/embedded.md

``--run`` may be given again, for other presets on the same questions. Every figure on the page is read from the runs'
``summary.json`` (a folder or the file itself) and answers, from the table of ``vlmattn bench`` (``--bench``) and from
what ``vlmattn tune`` wrote (``--tuned``), or counted from what is there.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlmattn.decoding  # noqa: F401  (its methods have names too)
from tools.results.controls import AT_RANDOM, against_controls, controls_of
from tools.results.drawing import forest
from vlmattn.errors import InputError, VlmattnError
from vlmattn.evals.bench import FIRST, STEP
from vlmattn.evals.compare import Compared
from vlmattn.evals.environment import decoding_in_words
from vlmattn.evals.report import change, p_value, verdict
from vlmattn.files import write_whole
from vlmattn.options import checked_against, paper_id
from vlmattn.registry import all_presets, find_method
from vlmattn.texts import read_json, read_text

FEWER_TOKENS = "<!-- fewer image tokens: written by tools.results.curve -->"  # begins a section that is kept
_LEVEL = 0.05  # of the 95 % intervals in the summary
_SAME = ("model", "weights", "dtype", "suites", "decoding", "seed", "versions", "batch_size", "metrics")
_TUNED = ("preset", "grid", "samples", "suite", "seed", "none", "chosen", "settings", "metric", "command", "notes")
_NEEDED = {"overall", "metrics", "titles", "recipes", "reports", "cost"}


@dataclass(frozen=True)
class Comparison:
    """One metric of one preset against ``none``, over all samples of a suite's condition.

    ``verdict`` is "better" or "worse" when the interval of the difference leaves out 0, else "".
    """

    preset: str
    where: str
    metric: str
    headline: bool
    verdict: str
    changed: int
    p: float


def read_run(folder: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        InputError: there is none, or it is of a version that did not write what the page needs.
    """
    path = folder if folder.suffix == ".json" else folder / "summary.json"
    if not path.exists():
        raise InputError(f"cannot read {path}: no such file; finish the run with vlmattn eval first")
    try:
        summary = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; run vlmattn eval again, it keeps the answers") from None
    if not isinstance(summary, dict) or (missing := sorted(_NEEDED - summary.keys())):
        lacking = "" if not isinstance(summary, dict) else f" ({', '.join(missing)} missing)"
        raise InputError(f"{path}: not of this version{lacking}; run vlmattn eval again, it keeps the answers")
    return summary


def read_tuned(path: Path) -> dict[str, Any]:
    """What ``vlmattn tune`` wrote into ``tune.json``.

    Raises:
        InputError: it did not.
    """
    try:
        record = read_json(path)
        return {name: record[name] for name in _TUNED}
    except (InputError, KeyError, TypeError):
        raise InputError(f"{path}: not a tune.json; run vlmattn tune first, its --out has one") from None


def joined(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Runs of other presets on the same questions as one; of presets that several have, the first counts.

    Raises:
        InputError: another model, other questions, settings or versions; ``none`` is not the same.
    """
    first, *others = summaries
    whole = copy.deepcopy(dict(first))
    for other in others:
        for name in _SAME:
            if other[name] != first[name]:
                raise InputError(f"the runs cannot be on one page: their {name} are different")
        for table, more in zip(whole["overall"], other["overall"], strict=True):
            if table["rows"]["none"] != more["rows"]["none"]:
                raise InputError("the runs cannot be on one page: the bare model does not say the same in both")
            _add(table["rows"], more["rows"])
        for name in ("recipes", "reports", "cost"):
            _add(whole[name], other[name])
    if others:
        whole["command"] = "`, `".join(str(summary.get("command") or "from Python") for summary in summaries)
    return whole


def _add(known: dict[str, Any], more: Mapping[str, Any]) -> None:
    """What is new, behind what is there."""
    known.update({name: value for name, value in more.items() if name not in known})


def comparisons(summary: Mapping[str, Any]) -> list[Comparison]:
    """All metrics that have a better side, of all presets and conditions."""
    return [
        Comparison(
            preset,
            where,
            metric["name"],
            number == 0,
            verdict(row["metrics"][metric["name"]], metric["better"]),
            row["changed"],
            row["mcnemar_p"],
        )
        for table, where in _columns(summary)
        for preset, row in table["rows"].items()
        if preset != "none"
        for number, metric in enumerate(summary["metrics"][table["suite"]])
        if metric["better"]
    ]


def _columns(summary: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for table in summary["overall"]:
        yield table, f"{table['suite']} {table['condition']}"


def table_of_presets(summary: Mapping[str, Any], costs: Mapping[str, str] | None = None) -> str:
    """One row per preset: where it is from, the headline metrics and their differences, whether it fired, its cost."""
    header = ["preset", "method", "paper", "checked against"]
    header += [f"{where}: {_headline(summary, table['suite'])}" for table, where in _columns(summary)]
    header += ["fired", "cost"] if costs else ["fired"]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] * len(header)) + "|"]
    for preset in summary["recipes"]:
        cells = [f"`{preset}`", *_origin(preset, summary["recipes"][preset])]
        cells += [_figures(summary, table, preset) for table, _ in _columns(summary)]
        cells += ["" if preset == "none" else _fired(summary, preset), *([costs.get(preset, "")] if costs else [])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _headline(summary: Mapping[str, Any], suite: str) -> str:
    first = summary["metrics"][suite][0]
    return str(first["name"]) + (f" ({first['better']} is better)" if first["better"] else "")


def _figures(summary: Mapping[str, Any], table: Mapping[str, Any], preset: str) -> str:
    metric, row = summary["metrics"][table["suite"]][0], table["rows"][preset]
    cell = row["metrics"][metric["name"]]
    if preset == "none":
        return f"{cell['value']:.1f}"
    found = verdict(cell, metric["better"])
    difference = f"**{change(cell)}** {found}" if found else change(cell)
    return f"{cell['value']:.1f}<br>{difference}<br>p {p_value(row)}, {row['changed']} changed"


def _origin(preset: str, recipe: Mapping[str, Any]) -> list[str]:
    """Cells: methods, papers, what the preset was checked against."""
    rule = recipe.get("decoding")
    edits = (*recipe["interventions"], *recipe.get("pruning", ()))
    methods = [item["method"] for item in (*edits, *([rule] if isinstance(rule, dict) else []))]
    if not methods:
        return ["a rule made by hand", "", "own settings"] if rule else ["the bare model", "", ""]
    infos = [find_method(name).info for name in methods]
    papers = []
    for info in infos:
        number = paper_id(info.paper)
        papers.append(info.paper if number == info.paper else f"[{number}](https://arxiv.org/abs/{number})")
    known, parts = all_presets(), preset.split("+")
    checked = ["own settings"]
    if len(parts) == len(infos) and all(part in known for part in parts):
        checked = [checked_against(known[part].about, info.faithful) for part, info in zip(parts, infos, strict=True)]
    return [" + ".join(dict.fromkeys(cells)) for cells in (methods, papers, checked)]


def _fired(summary: Mapping[str, Any], preset: str) -> str:
    fired = summary["reports"][preset]["fired"]
    counts = {name: str(count) if count else "never fired" for name, count in fired.items()}
    return next(iter(counts.values())) if len(counts) == 1 else ", ".join(f"{k}: {v}" for k, v in counts.items())


def times(summary: Mapping[str, Any]) -> dict[str, str]:
    """Preset -> seconds a sample of the run, relative to ``none``."""
    seconds = {preset: cost["seconds_per_sample"] for preset, cost in summary["cost"].items()}
    base = seconds["none"]
    return {
        preset: f"{base:.3g} s a sample" if preset == "none" else f"{own / base:.2f}x"
        for preset, own in seconds.items()
    }


def _cost(row: Mapping[str, str]) -> str:
    """A row of ``vlmattn bench``."""
    if row["candidate"] == "none":
        return f"{float(row['median']):.0f} ms"
    return f"{float(row['ratio']):.2f}x [{float(row['ratio_q1']):.2f}, {float(row['ratio_q3']):.2f}]"


def bench_costs(paths: Sequence[Path]) -> tuple[dict[str, str], str]:
    """Preset -> ratios to ``none`` from tables of ``vlmattn bench``, and in words how they were measured.

    Raises:
        InputError: no such table.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    settings: dict[str, None] = {}
    for path in paths:
        try:
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["unit"] == "ms"]
            for row in rows:
                found.setdefault(row["candidate"], {})[row["what"]] = row
                settings[
                    f"one prompt of {row['prompt_tokens']} tokens, {row['image_tokens']} of them of the image, answers"
                    f" of {row['new_tokens']}, {row['dtype']}, {row['n']} rounds, threads: {row['threads']}"
                ] = None
        except (OSError, KeyError):
            raise InputError(f"{path}: not a table of vlmattn bench; make it with vlmattn bench --out {path}") from None
    costs = {}
    for preset, of in found.items():
        shown = {FIRST: "first token", STEP: "step"} if FIRST in of else {name: name for name in of}
        costs[preset] = "<br>".join(f"{label} {_cost(of[name])}" for name, label in shown.items())
    return costs, "; ".join(settings)


def _idle(summary: Mapping[str, Any], preset: str) -> bool:
    """Whether no method of the preset ever found anything to do."""
    return not any(summary["reports"][preset]["fired"].values())


def findings(summary: Mapping[str, Any]) -> str:
    """Which presets help or hurt where, how many comparisons that took, and what chance alone would give."""
    made = comparisons(summary)
    first = [c for c in made if c.headline]
    parts = ["By the headline metrics (the interval of the difference leaves out 0):", "", *_list(summary, first)]
    rest = [c for c in made if not c.headline]
    if rest:
        parts += ["", "By the other metrics of the same answers:", "", *_list(summary, rest)]
    return "\n".join([*parts, "", _chance(first, rest)])


def _list(summary: Mapping[str, Any], made: list[Comparison]) -> list[str]:
    presets = list(dict.fromkeys(c.preset for c in made))
    lines = []
    for label, kind in (("helps", "better"), ("hurts", "worse")):
        named = []
        for preset in presets:
            where = [_place(summary, c) for c in made if c.preset == preset and c.verdict == kind]
            if where:
                named.append(f"`{preset}` ({', '.join(where)})")
        lines.append(f"- {label}: {'; '.join(named) or 'none of them'}")
    decided = {c.preset for c in made if c.verdict}
    neither = [p for p in presets if p not in decided and not _idle(summary, p)]
    idle = [p for p in presets if _idle(summary, p)]
    lines.append(f"- neither: {', '.join(f'`{p}`' for p in neither) or 'none of them'}")
    if idle:
        names = ", ".join(f"`{p}`" for p in idle)
        lines.append(
            f"- never fired, so the figures are the bare model's, but for rounding, and say nothing about it: {names}"
        )
    return lines


def _place(summary: Mapping[str, Any], c: Comparison) -> str:
    """Where a finding is; of a better headline also what it cost: who says less invents less."""
    others = [o.metric for o in comparisons(summary) if (o.preset, o.where, o.verdict) == (c.preset, c.where, "worse")]
    price = f", but {' and '.join(others)} worse" if c.headline and c.verdict == "better" and others else ""
    return f"{c.where}: {c.metric}{price}"


def _chance(first: list[Comparison], rest: list[Comparison]) -> str:
    """The warning about many comparisons."""

    def count(made: list[Comparison]) -> str:
        tested, found = sum(bool(c.changed) for c in made), sum(bool(c.verdict) for c in made)
        return (
            f"{len(made)} comparisons with `none`, {tested} of them with an answer changed; {found} intervals leave"
            f" out 0, and about {_LEVEL * tested:.1f} would by chance alone if no preset did anything"
        )

    others = f" Other metrics: {count(rest)}." if rest else ""
    bound = _LEVEL / max(len(first), 1)
    left = "; ".join(f"`{c.preset}` ({c.where}, {c.verdict or 'interval with 0'})" for c in first if c.p < bound)
    return (
        f"**Many comparisons.** Headline metrics: {count(first)}.{others} Presets of one method, metrics of one suite"
        " and suites on the same images are not independent. Take a single finding for a hint, not for proof."
        f" McNemar's tests of right and wrong answers with p below {_LEVEL:g} / {len(first)} = {bound:.2g}"
        f" (Bonferroni): {left or 'none of them'}."
    )


def controls_section(summary: Mapping[str, Any], found: Mapping[tuple[str, str], Sequence[Compared]]) -> str:
    """Presets against their controls, and which gains survive them."""
    where = [name for _, name in _columns(summary)]
    header = ["preset", "control", *(f"{table['suite']} {table['condition']}" for table, _ in _columns(summary))]
    lines = [
        "A control does as much at random, or does only a part. Differences are preset minus control, with 95 %"
        " intervals, paired over images, and bold where the interval leaves out 0.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "|".join(["---"] * len(header)) + "|",
    ]
    for (preset, control), rows in found.items():
        cells = {f"{row.suite} {row.condition}": _against(row) for row in rows}
        lines.append(
            "| " + " | ".join([f"`{preset}`", f"`{control}`", *(cells.get(name, "") for name in where)]) + " |"
        )
    helps = [c for c in comparisons(summary) if c.headline and c.verdict == "better"]
    groups: dict[str, list[str]] = {"survive": [], "fall": [], "control": [], "without": []}
    for c in helps:
        beaten = [
            row.verdict == "better"
            for (preset, _), rows in found.items()
            for row in rows
            if preset == c.preset and f"{row.suite} {row.condition}" == c.where
        ]
        if c.preset in AT_RANDOM:
            group = "control"
        elif len(beaten) == len(controls_of(c.preset, summary["recipes"][c.preset])) > 0:
            group = "survive" if all(beaten) else "fall"
        else:
            group = "without"
        groups[group].append(f"`{c.preset}` ({_place(summary, c)})")
    labels = {
        "survive": "better than `none` and than every control",
        "fall": "better than `none`, not better than every control, so no claim",
        "control": "controls that are better than `none`: so much can be had at random",
        "without": "better than `none`, without a control here: a hint, no claim",
    }
    return "\n".join(
        [*lines, "", *(f"- {labels[name]}: {'; '.join(of) or 'none of them'}" for name, of in groups.items())]
    )


def _against(row: Compared) -> str:
    text = change({"difference": row.difference.to_dict()})
    return f"**{text}** {row.verdict}" if row.verdict else text


def tuned_section(records: Sequence[Mapping[str, Any]]) -> str:
    """What ``vlmattn tune`` chose, on which samples."""
    lines = [
        "Before the run, on validation samples of other scenes; their figures flatter the choice. In the table above"
        " the chosen",
        "settings stand under their own names, tested once.",
        "",
        "| preset | tried | samples | none | chosen | its value |",
        "|---|---|---|---|---|---|",
    ]
    notes = []
    for record in records:
        tried = " x ".join(f"{name} = {', '.join(map(str, values))}" for name, values in record["grid"].items())
        value = next(each["value"] for each in record["settings"] if each["name"] == record["chosen"])
        samples = f"{len(record['samples'])} of {record['suite']}, seed {record['seed']}"
        cells = [f"`{record['preset']['name']}`", tried, samples, f"{record['none']['value']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"`{record['chosen']}`", f"{value:.1f} {record['metric']}"]) + " |")
        notes.append(f"- `{record['command']}`" + "".join(f" {note}" for note in record["notes"][1:]))
    return "\n".join([*lines, "", *notes])


def page(
    summary: Mapping[str, Any],
    command: str,
    costs: Mapping[str, str] | None = None,
    costs_are: str = "",
    picture: str = "",
    more: Mapping[str, str] | None = None,
) -> str:
    """The whole page.

    Args:
        command: made it.
        costs: preset -> cell of the last column; None for no such column.
        costs_are: what these are, in words.
        picture: address of what ``drawing.forest`` draws.
        more: title -> further sections.
    """
    versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    machine = ", ".join(f"{name}: {value}" for name, value in summary["hardware"].items() if value)
    typed = summary.get("command")
    lines = [
        f"# Presets on {summary['model']}",
        "",
        f"Written by `{command}`; do not edit it by hand.",
        "",
        "## How it was made",
        f"- answers: {f'`{typed}`' if typed else 'from Python, not from the command line'}",
        f"- model: {summary['model']}, {summary['dtype']}, weights {summary['weights']};"
        f" {decoding_in_words(summary['decoding'])}, batches of"
        f" {summary['batch_size']}, the same samples and batches for every preset",
        f"- versions: {versions}",
        f"- hardware: {machine}",
        f"- seed of the bootstrap: {summary['seed']}",
    ]
    for table, where in _columns(summary):
        title = summary["titles"][table["suite"]]
        lines.append(
            f"- {where}: {title}; {table['samples']} questions about {table['images']} images or sets of images"
        )
    for suite, settings in summary["suites"].items():
        lines.append(f"- data of {suite}: `{json.dumps(settings)}`")
    if absent := [name for name in all_presets() if name not in summary["recipes"]]:
        lines.append(f"- presets of the library that were not run: {', '.join(f'`{name}`' for name in absent)}")
    lines += [
        "",
        "## Figures",
        "Under each value: the difference to `none` with its 95 % interval (paired bootstrap over images), bold where"
        " the",
        "interval leaves out 0, p of McNemar's exact test on right and wrong answers, and how many answers changed."
        " Figures of",
        "POPE are means over its splits (random, popular and adversarial); elsewhere a question counts once for each"
        " split that it",
        "belongs to. In McNemar's test it counts once. Fired: how often the method found something to do, in its own"
        " count." + (f" Cost: {costs_are}." if costs else ""),
        "",
        *([f"![Differences to none with their intervals; to the right is better]({picture})", ""] if picture else []),
        table_of_presets(summary, costs),
        "",
        "## What helps here",
        findings(summary),
    ]
    for title, text in (more or {}).items():
        lines += ["", f"## {title}", text]
    lines += [
        "",
        f"All of this is about {summary['model']} and these samples; other models and data may say otherwise.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, required=True, action="append", help="results folder of vlmattn eval; repeat"
    )
    parser.add_argument("--out", type=Path, required=True, help="the page, in markdown")
    parser.add_argument("--without-times", action="store_true", help="the machine did other work during the run")
    parser.add_argument("--bench", type=Path, action="append", default=[], help="costs: table of vlmattn bench; repeat")
    parser.add_argument("--tuned", type=Path, action="append", default=[], help="tune.json of vlmattn tune; repeat")
    parser.add_argument("--picture", type=Path, help="the differences as a picture, .svg, beside the page")
    options = parser.parse_args()
    try:
        command = shlex.join(["python", "-m", "tools.results.survey", *sys.argv[1:]])
        parts = [read_run(run) for run in options.run]
        summary = joined(parts)
        if options.bench:
            costs, settings = bench_costs(options.bench)
            costs_are = f"relative to `none` in the same round, median and quartiles, measured apart by `vlmattn bench` ({settings})"
        else:
            costs = {} if options.without_times else times(summary)
            costs_are = "seconds per sample relative to `none`, taken once on this machine; not a benchmark"
        more = {}
        if found := against_controls(options.run, parts):
            more["Against controls"] = controls_section(summary, found)
        if options.tuned:
            more["Settings chosen first"] = tuned_section([read_tuned(path) for path in options.tuned])
        text = page(summary, command, costs, costs_are, options.picture.name if options.picture else "", more)
        _, mark, kept = (read_text(options.out) if options.out.exists() else "").partition(FEWER_TOKENS)
        text += f"\n{mark}{kept}" if mark else ""
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.picture:
            write_whole(options.picture, forest(summary))
        write_whole(options.out, text)
    except VlmattnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
