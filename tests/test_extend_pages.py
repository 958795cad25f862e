"""Every page of docs/extend runs: its Python blocks one after the other in one namespace, in an empty folder, offline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vlmattn
from vlmattn import registry
from vlmattn.evals.suites import all_suites
from vlmattn.evals.suites import registry as suites
from vlmattn.models import registry as families

PAGES = sorted((Path(__file__).parents[1] / "docs" / "extend").glob("*.md"))
MOST = 30  # lines of code that a page may take


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def run(name: str) -> dict[str, Any]:
    """What a page leaves behind, by name."""
    (page,) = (page for page in PAGES if page.stem == name)
    namespace: dict[str, Any] = {"__name__": f"docs_extend_{name}"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty folder; what a page makes known is forgotten."""
    assert vlmattn.presets()
    assert vlmattn.supported_families()  # the library's own are there
    monkeypatch.chdir(tmp_path)
    assert all_suites()
    known = (registry, "_METHODS"), (registry, "_PRESETS"), (families, "_FAMILIES"), (suites, "_SUITES")
    for module, name in known:
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page):
    assert run(page.stem)
    lines = [line for line in max(blocks(page, "python"), key=len).splitlines() if line.strip()]
    assert len(lines) < MOST
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_rule_of_the_page_is_a_whole_method(capsys):
    run("rule")
    assert capsys.readouterr().out.count("describe the image") == 2
    recipe = vlmattn.Recipe.of("pai+blind")
    assert vlmattn.Recipe.from_text(recipe.to_yaml()) == recipe
    assert "blind" in vlmattn.presets()
    with pytest.raises(vlmattn.OptionError, match=r"blind.alpha must be a number within 0..10"):
        vlmattn.Recipe.of("blind", alpha=11)


def test_the_family_of_the_page_serves_its_model(capsys, recwarn):
    from vlmattn.models import find_family

    left = run("family")
    assert type(find_family(left["model"])) is left["MyFamily"]
    assert left["numbers"].tolist() == [[-1, -1, *[0] * 16, *[1] * 16, -1, -1]]
    out = capsys.readouterr().out
    assert all(f"\n{preset} [[1, 7" in out for preset in ("pai", "sofa", "fastv", "vcd"))
    assert str(torch.arange(16).view(4, 4)) in out
    assert not [one for one in recwarn if "vlmattn" in str(one.message)]


def test_the_suite_of_the_page_can_be_asked(capsys):
    from vlmattn.evals.suites import World, make_suite

    made = run("suite")["counting"]
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
