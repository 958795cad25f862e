"""vlmattn demo | eval | ask: commands that ask a model."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

from vlmattn.cli.common import LoadOptions, Model, app, console, grouped, listed, plain, say, typed
from vlmattn.cli.data import DEFAULT_SUITES, SuiteOptions

if TYPE_CHECKING:
    from vlmattn.evals.suites import Suite

Out = Annotated[Path, typer.Option(help="Results folder; the same command resumes an interrupted run.")]
DEMO_PRESETS = "none,var,vhr,pai"


@dataclass(frozen=True)
class RunOptions:
    """How questions are asked."""

    batch_size: Annotated[
        int, typer.Option(help="At most so many questions at once; fewer where memory is short.", min=1)
    ] = 50
    batch_tokens: Annotated[
        int | None, typer.Option(help="At most so many prompt tokens at once, padding counted.", min=1)
    ] = None
    on_error: Annotated[
        str, typer.Option(help="At a missing or damaged image: stop, or skip its questions and name them.")
    ] = "stop"
    restart: Annotated[bool, typer.Option("--restart", help="Throw away earlier answers in --out.")] = False


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("runs/demo"),
    scenes: Annotated[int, typer.Option(help="Generated scenes per condition.")] = 100,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away earlier answers in --out.")] = False,
) -> None:
    """Run the hallucination eval with several presets on the bundled model.

    Example: [bold]vlmattn demo[/bold]
    """
    chosen = SuiteOptions(scenes=scenes).make(["pope", "chair"], "embedded")
    _evaluate("embedded", LoadOptions(), chosen, DEMO_PRESETS, out, RunOptions(restart=restart))


@app.command(name="eval")
@grouped
def eval_command(
    out: Out,
    suites: SuiteOptions,
    running: RunOptions,
    loading: LoadOptions,
    model: Model = "embedded",
    suite: Annotated[
        str, typer.Option(help="Suites, comma-separated (vlmattn suites lists them), or files that describe one.")
    ] = DEFAULT_SUITES,
    presets: Annotated[
        str, typer.Option(help="Presets or recipe files, comma-separated (fastv@{.5,.25}); none is always included.")
    ] = DEMO_PRESETS,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the generated scenes; 12 if not given (training drew 20261 to 20263, of smol 20271 to 20273).",
            min=0,
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Share the questions among so many processes, each on a GPU of its own.", min=1)
    ] = 1,
) -> None:
    """Ask a model the same questions with and without presets, and say whether they helped.

    Examples:

      [bold]vlmattn eval --out runs/x --presets none,var,vhr,pai[/bold]

      [bold]vlmattn eval --out runs/y --suite pope --model smol --data pope=coco_pope.json --images val2014[/bold]

      [bold]vlmattn eval --out runs/z --model llava-hf/llava-1.5-7b-hf --suite mme --data mme=MME_Benchmark[/bold]
    """
    chosen = suites.make(suite.split(","), model, seed)
    _evaluate(model, loading, chosen, presets, out, running, processes)


@app.command()
@grouped
def ask(
    image: Annotated[Path, typer.Argument(help="Picture file.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    loading: LoadOptions,
    preset: Annotated[str, typer.Option(help="Preset or recipe file.")] = "var",
    model: Model = "embedded",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """Ask about a picture, without and with a preset.

    Example: [bold]vlmattn ask photo.jpg "Is there a dog in the image?" --preset vhr[/bold]
    """
    import vlmattn
    from vlmattn.evals.prompts import answer
    from vlmattn.evals.suites.files import read_image

    picture, recipe = read_image(image), vlmattn.Recipe.of(preset)
    loaded, processor = loading.load(model)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("[bold]none[/bold]", escape(answer(loaded, processor, [question], [[picture]], max_new_tokens)[0]))
    with vlmattn.applied(loaded, recipe, processor=processor):
        table.add_row(
            f"[bold]{escape(recipe.name)}[/bold]",
            escape(answer(loaded, processor, [question], [[picture]], max_new_tokens)[0]),
        )
    console.print(table)


def launch(processes: int) -> NoReturn:
    """The same command in several processes, started by torchrun; ends as they end."""
    words = iter(sys.argv[1:])
    rest = []
    for word in words:
        if word == "--processes":
            next(words)
        elif not word.startswith("--processes="):
            rest.append(word)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    raise typer.Exit(subprocess.run([*torchrun, "-m", "vlmattn.cli", *rest]).returncode)


def _evaluate(
    name: str,
    loading: LoadOptions,
    suites: list[Suite],
    presets: str,
    out: Path,
    running: RunOptions,
    processes: int = 1,
) -> None:
    from vlmattn.evals.lock import refuse_if_used
    from vlmattn.evals.report import markdown_tables, terminal_tables
    from vlmattn.evals.report.gallery import attention_of
    from vlmattn.evals.report.page import html_report
    from vlmattn.evals.runner import evaluate
    from vlmattn.files import write_whole
    from vlmattn.recipe import Recipe

    chosen = listed(presets)
    for preset in chosen:  # before a model of many gigabytes is loaded
        Recipe.of(preset)
    if "WORLD_SIZE" not in os.environ:  # else the first process of this very run may hold it
        refuse_if_used(out)
        if processes > 1:
            launch(processes)
    model, processor = loading.load(name)
    result = evaluate(model, processor, suites, chosen, out, name, say=say, command=typed(), **asdict(running))
    if not result.first:
        return
    write_whole(out / "table.md", markdown_tables(result))
    write_whole(out / "report.html", html_report(result, attention_of(model, processor, result)))
    console.print(terminal_tables(result))
    plain(f"report: {out / 'report.html'}\nfigures: {out / 'summary.json'}")
