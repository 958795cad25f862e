"""Every command of docs/reproduce.md would be accepted: its options exist and have values of their kind, and so do presets and suites."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from vlmattn.cli import app
from vlmattn.cli.data import SuiteOptions
from vlmattn.evals.suites.making import parameters
from vlmattn.evals.suites.registry import find_suite
from vlmattn.evals.suites.tables import is_table
from vlmattn.recipe import Recipe

PAGE = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text()
EVAL = typer.main.get_command(app).commands["eval"]


def commands() -> list[list[str]]:
    """What stands behind ``eval`` in the lines of the code blocks, of this process or of several."""
    blocks = "".join(re.findall(r"^```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
    lines = blocks.replace("\\\n", " ").splitlines()
    words = [
        shlex.split(line)
        for line in lines
        if re.match(r"vlmattn |(torchrun|accelerate launch) .*-m vlmattn\.cli ", line)
    ]
    assert all("eval" in line for line in words)
    return [line[line.index("eval") + 1 :] for line in words]


def test_the_page_has_commands():
    starts = [line.split()[0] for line in re.findall(r"^(?:vlmattn|torchrun|accelerate) .*$", PAGE, re.MULTILINE)]
    assert len(commands()) == len(starts) > 15
    assert {"vlmattn", "torchrun", "accelerate"} <= set(starts)


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[1])
def test_a_command_would_be_accepted(words):
    given = EVAL.make_context(
        "eval", list(words)
    ).params  # options and kinds of values, as the command line checks them
    suites = [find_suite(name) for name in given["suite"].split(",")]
    data = [text.split("=", 1) for text in given["data"] or ()]
    assert {name for name, _ in data} <= {suite.name for suite in suites}
    assert all(is_table(Path(path)) or "/" not in path for _, path in data)
    paths = {name: [Path(path)] for name, path in data}
    options = SuiteOptions(data=given["data"], set_=given["set_"]).options(
        suites, paths
    )  # as the command line reads them
    for preset in given["presets"].split(","):
        Recipe.of(preset)
    assert given["presets"].startswith("none,")
    for suite in suites:
        if any(path.suffix == ".json" for path in paths.get(suite.name, ())) and "images" in parameters(suite, "files"):
            assert given["images"] or "images" in options[suite.name]


def test_presets_of_the_tables_exist():
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert len(rows) > 15
    for preset in rows:
        Recipe.of(preset)
    for line in PAGE.splitlines():  # the last column is left to the reader
        if re.match(r"\| `", line):
            assert line.endswith("| |"), line
