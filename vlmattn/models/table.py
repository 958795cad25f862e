"""Which kinds of methods run on which family, and why the others do not: read off the families themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlmattn.models.base import KINDS, Family
from vlmattn.models.registry import registered

_TITLES = ("attention edits", "masks", "pruning", "contrastive decoding")  # of KINDS


@dataclass(frozen=True)
class Row:
    """One family: its model types, a checkpoint of each, and for each kind of method "" (it runs) or why it is refused.

    ``opening``: why masks that open edges are refused, where others run; ``looking``: why decoding methods are that are
    guided by attention; ``dropping``: why those with a branch without the image are. ``untested``: why no test runs the
    family.
    """

    types: tuple[str, ...]
    checkpoints: tuple[str, ...]
    cells: dict[str, str]
    untested: str
    opening: str
    looking: str
    dropping: str


def rows() -> Iterator[Row]:
    """All registered families, by their first model type."""
    seen: set[int] = set()
    for family in registered().values():
        if id(family) not in seen:
            seen.add(id(family))
            yield _row(family)


def _row(family: Family) -> Row:
    cells = {kind: family.unsupported or family.refused.get(kind, "") for kind in KINDS}
    types = tuple(family.model_types), tuple(family.model_types.values())
    within = (family.refused.get(kind, "") for kind in ("opening", "looking", "dropping"))
    return Row(*types, cells, family.untested, *within)


def cells(runs: str, refused: str) -> tuple[list[list[str]], list[str]]:
    """The table as text: model types, checkpoints, one cell for each kind; and the notes that cells refer to by number.

    Args:
        runs, refused: what a cell says.
    """
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"({notes.index(text) + 1})"

    found = []
    for row in rows():
        good = f"untested {note(row.untested)}" if row.untested else runs
        kinds = [f"{refused} {note(why)}" if why else good for why in row.cells.values()]
        if row.opening:
            kinds[KINDS.index("masks")] = f"{good}; {refused} where edges open {note(row.opening)}"
        if row.looking:
            kinds[KINDS.index("decoding")] = f"{good}; {refused} where attention guides it {note(row.looking)}"
        if row.dropping:
            kinds[KINDS.index("decoding")] += f", where a branch has no image {note(row.dropping)}"
        found.append([", ".join(row.types), ", ".join(row.checkpoints), *kinds])
    return found, [f"({number}) {text}" for number, text in enumerate(notes, 1)]


def markdown() -> str:
    """The table of docs/families.md."""
    found, notes = cells("tested", "refused")
    lines = ["| model type | for example | " + " | ".join(_TITLES) + " |", "|" + " --- |" * (2 + len(KINDS))]
    lines += [f"| {' | '.join(row)} |" for row in found]
    return "\n".join([*lines, "", *(f"{text}.  " for text in notes)]) + "\n"
