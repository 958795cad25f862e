"""Batches: which questions go together, and what happens when memory or an image is missing."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError
from vlmattn.evals import asking, runner
from vlmattn.evals.batching import Parts, batches, is_out_of_memory, lengths
from vlmattn.evals.prompts import encode
from vlmattn.evals.report import notes
from vlmattn.evals.runner import evaluate
from vlmattn.evals.suites import PQA, Pope, World
from vlmattn.evals.suites.base import Sample


@pytest.fixture(scope="module")
def bundled():
    return vlmattn.load("embedded")


def samples(count: int) -> list[Sample]:
    return [Sample(str(i), str(i), "c", ("s",), "?", list, None) for i in range(count)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 9), st.none() | st.integers(1, 100))
def test_batches_hold_every_sample_once_and_keep_their_bounds(sizes, most, tokens):
    given = samples(len(sizes))
    found = batches(given, sizes, most, tokens)
    length = dict(zip((sample.id for sample in given), sizes, strict=True))
    assert sorted(sample.id for batch in found for sample in batch) == sorted(length)
    longest = [max(length[sample.id] for sample in batch) for batch in found]
    assert longest == sorted(longest, reverse=True)  # the longest first
    for batch, top in zip(found, longest, strict=True):
        assert len(batch) <= most
        assert tokens is None or len(batch) == 1 or top * len(batch) <= tokens
    for batch, after in pairwise(found):  # none is smaller than it must be
        full = len(batch) == most or (tokens is not None and length[batch[0].id] * (len(batch) + 1) > tokens)
        assert full, (batch, after)


def test_lengths_are_those_of_the_prompts(bundled):
    model, processor = bundled
    suite = PQA.on_scenes(World("clear", 0, 8), (2, 4), 1)
    found = lengths(model, processor, suite.samples())
    for sample, length in zip(suite.samples(), found, strict=True):
        true = encode(model, processor, [sample.prompt], [sample.images()])["input_ids"].shape[1]
        assert abs(true - length) <= 2 * sample.image_count  # the words that stand between images


def test_memory_that_is_short_halves_the_batch_once_and_for_all():
    said, tried = [], []

    def run(items):
        tried.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [str(item) for item in items]

    parts = Parts(said.append)
    assert parts(run, range(10)) == [str(i) for i in range(10)]
    assert tried == [10, 5, 3, 3, 3, 1]
    assert parts.cut
    assert parts(run, range(4)) == [str(i) for i in range(4)]
    assert tried[6:] == [3, 1]  # what was too much is not tried again
    assert parts(run, range(2)) == ["0", "1"]
    assert not parts.cut
    assert len(said) == 2
    assert "10 questions at once; going on with 5" in said[0]


def test_one_question_that_is_too_much_and_other_errors_are_raised():
    def short(items):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with pytest.raises(StateError, match="memory is short for a single question"):
        Parts(lambda _: None)(short, [1, 2])

    def broken(items):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Parts(lambda _: None)(broken, [1, 2])
    assert not is_out_of_memory(RuntimeError("shapes"))


def test_a_run_short_of_memory_says_so_and_has_the_same_answers(bundled, tmp_path, monkeypatch):
    suite, said = Pope.on_scenes([World("faint", 0.0, 4)]), []
    whole = evaluate(*bundled, [suite], ["pai"], tmp_path / "a", "embedded", 20, say=said.append)
    assert not any("Memory" in note for note in notes(whole))
    real = asking.answer

    def short(model, processor, prompts, images, most):
        if len(prompts) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, processor, prompts, images, most)

    monkeypatch.setattr(asking, "answer", short)
    cut = evaluate(*bundled, [suite], ["pai"], tmp_path / "b", "embedded", 20, say=said.append)
    assert cut.answers == whole.answers
    assert cut.summary["cost"]["pai"]["cut_batches"] > 0
    assert "Memory was short" in notes(cut)[0]
    assert any("going on with" in line for line in said)


@pytest.fixture
def questions(tmp_path):
    """Four questions about three images: one is missing, one is damaged."""
    rows = [
        {"question_id": n, "image": f"{name}.png", "text": f"Is there a {thing} in the image?", "label": label}
        for n, (name, thing, label) in enumerate(
            [("good", "cat", "yes"), ("good", "dog", "no"), ("gone", "cat", "no"), ("damaged", "cat", "no")]
        )
    ]
    path = tmp_path / "coco_pope_random.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (56, 56), "green").save(tmp_path / "good.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "good.png").read_bytes()[:50])
    return path


def test_skip_skips_whatever_a_picture_may_be(bundled, tmp_path):
    """A size bomb, a drawing, a pipe, a folder, and files that Pillow fails at in many ways."""
    Image.new("RGB", (56, 56), "green").save(tmp_path / "good.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:24])
    (tmp_path / "sizes.ppm").write_bytes(b"P6\n2\xc2\x9c 2\n255\n" + bytes(20))
    (tmp_path / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    odd = [
        "bomb.png",
        "cut.png",
        "sizes.ppm",
        "drawing.eps",
        "pipe.png",
        "folder.png",
        "gone.png",
    ]
    rows = [
        {"question_id": n, "image": name, "text": "Is there a cat in the image?", "label": "no"}
        for n, name in enumerate(["good.png", *odd])
    ]
    (tmp_path / "coco_pope_random.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = Pope.on_files([tmp_path / "coco_pope_random.json"], tmp_path)
    result = evaluate(*bundled, [suite], ["none"], tmp_path / "out", "embedded", on_error="skip")
    assert len(result.summary["skipped"]) == len(odd)
    assert len({row["id"] for row in result.summary["skipped"]}) == len(odd)


def test_images_that_cannot_be_read_stop_a_run(bundled, questions, tmp_path):
    suite = Pope.on_files([questions], tmp_path)
    with pytest.raises(InputError, match=r"image not found: .*gone\.png \(1 of 3 images\).*--on-error skip"):
        evaluate(*bundled, [suite], ["none"], tmp_path / "out", "embedded")
    assert not (tmp_path / "out").exists()  # noticed before anything is asked
    Image.new("RGB", (56, 56), "red").save(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"damaged\.png.*run the same command again"):
        evaluate(*bundled, [suite], ["none"], tmp_path / "out", "embedded", batch_size=1)
    kept = (tmp_path / "out" / "journal-0.jsonl").read_bytes().count(b"\n")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "damaged.png")
    said: list[str] = []
    mended = evaluate(*bundled, [suite], ["none"], tmp_path / "out", "embedded", batch_size=1, say=said.append)
    assert len(mended.answers) == 4
    assert kept == 3  # nothing is lost: the three before it are not asked again
    assert any(line.startswith("resuming: 3 answers") for line in said)


def test_images_that_cannot_be_read_are_left_out_for_all_presets_and_named(bundled, questions, tmp_path):
    suite = Pope.on_files([questions], tmp_path)
    result = evaluate(*bundled, [suite], ["pai"], tmp_path / "out", "embedded", on_error="skip", say=lambda _: None)
    assert {preset for _, preset, _ in result.answers} == {"none", "pai"}
    assert {Path(row["id"]).parts[0] for row in result.summary["skipped"]} == {"gone.png", "damaged.png"}
    assert [table["samples"] for table in result.summary["tables"]] == [2]
    note, about_intervals = notes(result)
    assert about_intervals.startswith("No interval")  # from two images
    assert note.startswith("2 questions are left out for all presets")
    assert ("gone.png" in note) or ("damaged.png" in note)
    for name in ("gone", "damaged"):
        Image.new("RGB", (56, 56), "red").save(tmp_path / f"{name}.png")
    mended = evaluate(*bundled, [suite], ["pai"], tmp_path / "out", "embedded", on_error="skip", say=lambda _: None)
    assert mended.summary["skipped"] == []  # the same command asks what it could not
    assert [table["samples"] for table in mended.summary["tables"]] == [4]
    for name in ("gone", "damaged"):
        (tmp_path / f"{name}.png").unlink()
    (tmp_path / "good.png").unlink()
    with pytest.raises(InputError, match="no sample could be read"):
        evaluate(*bundled, [suite], ["none"], tmp_path / "none", "embedded", on_error="skip", say=lambda _: None)


def test_ids_that_are_there_twice_are_refused(bundled, tmp_path):
    suite = Pope.on_scenes([World("faint", 0.0, 2)])
    suite._samples = [*suite.samples(), suite.samples()[0]]
    with pytest.raises(InputError, match=r"suite pope: id 'faint/0/.*' is there twice"):
        evaluate(*bundled, [suite], ["none"], tmp_path / "out", "embedded")
    good = Pope.on_scenes([World("faint", 0.0, 2)])
    for options, message in (
        ({"suites": [good, good]}, "suite 'pope' is given twice"),
        ({"on_error": "ignore"}, "on_error must be one of stop, skip"),
        ({"batch_tokens": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
    ):
        given = {"suites": [good], **options}
        with pytest.raises(OptionError, match=message):
            evaluate(*bundled, given.pop("suites"), ["none"], tmp_path / "out", "embedded", **given)


def test_a_batch_of_other_samples_is_not_taken_for_done(bundled, tmp_path, monkeypatch):
    """The estimate of lengths may change when the first image of a run is mended; then other samples share a batch."""
    suite = Pope.on_scenes([World("faint", 0.0, 3)])
    quiet = {"batch_size": 5, "say": lambda _: None}
    whole = evaluate(*bundled, [suite], ["none"], tmp_path / "whole", "embedded", **quiet)
    real = runner.batches
    monkeypatch.setattr(runner, "batches", lambda samples, *more: real(list(reversed(samples)), *more))
    evaluate(*bundled, [suite], ["none"], tmp_path / "run", "embedded", **quiet)
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "journal.jsonl").write_text("".join(lines[:3]))
    monkeypatch.setattr(runner, "batches", real)
    again = evaluate(*bundled, [suite], ["none"], tmp_path / "run", "embedded", **quiet)
    assert again.answers == whole.answers
