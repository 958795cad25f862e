"""vlmattn demo | eval | tune | ask: commands that run a model."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from vlmattn.cli.common import DeviceMap, DType, Model, app, console, errors, load, plain, say, typed
from vlmattn.errors import InputError, OptionError, UnknownNameError

if TYPE_CHECKING:
    from vlmattn.evals.suites import Suite
    from vlmattn.evals.tune import Tuned

Visibility = Annotated[str, typer.Option(help="Of generated scenes: clear, dim, faint, tiny; comma-separated.")]
Prior = Annotated[float, typer.Option(help="Share (0..1) of generated scenes that break the co-occurrence prior.")]
Questions = Annotated[list[Path] | None, typer.Option(help="POPE question file; repeat for several splits.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images that --questions or --instances name.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Published data of a suite, NAME=PATH: amber, amber_questions, mme, hallusion, choice, vqa; repeat."
    ),
]
Instances = Annotated[Path | None, typer.Option(help="COCO instances file, for CHAIR.")]
Captions = Annotated[Path | None, typer.Option(help="COCO captions file, for CHAIR.")]
Synonyms = Annotated[Path | None, typer.Option(help="Word list in CHAIR's published format (ours otherwise).")]
Limit = Annotated[int | None, typer.Option(help="Questions per file, or COCO images (500).", min=1)]
CaptionLength = Annotated[int, typer.Option(help="Length of COCO captions.", min=1)]
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
    suite: Annotated[
        str, typer.Option(help="pope, chair, which and pqa (several images); comma-separated.")
    ] = "pope,chair",
    presets: Annotated[
        str, typer.Option(help="Presets or recipe files, comma-separated; none is always included.")
    ] = DEMO_PRESETS,
    scenes: Annotated[int, typer.Option(help="Generated scenes per condition.")] = 200,
    visibility: Visibility = "faint,clear",
    prior: Prior = 0.0,
    data: Data = None,
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

      [bold]vlmattn eval --out runs/z --model llava-hf/llava-1.5-7b-hf --suite mme --data mme=MME_Benchmark[/bold]
    """
    names, files = [name.strip() for name in suite.split(",")], _data(data)
    if questions or instances or files:
        chosen = _on_files(names, files, questions, images, instances, captions, synonyms, limit, max_new_tokens)
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
    suite: Annotated[str, typer.Option(help="One of pope, chair, which, pqa (several images).")] = "pope",
    shots: Annotated[int, typer.Option(help="Validation samples.", min=1)] = 32,
    seed: Annotated[
        int, typer.Option(help="Which samples, and which generated scenes; 12 is taken by eval.", min=0)
    ] = 13,
    model: Model = "embedded",
    scenes: Annotated[int, typer.Option(help="Generated scenes per condition to draw samples from.")] = 200,
    visibility: Visibility = "faint,clear",
    prior: Prior = 0.0,
    data: Data = None,
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
    files = _data(data)
    generated = not (questions or instances or files)
    if generated:
        if seed == EVAL_SEED:
            raise OptionError(f"--seed {seed} draws the scenes that vlmattn eval tests on; take another")
        chosen = _generated([suite], scenes, [name.strip() for name in visibility.split(",")], prior, seed)
        _note_scenes(model)
    else:
        chosen = _on_files([suite], files, questions, images, instances, captions, synonyms, limit, max_new_tokens)
        if not chosen:
            raise InputError(_lacking([suite]))
    loaded, processor = load(model, dtype, device_map)
    tuned = tune_recipe(
        loaded, processor, chosen[0], recipe, values, out, model, shots, seed, batch_size, restart, say, typed()
    )
    _show_tuned(tuned, chosen[0])
    plain(f"recipe: {out / 'tuned.yaml'}\nfigures: {out / 'tune.json'}")
    rest = f"its scenes are of seed {EVAL_SEED}, not {seed}" if generated else "give it other files"
    test = ["vlmattn", "eval", "--suite", suite, "--model", model, "--presets", f"{preset},{out / 'tuned.yaml'}"]
    plain(f"to test it on other samples ({rest}): {shlex.join(test)} --out DIR")


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
    loaded, processor = load(model, dtype, device_map)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("[bold]none[/bold]", escape(answer(loaded, processor, [question], [[picture]], max_new_tokens)[0]))
    with vlmattn.applied(loaded, recipe, processor=processor):
        table.add_row(
            f"[bold]{escape(recipe.name)}[/bold]",
            escape(answer(loaded, processor, [question], [[picture]], max_new_tokens)[0]),
        )
    console.print(table)


def _generated(
    names: list[str], scenes: int, visibility: list[str], prior: float, seed: int | None = None
) -> list[Suite]:
    """Suites on generated scenes; without a seed on those of every evaluation."""
    from vlmattn.evals.suites import PQA, Chair, Pope, Which, World
    from vlmattn.evals.suites.world import EVAL_SEED

    worlds = [World(look, prior, scenes, EVAL_SEED if seed is None else seed) for look in visibility]
    makers: dict[str, Callable[[], Suite]] = {
        "pope": lambda: Pope.on_scenes(worlds),
        "chair": lambda: Chair.on_scenes(worlds),
        "which": lambda: Which(worlds[-1]),
        "pqa": lambda: PQA(worlds[-1]),
    }
    for name in names:
        if name not in makers:
            raise UnknownNameError("suite", name, makers)
    return [makers[name]() for name in names]


def _on_files(
    names: list[str],
    files: dict[str, Path],
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
    from vlmattn.evals.suites.published import make_published

    if images is None and (questions or instances):
        raise InputError("--questions and --instances need --images DIR, the folder of the images they name")
    chosen: list[Suite] = []
    if questions and images and "pope" in names:
        chosen.append(Pope.on_files(questions, images, limit))
    if instances and images and "chair" in names:
        chosen.append(Chair.on_coco(instances, captions, images, synonyms, limit or 500, 0, max_new_tokens))
    return chosen + [
        make_published(name, path, images, limit, max_new_tokens) for name, path in files.items() if name in names
    ]


def _data(given: list[str] | None) -> dict[str, Path]:
    """Paths by the names of suites."""
    from vlmattn.evals.suites.published import PUBLISHED

    found: dict[str, Path] = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise OptionError(f"--data is NAME=PATH, for example mme=MME_Benchmark; got '{text}'")
        if name in found:
            raise OptionError(f"--data {name} is given twice")
        if name not in PUBLISHED:
            raise UnknownNameError("suite of published data", name, PUBLISHED)
        found[name] = Path(path)
    return found


def _lacking(names: list[str]) -> str:
    return f"no data for suite {', '.join(names)}: pope needs --questions, chair --instances, others --data NAME=PATH"


def _note_scenes(model: str) -> None:
    if model != "embedded":
        errors.print(
            "note: generated scenes were made for the bundled model; give --questions and --images for real data"
        )


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
    from vlmattn.evals.report import html_report, markdown_tables, terminal_tables
    from vlmattn.evals.runner import evaluate
    from vlmattn.files import write_whole
    from vlmattn.recipe import Recipe

    chosen = [preset.strip() for preset in presets.split(",") if preset.strip()]
    for preset in chosen:  # before a model of many gigabytes is loaded
        Recipe.of(preset)
    model, processor = load(name, dtype, device_map)
    result = evaluate(model, processor, suites, chosen, out, name, batch_size, restart, say, typed())
    write_whole(out / "table.md", markdown_tables(result))
    write_whole(out / "report.html", html_report(result))
    console.print(terminal_tables(result))
    plain(f"report: {out / 'report.html'}\nfigures: {out / 'summary.json'}")
