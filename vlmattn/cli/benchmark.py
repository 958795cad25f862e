"""vlmattn bench: what presets cost on the user's model and machine."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from vlmattn.cli.common import DType, app, console, errors, listed, plain
from vlmattn.errors import InputError, OptionError
from vlmattn.evals.loading import check_dtype, load
from vlmattn.files import make_folder

Model = Annotated[
    str,
    typer.Option(
        help="'embedded', 'smol', a folder, a hub name, or random weights: random-llava "
        "(12 layers, 768 wide, 576 image tokens), random-llava-7b (LLaVA-1.5-7B's sizes), random-qwen2.5-vl-7b (the"
        " language model's sizes, 1296 image tokens, a small vision tower: its first token comes sooner than the real"
        " one's)."
    ),
]
_PROMPT = "Describe the image."
_SIDE = 672  # pixels of the built-in picture for models other than the bundled ones


@app.command()
def bench(
    model: Model = "embedded",
    presets: Annotated[
        str, typer.Option(help="Presets or recipe files, comma-separated (fastv@{.5,.25}); compared with none.")
    ] = "var,vhr,pai",
    rounds: Annotated[int, typer.Option(help="Times that everything is measured, in turns.")] = 7,
    new_tokens: Annotated[int, typer.Option(help="Length of the answers.")] = 64,
    batch_size: Annotated[int, typer.Option(help="How often the prompt is in the batch.")] = 1,
    image: Annotated[Path | None, typer.Option(help="Picture file; a built-in one otherwise.")] = None,
    prompt: Annotated[str | None, typer.Option(help=f"What to ask; '{_PROMPT}' otherwise.")] = None,
    dtype: DType = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="CSV file, replaced when the run is done.")] = Path("vlmattn-bench.csv"),
) -> None:
    """Measure what presets cost on a model and this machine: first token, decode step, tokens per second, memory.

    Everything runs in every round, and ratios are taken within rounds, so that a busy machine hits all alike.

    Examples:

      [bold]vlmattn bench --presets var,vhr,pai[/bold]

      [bold]vlmattn bench --model random-llava --presets var,vcd --rounds 3[/bold]

      [bold]vlmattn bench --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --device cuda --image photo.jpg[/bold]
    """
    from vlmattn.evals.bench import RANDOM_MODELS, check
    from vlmattn.evals.bench import bench as measure
    from vlmattn.evals.timing import write_csv

    chosen = listed(presets)
    check(chosen, rounds, new_tokens)
    if batch_size < 1:
        raise OptionError(f"--batch-size must be at least 1, got {batch_size}")
    if model in RANDOM_MODELS and (image or prompt is not None):
        raise OptionError(f"{model} has no tokenizer and makes its own prompt; leave out --image and --prompt")
    if image is not None and not os.path.exists(image):
        raise InputError(f"image not found: {image}")
    check_dtype(dtype)
    place = find_device(device)
    check_target(out)
    try:
        with warnings.catch_warnings(record=True) as heard:
            loaded, processor, inputs = _prepare(model, dtype, place, batch_size, image, prompt or _PROMPT)
            table = measure(loaded, inputs, chosen, rounds, new_tokens, processor)
    except KeyboardInterrupt:
        errors.print(f"stopped; nothing was written to {out}", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    write_csv(out, [{"model": model, **row} for row in table])
    _show(model, table)
    for note in _notes(model in RANDOM_MODELS, heard):
        errors.print(f"note: {escape(note)}", style="yellow", highlight=False, soft_wrap=True)
    plain(f"figures: {out}")


def find_device(name: str | None) -> str:
    """A device that is there."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):  # no such name, or no such device
        raise OptionError(f"--device {name} is not there; vlmattn doctor lists the devices, cpu always works") from None
    return name


def check_target(out: Path) -> None:
    """Raise before anything is measured if the file cannot be written."""
    try:
        make_folder(out.parent)
    except InputError as error:
        raise InputError(f"{error}; or give another --out") from None
    if out.is_dir():
        raise InputError(f"cannot write {out}: it is a folder; give --out a file name")


def _prepare(
    name: str, dtype: str, device: str, batch_size: int, image: Path | None, prompt: str
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, processor (None for random models) and inputs."""
    from vlmattn.evals.bench import RANDOM_MODELS, encode, random_inputs, random_model

    if name in RANDOM_MODELS:
        model = random_model(name, dtype, device)
        return model, None, random_inputs(model, batch_size)
    picture = _picture(name, image)
    model, processor = load(name, dtype, device)
    return model, processor, encode(processor, model, picture, prompt, batch_size)


def _picture(name: str, path: Path | None) -> Any:
    from PIL import Image

    from vlmattn.embedded import BUNDLED
    from vlmattn.embedded.scenes import make_scene
    from vlmattn.evals.suites.files import read_image

    if path is not None:
        return read_image(path)
    scene = Image.fromarray(make_scene(0, 0)[1])
    return scene if name in BUNDLED else scene.resize((_SIDE, _SIDE))


def _show(model: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One section for each thing that was measured."""
    from vlmattn.evals.report import figures_table

    facts = rows[0]
    where = facts["gpu"] if facts["device"] == "cuda" else facts["device"]
    batch = "a prompt" if facts["batch_size"] == 1 else f"{facts['batch_size']} prompts"
    prompts = f"{batch} of {facts['prompt_tokens']} tokens, {facts['image_tokens']} of the image"
    title = f"{model}, {facts['dtype']} on {where}\n{prompts}"
    caption = "extra and ratio (median, quartiles) compare with none in the same round"
    if facts["device"] == "cpu":
        caption += "\nmemory is measured once; that of a process is rough"
    columns = ["median", "extra", "ratio", "quartiles", "n", "tokens/s"]
    table = figures_table(columns, title, fold=True, caption=caption, caption_justify="left")
    what = ""
    for row in rows:
        if row["what"] != what:
            what = row["what"]
            table.add_section()
            table.add_row(f"[bold]{what}[/bold], {row['unit'].replace('mb', 'MB')}")
        table.add_row(*_cells(row), style=_style(row))
    console.print(table)


def _cells(row: Mapping[str, Any]) -> list[str]:
    base = row["candidate"] == row["base"]
    speed = row.get("tokens_per_s")
    return [
        f" {escape(row['candidate'])}",
        _figure(row["median"]),
        "" if base else f"{'+' if row['extra'] >= 0 else '-'}{_figure(abs(row['extra']))}",
        "" if base else f"{row['ratio']:.2f}",
        "" if base or row["n"] == 1 else f"{row['ratio_q1']:.2f}-{row['ratio_q3']:.2f}",
        str(row["n"]),
        "" if speed is None else f"{speed:.1f}",
    ]


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 1000 else f"{value:.2f}"


def _style(row: Mapping[str, Any]) -> str:
    """Red where it costs more than noise, green where it costs less than none."""
    if row["n"] < 3 or row["ratio_q1"] <= 1 <= row["ratio_q3"]:
        return ""
    return "red" if row["ratio_q1"] > 1 else "green"


def _notes(random: bool, heard: Sequence[warnings.WarningMessage]) -> list[str]:
    """What a user should know, once."""
    if random:  # methods may find no sinks and the like, and their edits run all the same
        return ["random weights: edits run as in a trained model of these sizes, but answers mean nothing"]
    return list(dict.fromkeys(str(warning.message) for warning in heard if warning.category is UserWarning))
