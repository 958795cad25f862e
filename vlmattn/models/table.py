"""Which kinds of methods run on which family, and why the others do not: read off the families themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import getdoc

from vlmattn import compat
from vlmattn.errors import UnsupportedError
from vlmattn.models.base import Family
from vlmattn.models.paths import hook_points
from vlmattn.models.reasons import KINDS
from vlmattn.models.registry import registered

#: What the table tells of: kinds of methods, and whether ``look`` shows what the model attends to.
COLUMNS = (*KINDS, "looking")
_TITLES = ("attention edits", "masks", "pruning", "contrastive decoding", "looking")
_LEADING = (
    "its image stands before the tokens of the prompt, where look sees nothing; take a model whose image is among them"
    " like qwen2_5_vl"
)


@dataclass(frozen=True)
class Row:
    """One family: its model types, a checkpoint of each, and for each of ``COLUMNS`` "" (it runs) or why it is refused.

    ``opening``: why masks that open edges are refused, where others run; ``guided``: why decoding methods are that are
    guided by attention; ``dropping``: why those with a branch without the image are. ``untested``: why no test runs the
    family.
    """

    types: tuple[str, ...]
    checkpoints: tuple[str, ...]
    cells: dict[str, str]
    untested: str
    opening: str
    guided: str
    dropping: str


def rows() -> Iterator[Row]:
    """All registered families, by their first model type."""
    seen: set[int] = set()
    for family in registered().values():
        if id(family) not in seen:
            seen.add(id(family))
            yield _row(family)


def _row(family: Family) -> Row:
    types = tuple(family.model_types), tuple(filter(None, family.model_types.values()))
    within = (family.refused.get(kind, "") for kind in ("opening", "looking", "dropping"))
    return Row(*types, _reasons(family), family.untested, *within)


def _reasons(family: Family) -> dict[str, str]:
    """For each of ``COLUMNS`` why it is refused; "" = it runs."""
    found = {kind: family.unsupported or family.refused.get(kind, "") for kind in KINDS}
    leads = type(family).leading is not Family.leading
    return found | {"looking": family.unsupported or (_LEADING if leads else "")}


def cells(runs: str, refused: str) -> tuple[list[list[str]], list[str]]:
    """The table as text: model types, checkpoints, a cell for each column; and the notes that cells name by number.

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
        if row.guided:
            kinds[KINDS.index("decoding")] = f"{good}; {refused} where attention guides it {note(row.guided)}"
        if row.dropping:
            kinds[KINDS.index("decoding")] += f", where a branch has no image {note(row.dropping)}"
        found.append([", ".join(row.types), ", ".join(row.checkpoints), *kinds])
    return found, [f"({number}) {text}" for number, text in enumerate(notes, 1)]


def short() -> tuple[list[list[str]], list[str]]:
    """A narrow table: model types, then for each column yes, no or part with the number of its notes."""
    notes: list[str] = []

    def cell(why: str, *within: str) -> str:
        said = [text for text in (why, *within) if text]
        notes.extend(text for text in dict.fromkeys(said) if text not in notes)
        numbers = ", ".join(str(notes.index(text) + 1) for text in said)
        return f"{'no' if why else 'part'} ({numbers})" if said else "yes"

    found = []
    for row in rows():
        within = {"masks": (row.opening,), "decoding": (row.guided, row.dropping)}
        kinds = [cell(why, *(() if why else within.get(kind, ()))) for kind, why in row.cells.items()]
        found.append([", ".join(row.types), *kinds])
    return found, [f"({number}) {text}" for number, text in enumerate(notes, 1)]


def counts() -> str:
    """How many of the types that the installed transformers knows are served."""
    families, types = registered(), compat.image_text_types()
    served = sum(name in families and not families[name].unsupported for name in types)
    return (
        f"{served} of the {len(types)} image-text-to-text types of transformers {compat.INSTALLED} are served,"
        f" {sum(name in families for name in types) - served} have a reason why not."
    )


def verdicts() -> dict[str, dict[str, str]]:
    """For each model type what runs on it: column -> "yes", or why not."""
    return {
        name: {column: why or "yes" for column, why in _reasons(family).items()}
        for name, family in registered().items()
    }


#: Models that people know, to be named where they run what another does not.
_WHOLE = ("qwen2_5_vl", "qwen3_vl", "internvl", "llava")
#: What a family may refuse of a kind that runs.
_WITHIN = {
    "opening": "masks that open edges",
    "looking": "decoding guided by attention",
    "dropping": "branches without the image",
    "rotating": "branches with other positions",
    "rows": "methods about rows of image tokens",
    "turns": "methods that must know the user's turns",
}


def verdict(name: str) -> dict[str, str]:
    """All that a family says of one model type.

    Raises:
        UnsupportedError: no family knows it.
    """
    family = registered().get(name)
    if family is None:
        near = get_close_matches(name, registered(), 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; see: vlmattn families"
        raise UnsupportedError(f"no family knows the model type '{name}'{hint}")
    about = {"model type": name, "checkpoint": family.model_types[name] or "none that transformers names"}
    if family.unsupported:
        return about | {"nothing runs": family.unsupported}
    reasons = _reasons(family)
    within = {what: family.refused.get(kind, "") for kind, what in _WITHIN.items()}
    return {
        **about,
        "about": " ".join((getdoc(family) or "").split("\n\n")[0].split()),
        **{column: f"no: {why}" if why else "yes" for column, why in reasons.items()},
        **{what: f"no: {why}" for what, why in within.items() if why},
        **({"nearest": _nearest(reasons)} if any(reasons.values()) else {}),
        **hook_points(family),
    }


def _nearest(reasons: dict[str, str]) -> str:
    """What works, beside what a family refuses."""
    here = [column for column, why in reasons.items() if not why]
    others = [name for name in _WHOLE if name in registered() and not any(_reasons(registered()[name]).values())]
    missing = [column for column, why in reasons.items() if why]
    return f"{', '.join(here)} run here; {', '.join(missing)} on other models, like {', '.join(others)}"


def markdown() -> str:
    """The table of docs/families.md."""
    found, notes = cells("tested", "refused")
    lines = ["| model type | for example | " + " | ".join(_TITLES) + " |", "|" + " --- |" * (2 + len(COLUMNS))]
    lines += [f"| {' | '.join(row)} |" for row in found]
    return "\n".join([*lines, "", *(f"{text}.  " for text in notes)]) + "\n"
