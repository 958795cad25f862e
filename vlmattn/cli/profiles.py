"""vlmattn profile: what was measured about a model's heads or sinks, or what is different in two measurements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from vlmattn.cli.common import app, console, plain
from vlmattn.cli.figures import write_figures, write_page
from vlmattn.errors import OptionError

if TYPE_CHECKING:
    from vlmattn.inspection.listings import Listing
    from vlmattn.interventions.profiles import HeadProfile, SinkProfile

_WHAT = "vlmattn_heads.json or vlmattn_sinks.json, a folder that holds one, or 'embedded'."


@app.command()
def profile(
    first: Annotated[str, typer.Argument(help=_WHAT)],
    second: Annotated[str | None, typer.Argument(help="Another one of the same language model, to compare.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write everything as one HTML page.")] = None,
    png: Annotated[Path | None, typer.Option(help="Folder to write the figures to.")] = None,
    score: Annotated[str | None, typer.Option(help="Show this score of the heads only.")] = None,
    top: Annotated[int, typer.Option(help="Heads in a table.", min=1)] = 10,
) -> None:
    """Show a saved profile of attention heads or sinks, or what is different in two.

    Examples:

      [bold]vlmattn profile embedded --html heads.html[/bold]

      [bold]vlmattn profile before/vlmattn_heads.json after/vlmattn_heads.json --score causal[/bold]
    """
    from vlmattn.inspection.atlas import figures, page
    from vlmattn.inspection.differences import compare_profiles
    from vlmattn.inspection.listings import listings

    names = [first] if second is None else [first, second]
    found = [_load(name, score) for name in names]
    shown = found[0] if second is None else compare_profiles(*found)
    for name, one in zip(names, found, strict=True):
        plain(f"{name}: measured on {one.source or 'unknown'} ({one.fingerprint})")
    for listing in listings(shown, top):
        plain(f"\n{listing.title}", style="bold")  # as a title of the table it would be folded to its width
        console.print(_table(listing))
    if html is not None:
        write_page(html, page(shown, " and ".join(names), top))
        plain(f"page: {html}")
    if png is not None:
        write_figures(png, figures(shown))
        plain(f"figures: {png}")


def _load(name: str, score: str | None) -> HeadProfile | SinkProfile:
    """A profile, with one of its scores if one is named."""
    from vlmattn.embedded import FOLDER
    from vlmattn.interventions.profiles import HeadProfile, load_profile

    found = load_profile(FOLDER if name == "embedded" else name)
    if score is None:
        return found
    if not isinstance(found, HeadProfile):
        raise OptionError(f"{name} is about sinks, which have no scores; leave out --score")
    if score not in found.scores:
        raise OptionError(f"{name} has no score '{score}'; it has {', '.join(sorted(found.scores))}")
    return replace(found, scores={score: found.scores[score]})


def _table(listing: Listing) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=any(listing.columns))
    for number, column in enumerate(listing.columns):
        table.add_column(Text(column), justify="right" if number else "left", no_wrap=True)
    for row in listing.rows:
        table.add_row(*map(Text, row))
    return table
