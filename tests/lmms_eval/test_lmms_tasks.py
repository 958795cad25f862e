"""Where tasks get their questions, and which figures they offer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from lmms_runs import TASKS
from PIL import Image

from vlmattn.errors import InputError, OptionError, UnknownNameError
from vlmattn.evals.suites import Pope, World
from vlmattn.lmms_eval.generation import cut, options_of, stops_of
from vlmattn.lmms_eval.sources import make_suite


@pytest.fixture
def files(tmp_path, monkeypatch):
    """POPE in its published form: two files of three questions about two images."""
    monkeypatch.delenv("VLMATTN_POPE", raising=False)
    monkeypatch.delenv("VLMATTN_POPE_IMAGES", raising=False)
    for name in ("a", "b"):
        Image.new("RGB", (48, 48), "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    for split in ("random", "adversarial"):
        rows = [("a.png", "dog", "yes"), ("a.png", f"cat {split}", "no"), ("b.png", "cup", "yes")]
        lines = [
            {"question_id": i, "image": image, "text": f"Is there a {thing} in the image?", "label": label}
            for i, (image, thing, label) in enumerate(rows)
        ]
        (tmp_path / f"coco_pope_{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def asked(suite):
    return sorted((s.image_id, s.prompt, s.truth, tuple(sorted(s.splits))) for s in suite.samples())


def test_files_by_environment_and_by_name(files, monkeypatch):
    expected = Pope.on_files(sorted(files.glob("*.json")), files)
    by_name = make_suite(data_files={"test": [str(files / "coco_*.json")]}, images=str(files))
    assert asked(by_name) == asked(expected)
    assert len(by_name.samples()) == 4  # two questions are in both splits
    monkeypatch.setenv("VLMATTN_POPE", f"{files}/coco_pope_random.json:{files}/coco_pope_adversarial.json")
    monkeypatch.setenv("VLMATTN_POPE_IMAGES", str(files))
    assert asked(make_suite(suite="pope")) == asked(expected)


def test_parquet_with_images(files):
    datasets = pytest.importorskip("datasets")
    for path in files.glob("*.json"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        columns = {
            "question": [row["text"] for row in rows],
            "answer": [row["label"] for row in rows],
            "image_source": [row["image"] for row in rows],
            "image": [str(files / row["image"]) for row in rows],
        }
        whole = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        whole.to_parquet(str(path.with_suffix(".parquet")))
    found = make_suite(data_files=str(files / "*.parquet"))
    expected = make_suite(data_files=str(files / "*.json"), images=str(files))
    assert asked(found) == asked(expected)
    pictures = {s.image_id: s.images()[0].getpixel((0, 0)) for s in found.samples()}
    assert pictures == {"a.png": (255, 0, 0), "b.png": (0, 0, 255)}
    datasets.Dataset.from_dict({"question": ["?"]}).to_parquet(str(files / "less.parquet"))
    with pytest.raises(InputError, match=r"columns answer, image_source, image are missing"):
        make_suite(data_files=str(files / "less.parquet"))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, InputError, "VLMATTN_POPE="),
        ({"data_files": "nowhere.json"}, InputError, "no such file: nowhere.json"),
        ({"data_files": "coco_pope_random.json"}, InputError, "VLMATTN_POPE_IMAGES=DIR"),
        ({"data_file": "a.json"}, UnknownNameError, "did you mean data_files"),
        ({"suite": "pqa"}, OptionError, "needs worlds"),
        ({"suite": "popes", "worlds": [{}]}, UnknownNameError, "did you mean pope"),
        ({"worlds": [{"visibilty": "dim"}]}, UnknownNameError, "did you mean visibility"),
    ],
)
def test_what_is_wrong_is_said(files, monkeypatch, options, error, match):
    monkeypatch.chdir(files)
    with pytest.raises(error, match=match):
        make_suite(**options)


def test_the_packaged_tasks_are_found():
    printed = subprocess.run([sys.executable, "-m", "vlmattn.lmms_eval"], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str(TASKS)
    pytest.importorskip("lmms_eval.models")
    from lmms_eval.tasks import TaskManager

    found = TaskManager(include_path=str(TASKS), include_defaults=False).all_tasks
    assert found == ["vlmattn_pope", "vlmattn_pope_embedded", "vlmattn_pqa"]


def test_figures_of_several_worlds_have_their_names():
    pytest.importorskip("lmms_eval.models")
    from vlmattn.lmms_eval.task import figures, offered

    suite = make_suite(worlds=[{"visibility": "faint", "count": 2}, {"visibility": "dim", "count": 2}])
    found = figures(suite, {sample.id: suite.expected(sample) for sample in suite.samples()})
    assert found.keys() == offered(suite).keys()
    assert found["accuracy_dim_random"] == found["recall_faint"] == 1
    assert found["yes_ratio_dim_random"] == 0.5


def test_the_yes_ratio_is_that_of_the_answers():
    """lmms-eval's own pope counts it from the truths."""
    pytest.importorskip("lmms_eval.models")
    from vlmattn.lmms_eval.task import figures

    suite = make_suite(worlds=[{"visibility": "faint", "count": 2}])
    found = figures(suite, {sample.id: "Yes, there is." for sample in suite.samples()})
    assert found["yes_ratio"] == found["yes_ratio_random"] == 1
    assert found["accuracy_random"] == 0.5


@pytest.mark.parametrize("name", ["chair", "which", "amber", "amber_questions", "mme", "mmhal"])
def test_the_other_suites_on_scenes_can_be_tasks(name):
    pytest.importorskip("lmms_eval.models")
    from vlmattn.lmms_eval.task import figures, offered

    suite = make_suite(suite=name, worlds=[World("clear", count=4).settings()])
    found = figures(suite, {sample.id: suite.expected(sample) for sample in suite.samples()})
    assert offered(suite).keys() <= found.keys()
    assert suite.headline.name in offered(suite)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"do_sample": False, "max_new_tokens": 1024}),
        ({"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["a"]},
         {"do_sample": False, "max_new_tokens": 128, "num_beams": 1}),
        ({"temperature": 0.7, "top_p": None}, {"do_sample": True, "temperature": 0.7, "max_new_tokens": 1024}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False, "max_new_tokens": 1024}),
        ({"temperature": 0, "do_sample": True, "top_p": 0.5}, {"do_sample": False, "max_new_tokens": 1024}),
        ({"do_sample": True, "top_p": 0.5}, {"do_sample": True, "top_p": 0.5, "max_new_tokens": 1024}),
    ],
)  # fmt: skip
def test_generation_settings(settings, expected):
    assert options_of(settings, None) == expected
    assert options_of(settings, 7) == {**expected, "max_new_tokens": 7}


def test_unknown_generation_settings_are_named():
    with pytest.warns(UserWarning, match="no generation setting image_aspect_ratio"):
        assert "image_aspect_ratio" not in options_of({"image_aspect_ratio": "original"}, None)


def test_answers_end_at_stops():
    assert stops_of({"until": ["\n\n"]}) == []  # lmms-eval's own addition
    assert stops_of({"until": "Q:"}) == ["Q:"]
    assert cut(" no. Q: yes\nA", stops_of({"until": ["\n", "Q:", ""]})) == "no."
