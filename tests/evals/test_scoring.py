"""Figures over all splits, a column for each file, and what tables and pages say of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmattn
from vlmattn.evals import asking
from vlmattn.evals.compare import compare
from vlmattn.evals.report import change, markdown_tables, notes, spread, verdict, whiskers
from vlmattn.evals.report.page import html_report
from vlmattn.evals.runner import evaluate
from vlmattn.evals.scoring import Scored
from vlmattn.evals.suites import Pope
from vlmattn.evals.suites.pope import columns_of

PAGES = Path(__file__).parents[2] / "docs"


def files(folder, **kept):
    """Question files by name, with the numbers of the questions that each keeps."""
    for name, numbers in kept.items():
        lines = [
            {"image": f"{n % 20}.png", "text": f"Is there a thing {n}?", "label": "yes" if n % 3 else "no"}
            for n in numbers
        ]
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, lines)))
    return [folder / f"{name}.json" for name in kept]


def f1(suite, members, answers):
    """POPE's F1 from its definition."""
    said = [(sample.truth, answers[sample.id] == "yes") for sample in members]
    both, truths, yes = (sum(map(check, said)) for check in (all, lambda s: s[0], lambda s: s[1]))
    return 100 * 2 * both / (truths + yes) if truths + yes else 0.0


def test_popes_figure_over_all_splits_is_the_mean_of_the_three_however_long_they_are(tmp_path):
    """LLaVA's random split has 2910 questions, the others 3000: a mean over splits is no pooled figure."""
    paths = files(
        tmp_path,
        coco_pope_random=range(29),
        coco_pope_popular=range(10, 90),
        coco_pope_adversarial=range(40, 100, 2),
    )
    suite = Pope.on_files(paths, tmp_path)
    answers = {
        sample.id: "yes" if number < 30 or number % 7 < 1 else "no" for number, sample in enumerate(suite.samples())
    }
    by_split, (whole,) = Scored(suite, ["none"], {("pope", "none", key): a for key, a in answers.items()}).tables()
    assert [table["split"] for table in by_split] == ["random", "popular", "adversarial"]
    assert [table["samples"] for table in by_split] == [29, 80, 30]
    assert whole["samples"] == len(suite.samples()) == 95
    for table in by_split:
        members = [sample for sample in suite.samples() if table["split"] in sample.splits]
        value = table["rows"]["none"]["metrics"]["f1"]["value"]
        assert value == pytest.approx(f1(suite, members, answers), abs=1e-3)
    for name, cell in whole["rows"]["none"]["metrics"].items():
        each = [table["rows"]["none"]["metrics"][name]["value"] for table in by_split]
        assert cell["value"] == pytest.approx(sum(each) / 3, abs=1e-3)
    cells = whole["rows"]["none"]["metrics"]
    assert cells["accuracy"]["low"] < cells["accuracy"]["value"] < cells["accuracy"]["high"]
    pooled = f1(suite, suite.samples(), answers)
    assert abs(cells["f1"]["value"] - pooled) > 0.1


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["coco_pope_random", "coco_pope_popular"], ["random", "popular"]),
        (["coco_pope_random", "aokvqa_pope_random"], ["coco_pope_random", "aokvqa_pope_random"]),
        (["coco_pope_random", "gqa_random", "mine"], ["coco_pope_random", "gqa_random", "mine"]),
        (["random_popular", "x"], ["random_popular", "x"]),
        (["coco/random", "gqa/random"], ["coco/random.json", "gqa/random.json"]),
    ],
)
def test_each_file_is_a_column(names, columns):
    paths = [Path(f"{name}.json") for name in names]
    assert list(columns_of(paths).values()) == columns


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("abrandompopul_/", min_size=1, max_size=12).map(lambda t: Path(f"d{t}.json")), unique=True))
def test_two_files_never_share_a_column(paths):
    assert len(set(columns_of(paths).values())) == len(paths)


def test_three_data_sets_are_nine_columns(tmp_path):
    names = [
        f"{data}_pope_{split}" for data in ("coco", "aokvqa", "gqa") for split in ("random", "popular", "adversarial")
    ]
    suite = Pope.on_files(files(tmp_path, **{name: range(n, n + 5) for n, name in enumerate(names)}), tmp_path)
    answers = {("pope", "none", sample.id): "yes" for sample in suite.samples()}
    by_split, _ = Scored(suite, ["none"], answers).tables()
    assert [(table["split"], table["samples"]) for table in by_split] == [(name, 5) for name in names]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run on two question files with names that are markup, about twenty images, in which a preset changes nothing."""
    folder = tmp_path_factory.mktemp("small")
    for n in range(20):
        Image.new("RGB", (56, 56)).save(folder / f"{n}.png")
    paths = files(folder, **{"a|b <img src=x>": range(30), "*c*": range(20, 35)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "answer", lambda m, p, prompts, i, n: ["yes" if "3" in t else "no" for t in prompts])
        result = evaluate(
            *vlmattn.load("embedded"), [Pope.on_files(paths, folder)], ["vhr"], folder / "run", "embedded", say=lambda _: None
        )  # fmt: skip
    return folder, result


def test_a_difference_that_no_image_shows_has_no_interval_anywhere(small):
    folder, result = small
    cell = result.summary["overall"][0]["rows"]["vhr"]["metrics"]["accuracy"]
    assert cell["difference"] == {"value": 0.0, "low": None, "high": None}
    text = markdown_tables(result)
    assert "+0.0 (no interval)" in text
    assert "nan" not in text
    assert any(note.startswith("No interval: fewer than 10 images") for note in notes(result))
    page = html_report(result)
    assert "+0.0 (no interval)" in page
    assert "nan" not in page.split("<h2>How it was run")[0].lower().replace("nanum", "")
    assert "NaN" not in (folder / "run" / "summary.json").read_text()
    row = compare(folder / "run", folder / "run", [("none", "vhr")]).rows[0]
    assert (row.difference.value, row.verdict) == (0, "")


def test_the_command_that_compares_says_it_too(small, run, tmp_path):
    folder = str(small[0] / "run")
    code, out, _ = run("compare", folder, folder, "--pair", "none:vhr", "--out", str(tmp_path / "c.json"))
    assert code == 0
    assert "+0.0 (no interval)" in out
    assert (
        json.loads((tmp_path / "c.json").read_text(), parse_constant=pytest.fail)["rows"][0]["difference"]["low"]
        is None
    )


def test_compare_has_the_runs_own_figures_over_splits_of_two_lengths(small):
    folder, result = small
    for row in compare(folder / "run", folder / "run", [("none", "vhr")]).rows:
        cell = result.summary["overall"][0]["rows"]["none"]["metrics"][row.metric]
        assert row.first == pytest.approx(cell["value"], abs=1e-3)


def test_names_are_text_in_markdown_tables(small):
    _, result = small
    lines = [line for line in markdown_tables(result).splitlines() if line.startswith("|")]
    assert "<img" not in "".join(lines)
    assert "\\*c\\*" in "".join(lines)
    bars = {line.replace("\\|", "").count("|") for line in lines}
    assert len(bars) == 1, "a table that renders"


def test_cells_without_an_interval():
    none = {"value": 3.0, "low": None, "high": None}
    some = {"value": 3.0, "low": 1.0, "high": 4.0}
    assert (spread(none), spread(some)) == ("no interval", "1.0 to 4.0")
    assert change({"difference": none}) == "+3.0 (no interval)"
    assert verdict({"difference": none}, "higher") == ""
    assert verdict({"difference": some}, "higher") == "better"
    assert whiskers([none, some]) == [[0, 2], [0, 1]]


def test_pages_and_code_say_the_same_of_figures():
    """Sentences of the pages, and what the tests above and the suites hold them to."""
    evals, reproduce = (" ".join((PAGES / f"{name}.md").read_text().split()) for name in ("howto-evals", "reproduce"))
    assert "each question file is a column of its own" in evals
    assert "the mean of the figures of its splits" in evals
    assert "fewer than 10 images" in evals
    assert "the exact interval of Clopper and Pearson" in evals
    assert Pope.mean_of_splits
    assert "LLaVA's POPE figure uses 2910 questions of the random split, RUCAIBox's file has 3000" in reproduce
