"""Accuracy against kept image tokens: a section of a results page and its picture, from ``vlmattn eval``.

    vlmattn eval --out runs/tokens --suite pope,chair,which --presets fastv@0.5,fastv@0.25,visionzip@0.5,visionzip@0.25
    python -m tools.results.curve --run runs/tokens --page docs/results/embedded.md --picture docs/results/tokens-embedded.svg

The section is appended to the page, or takes the place of the one that is there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.results.survey import FEWER_TOKENS, read_run
from vlmattn.drawing import Figure, svg
from vlmattn.errors import InputError, VlmattnError
from vlmattn.evals.report import bounds, change, verdict
from vlmattn.files import write_whole
from vlmattn.texts import read_text

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#8B4513")


def curves(summary: Mapping[str, Any]) -> dict[str, list[tuple[float, str]]]:
    """For each method its budgets, descending, and the names of the recipes that have them.

    Raises:
        InputError: no recipe of the run is named with a budget (``fastv@0.5``).
    """
    found: dict[str, list[tuple[float, str]]] = {}
    for name in summary["recipes"]:
        method, mark, share = name.partition("@")
        if mark:
            found.setdefault(method, []).append((float(share), name))
    if not found:
        raise InputError(
            "no preset of this run has a budget in its name; run vlmattn eval with presets such as fastv@0.5"
        )
    return {method: sorted(budgets, reverse=True) for method, budgets in found.items()}


def _reads(summary: Mapping[str, Any], name: str) -> str:
    """Share of the image tokens in a layer, mean over layers, while the prompt is read."""
    counts = summary["reports"].get(name, {}).get("image_tokens")
    return "100 %" if counts is None else f"{100 * counts['equivalent'] / counts['prompt']:.0f} %"


def table(summary: Mapping[str, Any]) -> str:
    """One row for each method and budget: image tokens a layer, headline metrics and their differences to ``none``."""
    columns = [(found, f"{found['suite']} {found['condition']}") for found in summary["overall"]]
    heads = [f"{where}: {summary['metrics'][found['suite']][0]['name']}" for found, where in columns]
    lines = ["| " + " | ".join(["method", "budget", "image tokens of the prompt, mean over layers", *heads]) + " |"]
    lines.append("|" + "---|" * (3 + len(heads)))
    names = [("none", 1.0, "none")]
    names += [(method, share, name) for method, budgets in curves(summary).items() for share, name in budgets]
    for method, share, name in names:
        cells = [f"`{method}`", f"{100 * share:.0f} %", "100 %" if name == "none" else _reads(summary, name)]
        for found, _ in columns:
            metric = summary["metrics"][found["suite"]][0]
            cell = found["rows"][name]["metrics"][metric["name"]]
            shown = f"{cell['value']:.1f}"
            if name != "none":
                said = verdict(cell, metric["better"])
                shown += f" (**{change(cell)}** {said})" if said else f" ({change(cell)})"
            cells.append(shown)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(summary: Mapping[str, Any]) -> str:
    """The headline metrics against the budget, one panel for each suite and condition, as SVG."""
    panels = summary["overall"]
    figure = Figure(figsize=(3.4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, found in zip(axes, panels, strict=True):
        metric = summary["metrics"][found["suite"]][0]
        bare = found["rows"]["none"]["metrics"][metric["name"]]
        if (ends := bounds(bare)) is not None:
            axis.axhspan(*ends, color="#eeeeee")
        axis.axhline(bare["value"], color="#666", lw=0.8)
        for number, (method, budgets) in enumerate(curves(summary).items()):
            values = [found["rows"][name]["metrics"][metric["name"]]["value"] for _, name in budgets]
            axis.plot(
                [1.0, *(share for share, _ in budgets)],
                [bare["value"], *values],
                "o-" if number < len(_COLOURS) else "s--",
                ms=3,
                lw=1.2,
                color=_COLOURS[number % len(_COLOURS)],
                label=method,
            )
        axis.set_xlim(1.03, 0)
        axis.set_xticks(ticks := [1, 0.75, 0.5, 0.25, 0.1], [f"{100 * t:.0f} %" for t in ticks], fontsize=8)
        axis.set_title(f"{found['suite']} {found['condition']}", fontsize=10)
        axis.set_ylabel(f"{metric['name']} ({metric['better']} is better)", fontsize=9)
        axis.grid(color="#ddd", lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("budget: share of the image tokens", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=9, frameon=False, fontsize=8)
    return svg(figure)


def section(summary: Mapping[str, Any], command: str, image: str) -> str:
    """The section, from its mark on."""
    return "\n".join(
        [
            FEWER_TOKENS,
            "## Fewer image tokens",
            f"Written by `{command}`; do not edit it by hand. Answers: `{summary.get('command') or 'from Python'}`;"
            " model, samples and",
            "statistics as above. Budget: the share of the image tokens that a method keeps (in its first stage; the"
            " next ones in",
            "proportion), for `avl` that it holds, for `longheads` and `recycled` that a head reads, for `rounds` of"
            " the gaze, for `razor`",
            "and `duo` of the heads that keep everything. The third column is what makes methods comparable: image"
            " tokens in a layer while",
            "the prompt is read, mean over layers. Policies about the cache leave it at 100 %: they act after the"
            " prompt, so the first word",
            "of an answer is the bare model's, and answers of one word say nothing about them. In brackets the"
            " difference to `none` with its",
            "95 % interval, bold where that leaves out 0.",
            "",
            f"![Accuracy against kept image tokens]({image})",
            "",
            table(summary),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="results folder of vlmattn eval")
    parser.add_argument("--page", type=Path, required=True, help="the page, in markdown")
    parser.add_argument("--picture", type=Path, required=True, help="the picture, .svg, beside the page")
    options = parser.parse_args()
    try:
        summary = read_run(options.run)
        command = shlex.join(["python", "-m", "tools.results.curve", *sys.argv[1:]])
        before = read_text(options.page).partition(FEWER_TOKENS)[0].rstrip() if options.page.exists() else ""
        write_whole(options.picture, picture(summary))
        write_whole(options.page, f"{before}\n\n{section(summary, command, options.picture.name)}\n".lstrip())
    except VlmattnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
