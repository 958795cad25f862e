"""vlmattn fit: directions in hidden states, measured on a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmattn.cli.common import LoadOptions, Model, app, grouped, plain
from vlmattn.errors import InputError, OptionError
from vlmattn.files import path_text
from vlmattn.pictures import SUFFIXES

#: How the directions of each method are measured, and how many of a layer.
_WAYS = {"steer": ("mean", 1), "vti": ("pca", 1), "nullu": ("svd", 4)}


@app.command()
@grouped
def fit(
    method: Annotated[str, typer.Argument(help="The method they are for: steer, vti or nullu.")],
    loading: LoadOptions,
    out: Annotated[Path, typer.Option(help="File, or folder of the model, where the method looks for them.")],
    model: Model = "embedded",
    pairs: Annotated[Path | None, typer.Option(help="JSON lines with image, question, good and bad answers.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures: each against one of its mean colour.")
    ] = None,
    question: Annotated[str, typer.Option(help="What is asked about --images.")] = "Describe the image.",
    scenes: Annotated[int, typer.Option(help="Generated scenes: true answers against untrue ones.", min=0)] = 0,
    rank: Annotated[int | None, typer.Option(help="Directions of a layer; default: the method's.", min=1)] = None,
) -> None:
    """Measure directions in hidden states, for steer, vti and nullu. Takes about a second for a pair of a small model.

    Examples:

      [bold]vlmattn fit steer --scenes 32 --out runs/steer.safetensors[/bold]

      [bold]vlmattn fit nullu --model llava-hf/llava-1.5-7b-hf --pairs captions.jsonl --out runs/llava[/bold]
    """
    if method not in _WAYS:
        raise OptionError(f"no directions are measured for '{method}'; take {', '.join(_WAYS)}")
    if sum((pairs is not None, images is not None, scenes > 0)) != 1:
        raise OptionError("give one of --pairs, --images or --scenes")
    shown = _pictures(images) if images is not None else []
    from vlmattn.evals import steering_pairs
    from vlmattn.inspection import fit_steering

    way, usual = _WAYS[method]
    loaded, processor = loading.load(model)
    if pairs is not None:
        found, what = steering_pairs.of_file(loaded, processor, pairs), pairs.name
    elif images is not None:
        found, what = list(steering_pairs.of_images(loaded, processor, shown, question)), f"{len(shown)} pictures"
    else:
        said = ("Yes", "No") if model == "smol" else ("yes", "no")
        found, what = list(steering_pairs.of_scenes(loaded, processor, scenes, said)), f"{scenes} scenes"
    made = fit_steering(loaded, found, way, rank=rank or usual, examples=what, progress=sys.stderr.isatty(), path=out)
    norms = [float(value[0].norm()) for value in made.by_layer.values()]
    lengths = f"lengths {min(norms):.3g} to {max(norms):.3g}"
    plain(f"{len(found)} pairs, directions by {way} in {len(norms)} layers, {rank or usual} each, {lengths}")
    plain(f"use them: vlmattn.wrap(model, '{method}', file='{out}')")


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{path_text(folder)} is no folder; --images takes a folder of pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{path_text(folder)} holds no pictures ({', '.join(SUFFIXES)})")
    return found
