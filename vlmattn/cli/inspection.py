"""vlmattn inspect: what a model looks at while it answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmattn.cli.common import LoadOptions, app, grouped, plain, typed
from vlmattn.cli.figures import write_figures, write_page
from vlmattn.errors import InputError

if TYPE_CHECKING:
    from vlmattn.inspection.recipes_compared import Side


@app.command()
@grouped
def inspect(
    model: Annotated[str, typer.Argument(help="'embedded', 'smol', a folder, or a hub name.")],
    loading: LoadOptions,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture; more than one makes a prompt of several.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Describe the image.",
    preset: Annotated[str, typer.Option(help="Recipe to compare with the bare model.")] = "none",
    html: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Folder to write figures to.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="New folder for the attention itself; it is not kept in memory then.")
    ] = None,
    scene: Annotated[
        int | None, typer.Option(help="A generated scene of the bundled models, by number, instead of --image.")
    ] = None,
    visibility: Annotated[str, typer.Option(help="Of the scene: clear, dim, faint or tiny.")] = "faint",
    seed: Annotated[int, typer.Option(help="Of the scenes.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 64,
) -> None:
    """Show what a model looks at while it answers, alone and with a preset: one page, figures, or the attention itself.

    Examples:

      [bold]vlmattn inspect embedded --scene 5 --prompt "Is there a fork?" --preset vhr --html out.html[/bold]

      [bold]vlmattn inspect llava-hf/llava-1.5-7b-hf --image photo.jpg --preset var --html out.html --png figures[/bold]
    """
    if html is None and png is None and save is None:
        raise InputError("nothing to write; give --html out.html, --png FOLDER or --save FOLDER")
    if (image is None) == (scene is None):
        raise InputError("give a picture with --image, or a generated scene with --scene (not both)")
    from vlmattn.evals.prompts import encode
    from vlmattn.inspection import compare_answers
    from vlmattn.recipe import Recipe

    recipes = ["none"] if Recipe.of(preset).is_none else ["none", preset]
    pictures = [_open(path) for path in image or ()] or [_scene(scene or 0, visibility, seed)]
    loaded, processor = loading.load(model)
    inputs = encode(loaded, processor, [prompt], [pictures])
    quiet = not sys.stderr.isatty()
    sides = compare_answers(
        loaded, processor, inputs, recipes, max_new_tokens=max_new_tokens, folder=save, progress=not quiet
    )
    for side in sides:
        plain(f"{side.trace.recipe}: {side.trace.said}")
    if save is not None:
        plain(f"attention: {save}")
    if html is not None:
        write_page(html, _page(sides, pictures, prompt, model, loaded))
        plain(f"page: {html}")
    if png is not None:
        from vlmattn.inspection.pictures import figures

        write_figures(png, figures(sides, pictures))
        plain(f"figures: {png}")


def _page(sides: list[Side], pictures: list[Any], prompt: str, name: str, model: Any) -> str:
    from vlmattn.evals.environment import hardware, versions
    from vlmattn.files import beside
    from vlmattn.inspection.page import inspect_page
    from vlmattn.interventions import HeadProfile

    found = beside(model.name_or_path, HeadProfile.FILE_NAME)
    facts = {
        "command": typed(),
        "model": name,
        "versions": ", ".join(f"{name} {value}" for name, value in versions().items()),
        "machine": ", ".join(f"{name} {value}" for name, value in hardware().items() if value),
        "decoding": "greedy, one prompt",
    }
    scores = None if found is None else HeadProfile.load(found).scores
    return inspect_page(sides, pictures, prompt, scores=scores, facts=facts)


def _open(path: Path) -> Any:
    from vlmattn.pictures import open_picture

    return open_picture(path)


def _scene(number: int, visibility: str, seed: int) -> Any:
    from vlmattn.evals.suites import World

    if number < 0:
        raise InputError(f"--scene must be 0 or more, got {number}")
    return World(visibility, count=number + 1, seed=seed).image(number)[0]
