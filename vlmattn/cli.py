"""The command line. Errors are one line with a remedy and exit code 2; ``--debug`` shows the traceback."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vlmattn.errors import (
    TORCHVISION_REMEDY,
    InputError,
    OptionError,
    UnknownNameError,
    VlmattnError,
    torchvision_trouble,
)

if TYPE_CHECKING:
    from vlmattn.evals.suites import Suite
    from vlmattn.evals.tune import Tuned
    from vlmattn.interventions import Intervention, PresetInfo
    from vlmattn.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Training-free attention interventions for vision-language models.",
)
console = Console()
errors = Console(stderr=True)

Model = Annotated[str, typer.Option(help="'embedded', a folder, or a hub name such as llava-hf/llava-1.5-7b-hf.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceMap = Annotated[str | None, typer.Option(help="For accelerate: auto, cuda, cpu.")]
Visibility = Annotated[str, typer.Option(help="Of generated scenes: clear, dim, faint, tiny; comma-separated.")]
Prior = Annotated[float, typer.Option(help="Share (0..1) of generated scenes that break the co-occurrence prior.")]
Questions = Annotated[list[Path] | None, typer.Option(help="POPE question file; repeat for several splits.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images that --questions or --instances name.")]
Instances = Annotated[Path | None, typer.Option(help="COCO instances file, for CHAIR.")]
Captions = Annotated[Path | None, typer.Option(help="COCO captions file, for CHAIR.")]
Synonyms = Annotated[Path | None, typer.Option(help="Word list in CHAIR's published format (ours otherwise).")]
Limit = Annotated[int | None, typer.Option(help="Questions per file, or COCO images (500).", min=1)]
CaptionLength = Annotated[int, typer.Option(help="Length of COCO captions.", min=1)]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away earlier answers in --out.")]
DEMO_PRESETS = "none,var,vhr,pai"


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    del debug  # read from sys.argv by main(), so that it also covers errors of the parser


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("runs/demo"),
    scenes: Annotated[int, typer.Option(help="Generated scenes per condition.")] = 100,
    restart: Restart = False,
) -> None:
    """Run the hallucination eval with several presets on the bundled model.

    Example: [bold]vlmattn demo[/bold]
    """
    _evaluate(
        "embedded",
        "auto",
        None,
        _generated(["pope", "chair"], scenes, ["faint", "clear"], 0.0),
        DEMO_PRESETS,
        out,
        50,
        restart,
    )


@app.command(name="eval")
def eval_command(
    out: Annotated[Path, typer.Option(help="Results folder; the same command resumes an interrupted run.")],
    model: Model = "embedded",
    suite: Annotated[str, typer.Option(help="pope, chair, which (several images); comma-separated.")] = "pope,chair",
    presets: Annotated[
        str, typer.Option(help="Presets or recipe files, comma-separated; none is always included.")
    ] = DEMO_PRESETS,
    scenes: Annotated[int, typer.Option(help="Generated scenes per condition.")] = 200,
    visibility: Visibility = "faint,clear",
    prior: Prior = 0.0,
    questions: Questions = None,
    images: Images = None,
    instances: Instances = None,
    captions: Captions = None,
    synonyms: Synonyms = None,
    limit: Limit = None,
    max_new_tokens: CaptionLength = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    restart: Restart = False,
) -> None:
    """Ask a model the same questions with and without presets, and say whether they helped.

    Examples:

      [bold]vlmattn eval --out runs/x --presets none,var,vhr,pai[/bold]

      [bold]vlmattn eval --out runs/y --suite pope --model llava-hf/llava-1.5-7b-hf --questions coco_pope_random.json --images val2014[/bold]
    """
    names = [name.strip() for name in suite.split(",")]
    if questions or instances:
        chosen = _on_files(names, questions, images, instances, captions, synonyms, limit, max_new_tokens)
        missing = [name for name in names if name not in [s.name for s in chosen]]
        if missing and suite != "pope,chair":
            raise InputError(_lacking(missing))
        if missing:  # of the default suites
            errors.print(f"note: {_lacking(missing)}", highlight=False, soft_wrap=True)
    else:
        chosen = _generated(names, scenes, [name.strip() for name in visibility.split(",")], prior)
        _note_scenes(model)
    _evaluate(model, dtype, device_map, chosen, presets, out, batch_size, restart)


@app.command()
def tune(
    preset: Annotated[str, typer.Option(help="Preset or recipe file of one method.")],
    grid: Annotated[
        list[str],
        typer.Option(help="Option and values: sigma=0.25,0.5, or sigma=0:1:.1 (start:stop:step); repeat to combine."),
    ],
    out: Annotated[Path, typer.Option(help="Results folder; the same command resumes an interrupted run.")],
    suite: Annotated[str, typer.Option(help="One of pope, chair, which (several images).")] = "pope",
    shots: Annotated[int, typer.Option(help="Validation samples.", min=1)] = 32,
    seed: Annotated[
        int, typer.Option(help="Which samples, and which generated scenes; 12 is taken by eval.", min=0)
    ] = 13,
    model: Model = "embedded",
    scenes: Annotated[int, typer.Option(help="Generated scenes per condition to draw samples from.")] = 200,
    visibility: Visibility = "faint,clear",
    prior: Prior = 0.0,
    questions: Questions = None,
    images: Images = None,
    instances: Instances = None,
    captions: Captions = None,
    synonyms: Synonyms = None,
    limit: Limit = None,
    max_new_tokens: CaptionLength = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    restart: Restart = False,
) -> None:
    """Choose options of a method on a few validation samples; test the result on others.

    Writes tuned.yaml, a recipe that eval, ask and wrap take, and tune.json, all that was tried.

    Examples:

      [bold]vlmattn tune --preset pai --grid alpha=0:.9:.3 --suite which --shots 32 --out runs/tune[/bold]

      [bold]vlmattn eval --suite which --presets pai,runs/tune/tuned.yaml --out runs/test[/bold]
    """
    from vlmattn.evals.suites.world import EVAL_SEED
    from vlmattn.evals.tune import parse_grid, settings_of
    from vlmattn.evals.tune import tune as tune_recipe
    from vlmattn.recipe import Recipe

    recipe = Recipe.of(preset)
    values = parse_grid(recipe, grid)
    settings_of(recipe, values)  # before a model of many gigabytes is loaded
    generated = not (questions or instances)
    if generated:
        if seed == EVAL_SEED:
            raise OptionError(f"--seed {seed} draws the scenes that vlmattn eval tests on; take another")
        chosen = _generated([suite], scenes, [name.strip() for name in visibility.split(",")], prior, seed)
        _note_scenes(model)
    else:
        chosen = _on_files([suite], questions, images, instances, captions, synonyms, limit, max_new_tokens)
        if not chosen:
            raise InputError(_lacking([suite]))
    loaded, processor = _load(model, dtype, device_map)
    tuned = tune_recipe(
        loaded, processor, chosen[0], recipe, values, out, model, shots, seed, batch_size, restart, _say, _typed()
    )
    _show_tuned(tuned, chosen[0])
    _plain(f"recipe: {out / 'tuned.yaml'}\nfigures: {out / 'tune.json'}")
    rest = f"its scenes are of seed {EVAL_SEED}, not {seed}" if generated else "give it other files"
    test = ["vlmattn", "eval", "--suite", suite, "--model", model, "--presets", f"{preset},{out / 'tuned.yaml'}"]
    _plain(f"to test it on other samples ({rest}): {shlex.join(test)} --out DIR")


def _show_tuned(tuned: Tuned, suite: Suite) -> None:
    table = Table(
        title=f"{suite.title}\n{len(tuned.samples)} validation samples; {tuned.better} {tuned.metric} is better",
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
            f"{setting.low:.1f} to {setting.high:.1f}",
            str(setting.changed),
            "<- chosen" if best else "",
            style="bold" if best else "",
        )
    console.print(table)
    for note in tuned.notes():
        _plain(note, style="yellow")


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="Picture file.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    preset: Annotated[str, typer.Option(help="Preset or recipe file.")] = "var",
    model: Model = "embedded",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Ask about a picture, without and with a preset.

    Example: [bold]vlmattn ask photo.jpg "Is there a dog in the image?" --preset vhr[/bold]
    """
    import vlmattn
    from vlmattn.evals.runner import answer
    from vlmattn.evals.suites.files import read_image

    if not image.is_file():
        raise InputError(f"image not found: {image}")
    picture, recipe = read_image(image), vlmattn.Recipe.of(preset)
    loaded, processor = _load(model, dtype, device_map)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("[bold]none[/bold]", escape(answer(loaded, processor, [question], [[picture]], max_new_tokens)[0]))
    with vlmattn.applied(loaded, recipe, processor=processor):
        table.add_row(
            f"[bold]{escape(recipe.name)}[/bold]",
            escape(answer(loaded, processor, [question], [[picture]], max_new_tokens)[0]),
        )
    console.print(table)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Show one preset with all its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The recipe as JSON.")] = False,
) -> None:
    """List the presets, or show one.

    Example: [bold]vlmattn presets var[/bold]
    """
    from vlmattn.interventions import all_presets
    from vlmattn.recipe import Recipe

    known = all_presets()
    if name is None:
        if as_json:
            print("[" + ",\n".join(Recipe.of(preset).to_json().strip() for preset in known) + "]")
        else:
            _list_presets(known)
        return
    recipe = Recipe.of(name)
    if as_json:
        print(recipe.to_json(), end="")
        return
    _show_recipe(recipe, known.get(name))


def _list_presets(known: dict[str, PresetInfo]) -> None:
    """One line per preset for other programs; on a terminal a table that fits, with what its method costs said once."""
    from vlmattn.evals.survey import checked_against, paper_id
    from vlmattn.interventions import find_method

    terminal = console.is_terminal
    table = Table(box=SIMPLE_HEAD if terminal else None, padding=(0, 1 if terminal else 2, 0, 0), pad_edge=False)
    widest = {"parts": 13, "checked against": 12} if terminal else {}
    for column in ("preset", "about", "parts", "checked against", "paper", "cost"):
        header = "about, and what the method costs" if terminal and column == "about" else column
        if not terminal or column != "cost":
            table.add_column(
                header, no_wrap=not terminal or column in ("preset", "paper"), max_width=widest.get(column)
            )
    told = ""
    for preset in sorted(known, key=lambda name: (known[name].method, name)):
        about, method = known[preset].about, find_method(known[preset].method).info
        checked, paper = checked_against(about, method.faithful), paper_id(method.paper)
        cells = [Text(text) for text in (preset, about, method.parts, checked, paper)]
        if not terminal:
            cells.append(Text(method.cost))
        elif method.name != told:
            table.add_section()
            cells[1].append(f"\n{method.cost}", style="dim")
        cells[0].stylize("bold")
        table.add_row(*cells)
        told = method.name
    if terminal:
        console.print(table)
        _plain("vlmattn presets NAME shows one with all its options", style="dim")
    else:
        wide = Console(width=10_000)  # a narrower one would fold
        with wide.capture() as lines:
            wide.print(table)
        print("\n".join(line.rstrip() for line in lines.get().splitlines()))


def _show_recipe(recipe: Recipe, info: PresetInfo | None) -> None:
    """Methods with all their options, and the recipe as a file holds it."""
    import inspect

    _plain(f"{recipe.name}  {info.about}" if info else recipe.name, style="bold")
    for method in recipe.interventions:
        facts = method.info
        _plain(f"{facts.paper}  {facts.code}")
        _plain(f"changes: {facts.parts}\nchecked against: {facts.faithful}\ncost: {facts.cost}\n")
        _plain((inspect.getdoc(type(method)) or "") + "\n")
        console.print(_options_of(method))
    _plain(recipe.to_yaml())


def _options_of(method: Intervention) -> Table:
    import dataclasses

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("option", "value", "range or choices", "meaning", "default from"):
        table.add_column(column, no_wrap=column == "option")
    for spec in dataclasses.fields(method):
        meta = spec.metadata
        span = " | ".join(meta["choices"]) or ("" if meta["low"] is None else f"{meta['low']:g}..{meta['high']:g}")
        value = getattr(method, spec.name)
        table.add_row(*map(escape, (spec.name, str(value), span, meta["about"], meta["source"])))
    return table


_PACKAGES = (
    "vlmattn",
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "pillow",
    "safetensors",
    "triton",
    "torchvision",
    "timm",
)


@app.command()
def doctor() -> None:
    """Say what is installed and what works, with remedies."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "[dim]not installed[/dim]")
    if trouble := torchvision_trouble():
        console.print(table)
        raise InputError(trouble)
    import torch

    from vlmattn.embedded import FOLDER
    from vlmattn.models import supported_families

    table.add_row("device", f"cpu ({torch.get_num_threads()} threads)")
    for number in range(torch.cuda.device_count()):
        table.add_row("device", f"cuda:{number} ({torch.cuda.get_device_name(number)})")
    flash = torch.cuda.is_available() or hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    table.add_row("backend reference", "yes (float64, slow; for checks)")
    table.add_row("backend eager", "yes (decode, and prefill in chunks of rows)")
    table.add_row(
        "backend merge", "yes (prefill on flash segments)" if flash else "no (this torch has no flash attention)"
    )
    table.add_row("backend triton", "not in this version")
    for family, example in supported_families().items():
        table.add_row(f"family {family}", example)
    found = (FOLDER / "model.safetensors").exists()
    table.add_row("bundled model", "found" if found else f"[red]missing[/red] ({FOLDER})")
    console.print(table)
    console.print("[green]no trouble found[/green]")


def _generated(
    names: list[str], scenes: int, visibility: list[str], prior: float, seed: int | None = None
) -> list[Suite]:
    """Suites on generated scenes; without a seed on those of every evaluation."""
    from vlmattn.evals.suites import Chair, Pope, Which, World
    from vlmattn.evals.suites.world import EVAL_SEED

    worlds = [World(look, prior, scenes, EVAL_SEED if seed is None else seed) for look in visibility]
    makers: dict[str, Callable[[], Suite]] = {
        "pope": lambda: Pope.on_scenes(worlds),
        "chair": lambda: Chair.on_scenes(worlds),
        "which": lambda: Which(worlds[-1]),
    }
    for name in names:
        if name not in makers:
            raise UnknownNameError("suite", name, makers)
    return [makers[name]() for name in names]


def _on_files(
    names: list[str],
    questions: list[Path] | None,
    images: Path | None,
    instances: Path | None,
    captions: Path | None,
    synonyms: Path | None,
    limit: int | None,
    max_new_tokens: int,
) -> list[Suite]:
    """Those of the named suites that there are files for."""
    from vlmattn.evals.suites import Chair, Pope

    if images is None:
        raise InputError("--questions and --instances need --images DIR, the folder of the images they name")
    chosen: list[Suite] = []
    if questions and "pope" in names:
        chosen.append(Pope.on_files(questions, images, limit))
    if instances and "chair" in names:
        chosen.append(Chair.on_coco(instances, captions, images, synonyms, limit or 500, 0, max_new_tokens))
    return chosen


def _lacking(names: list[str]) -> str:
    return f"no data for suite {', '.join(names)}: pope needs --questions, chair needs --instances"


def _note_scenes(model: str) -> None:
    if model != "embedded":
        errors.print(
            "note: generated scenes were made for the bundled model; give --questions and --images for real data"
        )


def _plain(text: str, style: str | None = None) -> None:
    """Text as it is: no markup, and no line breaks that it does not have."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _say(line: str) -> None:
    print(line, flush=True)


def _typed() -> str:
    """The command line as it was typed, for the record."""
    return shlex.join(["vlmattn", *sys.argv[1:]])


def _load(name: str, dtype: str, device_map: str | None) -> tuple[Any, Any]:
    """Model and processor, by bundled name, folder or hub name."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise OptionError(f"--dtype must be auto, float32, bfloat16 or float16, got '{dtype}'")
    if trouble := torchvision_trouble():
        raise InputError(trouble)
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    placing = {"device_map": device_map} if device_map else {}
    if name == "embedded":
        import torch

        import vlmattn

        torch.set_num_threads(
            1
        )  # so small that threads would mostly wait for each other, ten times slower on a busy machine
        return tuple(vlmattn.load("embedded", **({} if dtype == "auto" else {"dtype": dtype}), **placing))  # type: ignore[return-value]
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vlmattn.models import find_family, supported_families

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in supported_families():
            raise OptionError(
                f"{name} has model type '{config.model_type}'; supported: {', '.join(supported_families())}"
            )
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **placing)
        find_family(model)
        return model.eval(), AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        if isinstance(error, VlmattnError):
            raise
        raise InputError(f"cannot load '{name}': {str(error).strip().splitlines()[0]}") from error


def _evaluate(
    name: str,
    dtype: str,
    device_map: str | None,
    suites: list[Suite],
    presets: str,
    out: Path,
    batch_size: int,
    restart: bool,
) -> None:
    from vlmattn.evals.journal import write_text
    from vlmattn.evals.report import html_report, markdown_tables, terminal_tables
    from vlmattn.evals.runner import evaluate
    from vlmattn.recipe import Recipe

    chosen = [preset.strip() for preset in presets.split(",") if preset.strip()]
    for preset in chosen:  # before a model of many gigabytes is loaded
        Recipe.of(preset)
    model, processor = _load(name, dtype, device_map)
    result = evaluate(model, processor, suites, chosen, out, name, batch_size, restart, _say, _typed())
    write_text(out / "table.md", markdown_tables(result))
    write_text(out / "report.html", html_report(result))
    console.print(terminal_tables(result))
    _plain(f"report: {out / 'report.html'}\nfigures: {out / 'summary.json'}")


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings as a line of text, without the place in the code."""
    errors.print(f"note: {escape(str(message))}", style="yellow", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: one-line errors and exit code 2, unless ``--debug`` is given."""
    debug = "--debug" in sys.argv
    if not debug:
        warnings.showwarning = _note
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments)
    except VlmattnError as error:
        if debug:
            raise
        errors.print(f"error: {escape(str(error))}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)
    except (RuntimeError, ImportError) as error:
        if debug or not torchvision_trouble():
            raise
        errors.print(f"error: {TORCHVISION_REMEDY}", style="red", highlight=False, soft_wrap=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        errors.print("stopped; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    main()
