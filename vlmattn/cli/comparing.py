"""vlmattn compare: two finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from vlmattn.cli.common import app, console, plain
from vlmattn.errors import OptionError


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Results folder of vlmattn eval.")],
    second: Annotated[Path, typer.Argument(help="Another one, on the same suites and data.")],
    pair: Annotated[
        list[str] | None,
        typer.Option(help="FIRST:SECOND, presets to compare, as none:vhr; repeat. Default: those that both have."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the whole comparison as JSON.")] = None,
    examples: Annotated[int, typer.Option(help="Answers to show that became right or wrong.", min=0)] = 5,
) -> None:
    """Compare two runs on the questions that both have answered: models, dtypes, versions, presets.

    Examples:

      [bold]vlmattn compare runs/llava runs/qwen[/bold]

      [bold]vlmattn compare runs/a runs/a --pair var:vhr[/bold]
    """
    import dataclasses

    from vlmattn.evals.compare import compare as compare_runs
    from vlmattn.evals.journal import write_json
    from vlmattn.evals.report import STYLES, change, figures_table

    pairs = None if pair is None else [_pair(text) for text in pair]
    found = compare_runs(first, second, pairs, max(examples, 20))
    for name, (one, other) in found.settings.items():
        plain(f"{name}: {_short(one)} | {_short(other)}", style="dim")
    if any(found.only):
        plain(f"only in {first}: {found.only[0]} questions; only in {second}: {found.only[1]}; they are left out")
    table = figures_table(["first", "second", "difference [95 % CI]", "p", "changed"])
    last = ""
    for row in found.rows:
        where = f"{row.suite} {row.condition} · {row.presets} ({row.questions})"
        if where != last:
            table.add_row(Text(where, style="bold"), "", "", "", f"{row.p:.3f}", str(row.changed))
            last = where
        table.add_row(
            f" {row.metric}",
            f"{row.first:.1f}",
            f"{row.second:.1f}",
            Text(change({"difference": row.difference.to_dict()}), style=STYLES[row.verdict]),
        )
    console.print(table)
    for one, other in found.changed[:examples]:
        plain(f"{one['prompt']} (truth: {one['expected']}; {one['id']})")
        plain(f"  {'✓' if one['right'] else '✗'} {one['answer']}\n  {'✓' if other['right'] else '✗'} {other['answer']}")
    if out is not None:
        rows = [{**dataclasses.asdict(row), "difference": row.difference.to_dict()} for row in found.rows]
        write_json(out, {**dataclasses.asdict(found), "rows": rows})


def _pair(text: str) -> tuple[str, str]:
    first, colon, second = text.partition(":")
    if not (colon and first and second):
        raise OptionError(f"--pair is FIRST:SECOND, two presets, as none:vhr; got '{text}'")
    return first, second


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
