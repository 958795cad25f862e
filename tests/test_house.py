"""The house: who may import whom, no circles, and nothing so long or so branched that nobody reads it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from radon.complexity import cc_visit

import vlmattn

PACKAGE = Path(vlmattn.__file__).parent
#: From the ground up: a room imports from its own floor and from those before.
FLOORS = (
    {"errors", "files", "texts", "pages", "pictures", "drawing", "bases", "compat"},
    {"kernels", "anatomy", "options"},
    {"request", "registry"},
    {"attention", "interventions", "models"},
    {"decoding"},
    {"recipe", "binding"},
    {"wrapping"},
    {"costs", "diffusion", "inspection", "tracking"},
    {"__init__"},
    {"embedded"},
    {"evals"},
    {"cli", "lmms_eval"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
#: Methods never name a model, models never a method; the engine's attention names neither.
APART = {
    ("interventions", "models"),
    ("models", "interventions"),
    ("models", "decoding"),
    ("decoding", "models"),
    ("attention", "interventions"),
    ("attention", "models"),
}
#: Where the engine is: short files, so that one can be read at a sitting.
ENGINE = (
    *(
        "compat",
        "anatomy",
        "options",
        "registry",
        "kernels",
        "request",
        "attention",
        "interventions",
        "models",
        "decoding",
    ),
    *("recipe", "binding", "wrapping", "costs", "inspection"),
)
#: Programs for another compiler are as long as what they compute, and all of the room branches as its formulas do.
TRITON, KERNELS = "kernels/triton_kernels.py", "kernels/"


def room(name: str) -> str:
    """The room of a module ``vlmattn.room.file``, or the front door."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str) -> set[str]:
    """Modules of the package that a module imports, anywhere in it and for types too."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for one in names:
            one = one if one in modules() else one.rpartition(".")[0]
            if one in modules() and one != name:
                found.add(one)
    return found


def test_imports_run_downward():
    """A plugin loader names modules as text, so the registry imports none of them."""
    assert {room(name) for name in modules()} <= FLOOR.keys(), "a new room needs a floor"
    pairs = {(name, other) for name in modules() for other in imported(name) if room(name) != room(other)}
    uphill = [
        f"{name} imports {other}"
        for name, other in sorted(pairs)
        if FLOOR[room(name)] < FLOOR[room(other)] or (room(name), room(other)) in APART
    ]
    assert not uphill


def test_no_two_files_import_each_other():
    """Also by way of others; the face of a package only hands names on."""
    faces = {name for name, path in modules().items() if path.name == "__init__.py"}
    graph = {name: imported(name) - faces for name in modules().keys() - faces}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_rules_see_what_they_forbid():
    """The tests above read imports inside of functions, and those for types."""
    assert "vlmattn.evals.runner" in imported("vlmattn.cli.evaluation")
    assert "vlmattn.wrapping" in imported("vlmattn")


def functions() -> Iterator[tuple[str, int, int]]:
    """Where, lines and complexity of every function of the package but kernels."""
    for path in modules().values():
        place = path.relative_to(PACKAGE).as_posix()
        if place == TRITON:
            continue
        text = path.read_text()
        complexity = {(block.name, block.lineno): block.complexity for block in cc_visit(text)}
        for block in cc_visit(text):
            complexity |= {(part.name, part.lineno): part.complexity for part in getattr(block, "closures", ())}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                yield f"{place}:{node.name}", lines, complexity.get((node.name, node.lineno), 0)


def test_functions_can_be_read():
    found = list(functions())
    assert len(found) > 1000
    assert [(where, lines) for where, lines, _ in found if lines > 60] == []
    branched = [(where, complexity) for where, _, complexity in found if complexity >= 15]
    assert [(where, complexity) for where, complexity in branched if not where.startswith(KERNELS)] == []


def test_files_of_the_engine_can_be_read():
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines())
        for name, path in modules().items()
        if room(name) in ENGINE
    }
    assert {place: lines for place, lines in lengths.items() if lines > 400} == {}
