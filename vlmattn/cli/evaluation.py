"""vlmattn demo | eval | tune | ask: commands that run a model."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vlmattn.cli.common import DeviceMap, DType, LoadIn, Model, app, console, errors, plain, say, typed
from vlmattn.cli.data import (
    AllowOutside,
    CaptionLength,
    Captions,
    Data,
    DropCut,
    Files,
    Images,
    Instances,
    Judge,
    Limit,
    Prior,
    PromptImages,
    Questions,
    Suffix,
    Synonyms,
    Visibility,
    counts_of,
    generated,
    lacking,
    note_scenes,
    paths_of,
)
from vlmattn.errors import InputError, OptionError
from vlmattn.evals.loading import load

if TYPE_CHECKING:
    from vlmattn.evals.suites import Suite
    from vlmattn.evals.tune import Tuned

BatchSize = Annotated[int, typer.Option(help="At most so many questions at once; fewer where memory is short.", min=1)]
BatchTokens = Annotated[int | None, typer.Option(help="At most so many prompt tokens at once, padding counted.", min=1)]
OnError = Annotated[str, typer.Option(help="At a missing or damaged image: stop, or skip its questions and name them.")]
Jobs = Annotated[
    int,
    typer.Option("--processes", help="Share the questions among so many processes, each on a GPU of its own.", min=1),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Of the generated scenes; 12 if not given (training drew 20261 to 20263, of smol 20271 to 20273).", min=0
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away earlier answers in --out.")]
DEMO_PRESETS = "none,var,vhr,pai"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("runs/demo"),
    scenes: Annotated[int, typer.Option(help="Generated scenes per condition.")] = 100,
    restart: Restart = False,
) -> None:
    """Run the hallucination eval with several presets on the bundled model.

    Example: [bold]vlmattn demo[/bold]
    """
    chosen = generated(["pope", "chair"], scenes, ["faint", "clear"], 0.0)
    _evaluate("embedded", ("auto", None, None), chosen, DEMO_PRESETS, out, batch_size=50, restart=restart)


@app.command(name="eval")
def eval_command(
    out: Annotated[Path, typer.Option(help="Results folder; the same command resumes an interrupted run.")],
    model: Model = "embedded",
    suite: Annotated[
        str,
        typer.Option(
            help="pope, chair, amber, amber_questions, mme, mmhal; several images: which, pqa; on files also hallusion, choice, vqa, llava_bench, captions. Comma-separated."
        ),
    ] = "pope,chair",
    presets: Annotated[
        str, typer.Option(help="Presets or recipe files, comma-separated; none is always included.")
    ] = DEMO_PRESETS,
    scenes: Annotated[int, typer.Option(help="Generated scenes per condition.")] = 200,
    visibility: Visibility = "faint,clear",
    prior: Prior = 0.0,
    seed: Seed = None,
    prompt_images: PromptImages = None,
    data: Data = None,
    questions: Questions = None,
    images: Images = None,
    allow_outside: AllowOutside = False,
    instances: Instances = None,
    captions: Captions = None,
    synonyms: Synonyms = None,
    limit: Limit = None,
    max_new_tokens: CaptionLength = 512,
    judge: Judge = "rule",
    prompt_suffix: Suffix = "",
    drop_cut_sentence: DropCut = False,
    batch_size: BatchSize = 50,
    batch_tokens: BatchTokens = None,
    on_error: OnError = "stop",
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    load_in: LoadIn = None,
    processes: Jobs = 1,
    restart: Restart = False,
) -> None:
    """Ask a model the same questions with and without presets, and say whether they helped.

    Examples:

      [bold]vlmattn eval --out runs/x --presets none,var,vhr,pai[/bold]

      [bold]vlmattn eval --out runs/y --suite pope --model llava-hf/llava-1.5-7b-hf --questions coco_pope_random.json --images val2014[/bold]

      [bold]vlmattn eval --out runs/z --model llava-hf/llava-1.5-7b-hf --suite mme --data mme=MME_Benchmark[/bold]
    """
    names = [name.strip() for name in suite.split(",")]
    files = Files(
        paths_of(data),
        questions,
        images,
        instances,
        captions,
        synonyms,
        limit,
        max_new_tokens,
        judge,
        prompt_suffix,
        drop_cut_sentence,
        counts_of(prompt_images),
        allow_outside,
    )
    if files:
        chosen = files.suites(names)
        missing = [name for name in names if name not in [s.name for s in chosen]]
        if missing and suite != "pope,chair":
            raise InputError(lacking(missing))
        if missing:  # of the default suites
            errors.print(f"note: {lacking(missing)}", highlight=False, soft_wrap=True)
    else:
        chosen = generated(
            names, scenes, [name.strip() for name in visibility.split(",")], prior, seed, counts_of(prompt_images)
        )
        note_scenes(model)
    running = {"batch_size": batch_size, "batch_tokens": batch_tokens, "on_error": on_error, "restart": restart}
    _evaluate(model, (dtype, device_map, load_in), chosen, presets, out, processes, **running)


@app.command()
def tune(
    preset: Annotated[str, typer.Option(help="Preset or recipe file of one method.")],
    grid: Annotated[
        list[str],
        typer.Option(help="Option and values: sigma=0.25,0.5, or sigma=0:1:.1 (start:stop:step); repeat to combine."),
    ],
    out: Annotated[Path, typer.Option(help="Results folder; the same command resumes an interrupted run.")],
    suite: Annotated[str, typer.Option(help="One suite, as for vlmattn eval.")] = "pope",
    shots: Annotated[int, typer.Option(help="Validation samples.", min=1)] = 32,
    test: Annotated[bool, typer.Option(help="Test the choice on the samples that had no part in it.")] = True,
    seed: Annotated[
        int, typer.Option(help="Which samples, and which generated scenes; 12 is taken by eval.", min=0)
    ] = 13,
    model: Model = "embedded",
    scenes: Annotated[int, typer.Option(help="Generated scenes per condition to draw samples from.")] = 200,
    visibility: Visibility = "faint,clear",
    prior: Prior = 0.0,
    prompt_images: PromptImages = None,
    data: Data = None,
    questions: Questions = None,
    images: Images = None,
    allow_outside: AllowOutside = False,
    instances: Instances = None,
    captions: Captions = None,
    synonyms: Synonyms = None,
    limit: Limit = None,
    max_new_tokens: CaptionLength = 512,
    judge: Judge = "rule",
    prompt_suffix: Suffix = "",
    drop_cut_sentence: DropCut = False,
    batch_size: BatchSize = 50,
    batch_tokens: BatchTokens = None,
    on_error: OnError = "stop",
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    load_in: LoadIn = None,
    restart: Restart = False,
) -> None:
    """Choose options of a method on a few validation samples; test the result on all others, once.

    Writes tuned.yaml, a recipe that eval, ask and wrap take, tune.json, all that was tried, and the test's figures.

    Example: [bold]vlmattn tune --preset sofa --grid sigma=0:1:.1 --suite which --shots 32 --out runs/tune[/bold]
    """
    from vlmattn.evals.report.page import html_report
    from vlmattn.evals.processes import Processes
    from vlmattn.evals.report import terminal_tables
    from vlmattn.evals.suites.world import EVAL_SEED
    from vlmattn.evals.tune import parse_grid, settings_of, test_once, untouched
    from vlmattn.evals.tune import tune as tune_recipe
    from vlmattn.files import write_whole
    from vlmattn.recipe import Recipe

    recipe = Recipe.of(preset)
    values = parse_grid(recipe, grid)
    settings_of(recipe, values)  # before a model of many gigabytes is loaded
    files = Files(
        paths_of(data),
        questions,
        images,
        instances,
        captions,
        synonyms,
        limit,
        max_new_tokens,
        judge,
        prompt_suffix,
        drop_cut_sentence,
        counts_of(prompt_images),
        allow_outside,
    )
    if not files:
        if seed == EVAL_SEED:
            raise OptionError(f"--seed {seed} draws the scenes that vlmattn eval tests on; take another")
        chosen = generated(
            [suite], scenes, [name.strip() for name in visibility.split(",")], prior, seed, counts_of(prompt_images)
        )
        note_scenes(model)
    else:
        chosen = files.suites([suite])
        if not chosen:
            raise InputError(lacking([suite]))
    loaded, processor = load(model, dtype, device_map, load_in)
    running: dict[str, Any] = {"batch_size": batch_size, "batch_tokens": batch_tokens, "on_error": on_error}
    tuned = tune_recipe(
        loaded,
        processor,
        chosen[0],
        recipe,
        values,
        out,
        model,
        shots,
        seed,
        restart=restart,
        say=say,
        command=typed(),
        **running,
    )
    first = Processes().first
    if first:
        _show_tuned(tuned, chosen[0])
    test = test and bool(untouched(chosen[0], tuned))
    if test:
        tested = test_once(loaded, processor, chosen[0], recipe, tuned, out, model, say=say, command=typed(), **running)
    if not first:
        return
    if test:
        console.print(terminal_tables(tested))
        write_whole(out / "test" / "report.html", html_report(tested))
    plain(f"recipe: {out / 'tuned.yaml'}\nfigures: {out / 'tune.json'}")
    said = f"test: {out / 'test' / 'report.html'}"
    plain(said if test else "not tested: test the recipe on samples of other images before you trust it")


def _show_tuned(tuned: Tuned, suite: Suite) -> None:
    from vlmattn.evals.report import spread

    table = Table(
        title=Text(f"{suite.title}\n{len(tuned.samples)} validation samples; {tuned.better} {tuned.metric} is better"),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("setting")
    for name in (tuned.metric, "95 % CI", "changed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_row("none", f"{tuned.none:.1f}")
    for setting in tuned.settings:
        best = setting is tuned.chosen
        table.add_row(
            escape(setting.name),
            f"{setting.value:.1f}",
            spread(dataclasses.asdict(setting)),
            str(setting.changed),
            "<- chosen" if best else "",
            style="bold" if best else "",
        )
    console.print(table)
    for note in tuned.notes():
        plain(note, style="yellow")


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="Picture file.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    preset: Annotated[str, typer.Option(help="Preset or recipe file.")] = "var",
    model: Model = "embedded",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    load_in: LoadIn = None,
) -> None:
    """Ask about a picture, without and with a preset.

    Example: [bold]vlmattn ask photo.jpg "Is there a dog in the image?" --preset vhr[/bold]
    """
    import vlmattn
    from vlmattn.evals.prompts import answer
    from vlmattn.evals.suites.files import read_image

    picture, recipe = read_image(image), vlmattn.Recipe.of(preset)
    loaded, processor = load(model, dtype, device_map, load_in)
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
    loading: tuple[str, str | None, str | None],
    suites: list[Suite],
    presets: str,
    out: Path,
    processes: int = 1,
    **running: Any,
) -> None:
    from vlmattn.evals.report.gallery import attention_of
    from vlmattn.evals.lock import refuse_if_used
    from vlmattn.evals.report.page import html_report
    from vlmattn.evals.report import markdown_tables, terminal_tables
    from vlmattn.evals.runner import evaluate
    from vlmattn.files import write_whole
    from vlmattn.recipe import Recipe

    chosen = [preset.strip() for preset in presets.split(",") if preset.strip()]
    for preset in chosen:  # before a model of many gigabytes is loaded
        Recipe.of(preset)
    if "WORLD_SIZE" not in os.environ:  # else the first process of this very run may hold it
        refuse_if_used(out)
        if processes > 1:
            launch(processes)
    model, processor = load(name, *loading)
    result = evaluate(model, processor, suites, chosen, out, name, say=say, command=typed(), **running)
    if not result.first:
        return
    write_whole(out / "table.md", markdown_tables(result))
    write_whole(out / "report.html", html_report(result, attention_of(model, processor, result)))
    console.print(terminal_tables(result))
    plain(f"report: {out / 'report.html'}\nfigures: {out / 'summary.json'}")
