"""vlmattn presets | families | doctor: commands that say what there is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vlmattn.cli.checkup import tried
from vlmattn.cli.common import app, console, plain
from vlmattn.errors import InputError, UnsupportedError, torchvision_trouble

if TYPE_CHECKING:
    from vlmattn.options import Options, PresetInfo
    from vlmattn.recipe import Recipe


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Show one preset with all its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The recipe as JSON.")] = False,
) -> None:
    """List the presets, or show one.

    Example: [bold]vlmattn presets var[/bold]
    """
    from vlmattn.recipe import Recipe
    from vlmattn.registry import all_presets

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


_PLAIN_COLUMNS = ("preset", "about", "parts", "checked against", "paper", "cost")
#: On a terminal: columns, whether they wrap, and their width.
_COLUMNS: tuple[tuple[str, bool, int | None], ...] = (
    ("preset", False, None),
    ("about, and what the method costs", True, None),
    ("parts", True, 13),
    ("checked against", True, 13),
    ("paper", False, None),
)


def _list_presets(known: dict[str, PresetInfo]) -> None:
    """One line per preset for other programs; on a terminal a table that fits, with what its method costs said once."""
    from vlmattn.options import checked_against, paper_id
    from vlmattn.registry import find_method

    terminal = console.is_terminal
    table = Table(box=SIMPLE_HEAD if terminal else None, padding=(0, 1 if terminal else 2, 0, 0), pad_edge=False)
    for column, wraps, widest in _COLUMNS if terminal else [(name, False, None) for name in _PLAIN_COLUMNS]:
        table.add_column(column, no_wrap=not wraps, max_width=widest)
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
        plain("vlmattn presets NAME shows one with all its options", style="dim")
        return
    wide = Console(width=10_000, emoji=False)  # a narrower one would fold
    with wide.capture() as lines:
        wide.print(table)
    print("\n".join(line.rstrip() for line in lines.get().splitlines()))


def _show_recipe(recipe: Recipe, info: PresetInfo | None) -> None:
    """Methods with all their options, and the recipe as a file holds it."""
    import inspect

    plain(f"{recipe.name}  {info.about}" if info else recipe.name, style="bold")
    for method in recipe.methods:
        facts = method.info
        plain(f"{facts.paper}  {facts.code}")
        plain(f"changes: {facts.parts}\nchecked against: {facts.faithful}\ncost: {facts.cost}\n")
        plain((inspect.getdoc(type(method)) or "") + "\n")
        console.print(_options_of(method))
    plain(recipe.to_yaml())


def _options_of(method: Options) -> Table:
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


@app.command()
def suites(
    name: Annotated[str | None, typer.Argument(help="Show one suite with its options.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown.")] = False,
) -> None:
    """List the suites of vlmattn eval, or show one: where its data come from, and its options for --set.

    Example: [bold]vlmattn suites chair[/bold]
    """
    from vlmattn.evals.suites.making import options_of, suite_info
    from vlmattn.evals.suites.registry import all_suites, markdown

    if as_markdown:
        print(markdown(), end="")
        return
    if name is None:
        table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
        for title in ("suite", "asks", "data"):
            table.add_column(title, no_wrap=title == "suite")
        for info in all_suites().values():
            table.add_row(info.name, escape(info.about), escape(info.where))
        console.print(table)
        return
    info = suite_info(name)
    plain(f"{info.name}  {info.about}", style="bold")
    plain(f"data: {info.where}" + (f"\nsource: {info.source}" if info.source else ""))
    for door in info.doors:
        found = options_of(info, door)
        plain(f"\noptions on {door}: " + ("none" if not found else ""))
        for option, (kind, default) in found.items():
            plain(f"  --set {info.name}.{option}={kind}" + ("" if default is None else f"  (default {default})"))


_PACKAGES = (
    "vlmattn", "torch", "transformers", "accelerate", "numpy", "pillow", "safetensors", "triton", "torchvision", "timm",
)  # fmt: skip


@app.command()
def families(
    name: Annotated[str | None, typer.Argument(help="Show one model type: a checkpoint, what runs, its parts.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Verdicts as JSON.")] = False,
) -> None:
    """List the model families and which kinds of methods run on each, or show one.

    Example: [bold]vlmattn families gemma4[/bold]
    """
    from vlmattn.models.table import COLUMNS, counts, markdown, short, verdict, verdicts

    if as_markdown:
        print(markdown(), end="")
    elif name is not None:
        found = verdict(name)
        if as_json:
            print(json.dumps({name: found}, indent=2))
            return
        for title, text in found.items():
            plain(f"{title + ':':<13} {text}")
    elif as_json:
        print(json.dumps(verdicts(), indent=2))
    else:
        rows, notes = short()
        table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
        for title in ("model type", *COLUMNS):
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for note in notes:
            plain(note)
        plain(counts())
        plain("Other decoder-only models get attention edits by a generic patcher, if it reaches their attention.")


@app.command()
def doctor() -> None:
    """Say what is installed, and try answers of the bundled model under presets of each kind.

    Example: [bold]vlmattn doctor[/bold]
    """
    from vlmattn.embedded import FOLDER

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    _add_versions(table)
    if trouble := torchvision_trouble():
        console.print(table)
        raise InputError(trouble)
    from vlmattn import compat  # imports transformers, which a broken torchvision breaks

    _add_machine(table)
    found = (FOLDER / "model.safetensors").exists()
    table.add_row("bundled model 'embedded'", "found" if found else f"[red]missing[/red] ({FOLDER})")
    table.add_row("bundled model 'smol'", _smol())
    if (newer := compat.untested()) is not None:
        table.add_row("transformers", f"[yellow]newer than {compat.TESTED[1]}, the newest that was tested[/yellow]")
    results = tried() if found else {}
    for preset, trouble in results.items():
        table.add_row(f"answer with '{preset}'", f"[red]{escape(trouble)}[/red]" if trouble else "works")
    console.print(table)
    if failed := [preset for preset, trouble in results.items() if trouble]:
        newest = f"; install transformers {compat.TESTED[1]} (pip install 'transformers=={compat.TESTED[1]}.*')"
        raise UnsupportedError(
            f"wrapped answers fail with {', '.join(failed)}" + (newest if newer else "; please report it")
        )
    if not found:
        raise InputError("the bundled model is missing, so no answer could be tried; install vlmattn again")
    console.print("[green]no trouble found: wrapped answers work[/green]")


def _add_versions(table: Table) -> None:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    table.add_row("python", platform.python_version())
    for package in _PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "[dim]not installed[/dim]")


def _add_machine(table: Table) -> None:
    """Devices, what computes attention on them, and which models are known."""
    import torch

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
    table.add_row("backend triton", _triton())
    table.add_row("families", f"{len(supported_families())} model types (vlmattn families)")


def _smol() -> str:
    """Whether the parts of the second bundled model are here."""
    from vlmattn.embedded.smol.cache import ADAPTER, cache, folder_name, is_whole
    from vlmattn.embedded.smol.language import gguf_file

    if not ADAPTER.exists():
        return f"[red]adapter missing[/red] ({ADAPTER.parent})"
    if is_whole(cache() / folder_name(ADAPTER)):
        return "found"
    try:
        gguf_file()
    except InputError as error:
        return f"not ready: {escape(str(error))}"
    return "found (its first loading takes about a minute)"


def _triton() -> str:
    """Whether the decode kernels run here."""
    import importlib.util

    import torch

    if importlib.util.find_spec("triton") is None:
        return "no (triton is not installed)"
    return (
        "yes (decode in half precision)"
        if torch.cuda.is_available()
        else "no (no GPU; on a CPU only interpreted, for tests)"
    )
