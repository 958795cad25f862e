"""The command line. Errors are one line with a remedy and exit code 2; ``--debug`` shows the traceback."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
DEMO_PRESETS = "none,var,vhr,pai"


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    del debug  # read from sys.argv by main(), so that it also covers errors of the parser


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("runs/demo"),
    scenes: Annotated[int, typer.Option(help="Generated scenes per condition.")] = 100,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away earlier answers in --out.")] = False,
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
    visibility: Annotated[
        str, typer.Option(help="Of generated scenes: clear, dim, faint, tiny; comma-separated.")
    ] = "faint,clear",
    prior: Annotated[
        float, typer.Option(help="Share (0..1) of generated scenes that break the co-occurrence prior.")
    ] = 0.0,
    questions: Annotated[list[Path] | None, typer.Option(help="POPE question file; repeat for several splits.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images that --questions or --instances name.")
    ] = None,
    instances: Annotated[Path | None, typer.Option(help="COCO instances file, for CHAIR.")] = None,
    captions: Annotated[Path | None, typer.Option(help="COCO captions file, for CHAIR.")] = None,
    synonyms: Annotated[
        Path | None, typer.Option(help="Word list in CHAIR's published format (ours otherwise).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per file, or COCO images (500).", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of COCO captions.", min=1)] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    dtype: DType = "auto",
    device_map: DeviceMap = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away earlier answers in --out.")] = False,
) -> None:
    """Ask a model the same questions with and without presets, and say whether they helped.

    Examples:

      [bold]vlmattn eval --out runs/x --presets none,var,vhr,pai[/bold]

      [bold]vlmattn eval --out runs/y --suite pope --model llava-hf/llava-1.5-7b-hf --questions coco_pope_random.json --images val2014[/bold]
    """
    names = [name.strip() for name in suite.split(",")]
    chosen: list[Suite] = []
    if questions or instances:
        from vlmattn.evals.suites import Chair, Pope

        if images is None:
            raise InputError("--questions and --instances need --images DIR, the folder of the images they name")
        if questions and "pope" in names:
            chosen.append(Pope.on_files(questions, images, limit))
        if instances and "chair" in names:
            chosen.append(Chair.on_coco(instances, captions, images, synonyms, limit or 500, 0, max_new_tokens))
        missing = [name for name in names if name not in [s.name for s in chosen]]
        lacking = f"no data for suite {', '.join(missing)}: pope needs --questions, chair needs --instances"
        if missing and suite != "pope,chair":
            raise InputError(lacking)
        if missing:  # of the default suites
            errors.print(f"note: {lacking}", highlight=False, soft_wrap=True)
    else:
        chosen = _generated(names, scenes, [name.strip() for name in visibility.split(",")], prior)
        if model != "embedded":
            errors.print(
                "note: generated scenes were made for the bundled model; give --questions and --images for real data"
            )
    _evaluate(model, dtype, device_map, chosen, presets, out, batch_size, restart)


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
    with vlmattn.applied(loaded, recipe):
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
    import dataclasses
    import inspect

    from vlmattn.interventions import all_presets, find_method
    from vlmattn.recipe import Recipe

    known = all_presets()
    if name is None:
        if as_json:
            print("[" + ",\n".join(Recipe.of(preset).to_json().strip() for preset in known) + "]")
            return
        table = Table(box=None, show_header=False, padding=(0, 2, 1, 0))
        table.add_column(no_wrap=True, style="bold")
        for preset, info in known.items():
            method = find_method(info.method).info
            facts = f"{method.paper}, changes {method.parts}; checked against: {method.faithful}; cost: {method.cost}"
            table.add_row(preset, f"{info.about}\n[dim]{facts}[/dim]")
        console.print(table)
        return
    recipe = Recipe.of(name)
    if as_json:
        print(recipe.to_json(), end="")
        return
    for method_object in recipe.interventions:
        console.print(f"[bold]{name}[/bold]  {known[name].about if name in known else ''}")
        console.print(f"{method_object.info.paper}  {method_object.info.code}\n", highlight=False)
        console.print(escape(inspect.getdoc(type(method_object)) or "") + "\n", highlight=False)
        table = Table("option", "value", "range", "meaning", "default from")
        for spec in dataclasses.fields(method_object):
            meta = spec.metadata
            span = "" if meta["low"] is None else f"{meta['low']:g}..{meta['high']:g}"
            table.add_row(spec.name, str(getattr(method_object, spec.name)), span, meta["about"], meta["source"])
        console.print(table)
    console.print(recipe.to_yaml(), highlight=False)


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


def _generated(names: list[str], scenes: int, visibility: list[str], prior: float) -> list[Suite]:
    """Suites on generated scenes."""
    from vlmattn.evals.suites import Chair, Pope, Which, World

    worlds = [World(look, prior, scenes) for look in visibility]
    makers: dict[str, Callable[[], Suite]] = {
        "pope": lambda: Pope.on_scenes(worlds),
        "chair": lambda: Chair.on_scenes(worlds),
        "which": lambda: Which(worlds[-1]),
    }
    for name in names:
        if name not in makers:
            raise UnknownNameError("suite", name, makers)
    return [makers[name]() for name in names]


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
    result = evaluate(
        model, processor, suites, chosen, out, name, batch_size, restart, say=lambda line: print(line, flush=True)
    )
    write_text(out / "table.md", markdown_tables(result))
    write_text(out / "report.html", html_report(result))
    console.print(terminal_tables(result))
    console.print(f"report: {out / 'report.html'}\nfigures: {out / 'summary.json'}", highlight=False, soft_wrap=True)


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
