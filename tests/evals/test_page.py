"""The report page: complete, offline, and readable on a phone (looked at with headless Chromium where there is one)."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace

import hostile
import numpy as np
import pytest
from hostile import CHROMIUM
from PIL import Image

import vlmattn
from vlmattn import PAI, Recipe, pages
from vlmattn.evals.report import change
from vlmattn.evals.report.gallery import attention_of, gallery
from vlmattn.evals.report.page import _card, html_report
from vlmattn.evals.runner import evaluate
from vlmattn.evals.suites import Chair, Pope, World


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    world = World("faint", 0.0, 12)
    suites = [Pope.on_scenes([world]), Chair.on_scenes([world])]
    model, processor = vlmattn.load("embedded")
    out = tmp_path_factory.mktemp("page")
    result = evaluate(model, processor, suites, ["vhr", "pai"], out, "embedded", say=lambda _: None)
    return result, html_report(result, attention_of(model, processor, result))


def test_the_leaderboard_has_every_preset_with_interval_p_and_cost(finished):
    result, page = finished
    board = page[page.index("All presets") : page.index("<h2>POPE")]
    assert re.findall(r"</i>(\w+)</th>", board) == sorted(
        ("none", "vhr", "pai"),
        key=lambda preset: -result.summary["overall"][0]["rows"][preset]["metrics"]["accuracy"]["value"],
    )
    for preset in ("vhr", "pai"):
        cell = result.summary["overall"][0]["rows"][preset]["metrics"]["accuracy"]
        assert f"{cell['value']:.1f}<small>{change(cell)}</small>" in board
        assert f"<td>{result.summary['cost'][preset]['tokens_per_second']:.1f}<small>" in board
    assert board.count("<small>p ") == 4
    assert "tokens per second" in board  # the chart
    assert not re.search(r"""(src|href)\s*=\s*["']?(http|//)|<script|<link|@import|url\(http""", page)


def test_the_gallery_shows_who_said_what(finished):
    result, page = finished
    pope = result.suites[0]
    chosen = gallery(pope, result)
    assert chosen
    scored = result.scored["pope"]
    for sample in chosen:
        assert len({scored.right(preset, sample) for preset in ("none", "vhr", "pai")}) == 2
        assert pope.expected(sample) in page
    cards = re.findall(r"<div class='card (repaired|broken)'>(.*?)</div>", page)
    assert len(cards) == sum(len(gallery(suite, result)) for suite in result.suites)
    for kind, card in cards:
        assert ("✗ <b>none" in card) == (kind == "repaired")
        assert all(name in card for name in ("none", "vhr", "pai"))
        assert "data:image/png;base64" in card


def test_attention_is_drawn_over_the_image():
    picture, grid = Image.new("RGB", (70, 70), "white"), np.zeros((7, 7))
    grid[0, 6] = 0.2
    drawn = np.asarray(pages.heated(picture, [((0, 0, 1, 1), grid)])).astype(int)
    assert (drawn[:10, 60:] == drawn[0, 69]).all()
    assert drawn[0, 69, 0] > drawn[0, 69, 1]  # red
    assert (drawn[10:] == 255).all()


def test_attention_on_tiles_is_drawn_in_their_boxes():
    """The small picture is not drawn then; the tiles share one scale."""
    picture, whole = Image.new("RGB", (80, 40), "white"), ((0, 0, 1, 1), np.ones((2, 2)))
    tiles = [((0, 0, 0.5, 1), np.array([[0, 0.1]])), ((0.5, 0, 1, 0.75), np.array([[0], [0.4]]))]
    drawn = 255 - np.asarray(pages.heated(picture, [whole, *tiles])).astype(int)[..., 1]  # how red
    assert (drawn[:, :20] == 0).all()
    assert (drawn[:, 20:40] == drawn[0, 20]).all()
    assert (drawn[:15, 40:] == 0).all()
    assert (drawn[15:30, 40:] == drawn[15, 40]).all()
    assert (drawn[30:] == np.where(np.arange(80) // 20 == 1, drawn[0, 20], 0)).all()
    assert drawn[15, 40] == pytest.approx(4 * drawn[0, 20], abs=4)
    assert drawn[15, 40] == pytest.approx(0.6 * 255, abs=2)


def test_the_finest_view_of_the_whole_picture_is_drawn():
    fine = np.zeros((1, 4))
    fine[0, 3] = 1
    drawn = np.asarray(
        pages.heated(Image.new("RGB", (40, 20), "white"), [((0, 0, 1, 1), np.ones((1, 1))), ((0, 0, 1, 1), fine)])
    )
    assert (drawn[:, :30] == 255).all()
    assert (drawn[:, 30:, 1] < 255).all()


def test_parts_that_count_as_images_are_not_drawn(finished):
    """Three maps for one picture: which would be whose?"""
    result, _ = finished
    suite = result.suites[0]
    sample = gallery(suite, result)[0]
    one = (((0, 0, 1, 1), np.ones((2, 2))),)
    cards = [_card(suite, result, sample, maps) for maps in ([one], [one] * 3, [()], [])]
    assert [card.count("data:image/png") for card in cards] == [2, 1, 1, 1]


@pytest.mark.filterwarnings("ignore")  # letters that the font lacks
def test_names_are_text_on_the_page(tmp_path):
    """Names of recipes and files, questions, answers and the command line."""
    model, processor = vlmattn.load("embedded")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")

    def made(name):
        place = tmp_path / name.replace("/", "")[:200].encode("ascii", "ignore").decode().replace("\0", "")
        place.mkdir()
        questions = place / f"{place.name}.json"
        asked = [
            {"question_id": n, "image": "a.png", "text": f"Is there a cup? {name}", "label": "yes"} for n in range(2)
        ]
        questions.write_text(json.dumps(asked))
        suite, recipe = Pope.on_files([questions], tmp_path), Recipe(name, (PAI(),))
        result = evaluate(model, processor, [suite], [recipe], place / "out", name, say=lambda _: None, command=name)
        said = {key: f"{name} {key[1]}" for key in result.answers}
        return hostile.elements(html_report(replace(result, answers=said)))

    assert made(hostile.ALL.replace("\ud800", "")) == made("name")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_scrolling_sideways(finished, tmp_path, width):
    _, page = finished
    path = tmp_path / "report.html"
    path.write_text(page)
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    shot = tmp_path / "shot.png"
    subprocess.run(
        [*command, f"--window-size={width},1400", f"--screenshot={shot}", path.as_uri()],
        check=True,
        capture_output=True,
        timeout=600,
    )
    seen = np.asarray(Image.open(shot).convert("L"))
    assert seen.shape == (1400, width)
    assert (seen < 100).mean() > 0.005  # something is written
    assert (seen[:, -4:] > 200).all(), "nothing may touch the right edge"
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe id=f style='border:0;width:{width}px;height:900px' srcdoc=''></iframe><script>const f=document.getElementById('f');"
        "f.onload=()=>{const d=f.contentDocument.documentElement;document.title=d.scrollWidth+' '+d.clientWidth};"
        f"f.srcdoc={page!r}.toString()</script>"
    )
    told = subprocess.run(
        [*command, "--dump-dom", "--virtual-time-budget=5000", frame.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    whole, shown = map(int, re.search(r"<title>(\d+) (\d+)</title>", told.stdout).groups())
    assert whole <= shown == width
