"""Every page of docs/extend runs: its Python blocks one after the other in one namespace, in an empty folder, offline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vlmattn import registry as methods

PAGES = sorted((Path(__file__).parents[1] / "docs" / "extend").glob("*.md"))
MOST = 30  # lines of code that a page may take


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def run(page: Path) -> dict[str, Any]:
    """What a page leaves behind, by name."""
    namespace: dict[str, Any] = {"__name__": f"docs_extend_{page.stem}"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty folder; what a page makes known is forgotten."""
    from vlmattn.evals.suites import all_suites, registry

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    monkeypatch.setattr(methods, "_PRESETS", dict(methods._PRESETS))
    monkeypatch.setattr(registry, "_SUITES", dict(all_suites()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page):
    assert run(page)
    lines = [line for line in max(blocks(page, "python"), key=len).splitlines() if line.strip()]
    assert len(lines) < MOST


def test_the_suite_of_the_page_can_be_asked(capsys):
    from vlmattn.evals.suites import World, make_suite

    (page,) = (page for page in PAGES if page.stem == "suite")
    made = run(page)["counting"]
    assert capsys.readouterr().out.count("How many objects") == 3
    first = made.samples()[0]
    assert [made.score(first, text)["off"] for text in ("two", "There are 5.")] == [0, 3]
    assert {sample.truth for sample in make_suite("counting", [World("clear", count=2)], things=5).samples()} == {5}


def test_the_yaml_of_the_page_is_a_suite(tmp_path):
    from PIL import Image

    from vlmattn.evals.suites import make_suite

    (page,) = (page for page in PAGES if page.stem == "suite")
    (tmp_path / "cups.yaml").write_text(blocks(page, "yaml")[0])
    (tmp_path / "cups.jsonl").write_text('{"ask": "A cup?", "truth": 1, "photo": "a.png"}\n')
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "a.png")
    suite = make_suite(str(tmp_path / "cups.yaml"))
    (sample,) = suite.samples()
    assert (sample.prompt, sample.truth, sample.image_id, suite.name) == ("A cup?", True, "a.png", "cups")
    assert sample.images()[0].size == (4, 4)
    assert suite.score(sample, "No.")["wrong"] == 1
