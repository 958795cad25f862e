"""vlmattn tune: options of a method, chosen on a few samples."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from vlmattn.cli.common import LoadOptions, Model, app, console, grouped, plain, say, typed
from vlmattn.cli.data import SuiteOptions
from vlmattn.cli.evaluation import Out, RunOptions
from vlmattn.errors import OptionError

if TYPE_CHECKING:
    from vlmattn.evals.runner import Result
    from vlmattn.evals.suites import Suite
    from vlmattn.evals.tune import Tuned


@app.command()
@grouped
def tune(
    preset: Annotated[str, typer.Option(help="Preset or recipe file of one method.")],
    grid: Annotated[
        list[str],
        typer.Option(help="Option and values: sigma=0.25,0.5, or sigma=0:1:.1 (start:stop:step); repeat to combine."),
    ],
    out: Out,
    suites: SuiteOptions,
    running: RunOptions,
    loading: LoadOptions,
    suite: Annotated[str, typer.Option(help="One suite, as for vlmattn eval.")] = "pope",
    shots: Annotated[int, typer.Option(help="Validation samples.", min=1)] = 32,
    test: Annotated[bool, typer.Option(help="Test the choice on the samples that had no part in it.")] = True,
    seed: Annotated[
        int, typer.Option(help="Which samples, and which generated scenes; 12 is taken by eval.", min=0)
    ] = 13,
    model: Model = "embedded",
) -> None:
    """Choose options of a method on a few validation samples; test the result on all others, once.

    Writes tuned.yaml, a recipe that eval, ask and wrap take, tune.json, all that was tried, and the test's figures.

    Example: [bold]vlmattn tune --preset sofa --grid sigma=0:1:.1 --suite which --shots 32 --out runs/tune[/bold]
    """
    from vlmattn.evals.processes import Processes
    from vlmattn.evals.suites.world import EVAL_SEED
    from vlmattn.evals.tune import parse_grid, settings_of, test_once, untouched
    from vlmattn.evals.tune import tune as tune_recipe
    from vlmattn.recipe import Recipe

    recipe = Recipe.of(preset)
    values = parse_grid(recipe, grid)
    settings_of(recipe, values)  # before a model of many gigabytes is loaded
    if not suites.data and seed == EVAL_SEED:
        raise OptionError(f"--seed {seed} draws the scenes that vlmattn eval tests on; take another")
    (chosen,) = suites.make([suite], model, seed)
    loaded, processor = loading.load(model)
    common = {**asdict(running), "say": say, "command": typed()}
    tuned = tune_recipe(loaded, processor, chosen, recipe, values, out, model, shots, seed, **common)
    first = Processes().first
    if first:
        _show_tuned(tuned, chosen)
    common.pop("restart")  # what was looked at once stays
    tested = None
    if test and untouched(chosen, tuned):
        tested = test_once(loaded, processor, chosen, recipe, tuned, out, model, **common)
    if first:
        _show_tested(tested, out)


def _show_tested(tested: Result | None, out: Path) -> None:
    from vlmattn.evals.report import terminal_tables
    from vlmattn.evals.report.page import html_report
    from vlmattn.files import write_whole

    page = out / "test" / "report.html"
    if tested is not None:
        console.print(terminal_tables(tested))
        write_whole(page, html_report(tested))
    plain(f"recipe: {out / 'tuned.yaml'}\nfigures: {out / 'tune.json'}")
    plain(f"test: {page}" if tested else "not tested: test the recipe on samples of other images before you trust it")


def _show_tuned(tuned: Tuned, suite: Suite) -> None:
    from vlmattn.evals.report import figures_table, spread

    title = f"{suite.title}\n{len(tuned.samples)} validation samples; {tuned.better} {tuned.metric} is better"
    table = figures_table([tuned.metric, "95 % CI", "changed"], title, first="setting", fold=True)
    table.add_column("", no_wrap=True)
    table.add_row("none", f"{tuned.none:.1f}")
    for setting in tuned.settings:
        best = setting is tuned.chosen
        table.add_row(
            escape(setting.name),
            f"{setting.value:.1f}",
            spread(asdict(setting)),
            str(setting.changed),
            "<- chosen" if best else "",
            style="bold" if best else "",
        )
    console.print(table)
    for note in tuned.notes():
        plain(note, style="yellow")
