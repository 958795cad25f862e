"""Captions against people's: BLEU by hand, both metrics beside pycocoevalcap's own, bad files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from on_data import published

from vlmattn.errors import InputError
from vlmattn.evals.stats import Bootstrap
from vlmattn.evals.suites.captions import Captions, CorpusBleu, bleu_counts, words

CAPTIONS = [
    ["A cat sits on a red mat.", "The cat is on the mat."],
    ["Two dogs play with a ball in the park.", "dogs playing, with a ball"],
    ["A man rides a horse.", "Someone riding a brown horse on the beach"],
    ["A plate of food on a table.", "Some food is on the plate."],
]
ANSWERS = {
    "10": "A cat sits on the mat .",
    "11": "two dogs play with a ball in the park",
    "12": "a man on the beach",
    "13": "A train!",
}


def write(path: Path, captions=CAPTIONS) -> Path:
    images = [{"id": 10 + n, "file_name": f"{n}.jpg"} for n in range(len(captions))]
    rows = [{"image_id": 10 + n, "caption": text} for n, texts in enumerate(captions) for text in texts]
    path.write_text(json.dumps({"images": images, "annotations": [*rows, {"image_id": 99, "caption": "of another"}]}))
    return path


def metric(name: str):
    return next(metric for metric in Captions.metrics if metric.name == name)


@pytest.mark.parametrize(
    ("text", "same"),
    [("A man's dog, isn’t it?", ["a", "man's", "dog", "isn't", "it"]), ("red-white 2 cats...", ["red", "white", "2", "cats"]), ("", []), ("'quoted'", ["quoted"])],
)  # fmt: skip
def test_words(text, same):
    assert words(text) == same


def test_bleu_by_hand():
    fields = Captions.fields
    counts = bleu_counts(
        words("the cat sat on the the mat"), [words("the cat sat on a mat"), words("the cat is on the mat there now")]
    )
    # "the" may count twice; pairs: the cat, cat sat, sat on, on the, the mat; threes: the cat sat, cat sat on
    assert counts == {
        "words": 7, "reference_words": 6, "match1": 6, "match2": 5, "match3": 2, "match4": 1,
        "ngrams1": 7, "ngrams2": 6, "ngrams3": 5, "ngrams4": 4,
    }  # fmt: skip
    short = bleu_counts(words("the cat sat on"), [words("the cat sat on a mat")])
    total = {name: counts[name] + short[name] for name in counts}
    precisions = [(6 + 4) / (7 + 4), (5 + 3) / (6 + 3), (2 + 2) / (5 + 2), (1 + 1) / (4 + 1)]
    expected = 100 * math.exp(1 - 12 / 11) * math.prod(precisions) ** 0.25
    sums = np.array([total.get(name, 0.0) for name in fields])
    found = CorpusBleu("bleu4", {}, {}, "").value(fields, np.stack([sums, np.zeros_like(sums)]))
    assert found == pytest.approx([expected, 0.0])
    long = np.array([counts.get(name, 0.0) for name in fields])
    assert metric("bleu4").value(fields, long) == pytest.approx(100 * (6 / 7 * 5 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    none = np.array([bleu_counts(["x"], [["y"]]).get(name, 0.0) for name in fields])
    assert metric("bleu4").value(fields, none) == 0


def test_bleu_is_resampled_over_images():
    rows = [bleu_counts(words("a b c d"), [words(gold)]) for gold in ["a b c d", "e f g h"] * 5]
    records = np.array([[row.get(name, 0.0) for name in Captions.fields] for row in rows])
    interval = Bootstrap([str(image) for image in range(10)], resamples=2000).interval(
        metric("bleu4"), Captions.fields, records
    )
    assert interval.value == pytest.approx(50)  # half of the n-grams of every length
    assert (interval.low, interval.high) == (pytest.approx(20), pytest.approx(80))  # of ten images, by the binomial


class TestWithScorer:
    """With pycocoevalcap."""

    @pytest.fixture(autouse=True)
    def scorer(self):
        pytest.importorskip("pycocoevalcap")

    def test_both_metrics_are_those_of_pycocoevalcap(self, tmp_path):
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider

        suite = Captions.on_files(write(tmp_path / "captions_val.json"), tmp_path)
        records = suite.records(ANSWERS)
        gold = {str(10 + n): [" ".join(words(text)) for text in texts] for n, texts in enumerate(CAPTIONS)}
        said = {key: [" ".join(words(text))] for key, text in ANSWERS.items()}
        mean, single = Cider().compute_score(gold, said)
        assert [records[key]["cider"] for key in gold] == pytest.approx(list(single))
        sums = np.array([[record[name] for name in suite.fields] for record in records.values()]).sum(0)
        assert metric("cider").value(suite.fields, sums) == pytest.approx(100 * mean)
        corpus, _ = Bleu(4).compute_score(gold, said, verbose=0)
        assert corpus[3] > 0.2
        assert metric("bleu4").value(suite.fields, sums) == pytest.approx(100 * corpus[3], rel=1e-6)
        assert metric("length").value(suite.fields, sums) == (6 + 9 + 5 + 2) / 4

    def test_answers_are_scored_alike_alone_and_together(self, tmp_path):
        suite = Captions.on_files(write(tmp_path / "captions_val.json"), tmp_path)
        together = suite.records(ANSWERS)
        for sample in suite.samples():
            assert suite.score(sample, ANSWERS[sample.id]) == together[sample.id]
        assert suite.records({"11": ANSWERS["11"]}) == {"11": together["11"]}
        assert suite.right(together["11"])
        assert not suite.right(together["13"])

    def test_samples(self, tmp_path):
        suite = published("captions", write(tmp_path / "captions_val.json"), tmp_path / "images", 3, 20)
        assert suite.max_new_tokens == 20
        assert [sample.id for sample in suite.samples()] == ["10", "11", "12"]
        first = suite.samples()[0]
        assert first.images.paths == (tmp_path / "images" / "0.jpg",)
        assert suite.expected(first) == "A cat sits on a red mat."
        assert "caption" in first.prompt

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"images": [\n{"id": 1', r"c\.json:2: not valid JSON"),
            ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\] has no 'file_name'"),
            ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "category_id": 3}]}', r"annotations\[0\] has no 'caption'"),
            ('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', r"image 1 \(a\) has no caption; give the captions file"),
            ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}', r"images\[1\] has the id 1 of an earlier one"),
            ('{"images": [], "annotations": []}', "it holds no images"),
            ("[]", "not a COCO annotation file"),
        ],
    )  # fmt: skip
    def test_bad_files_are_named(self, tmp_path, text, message):
        path = tmp_path / "c.json"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            Captions.on_files(path, tmp_path)
        with pytest.raises(InputError, match="cannot read"):
            Captions.on_files(tmp_path / "none.json", tmp_path)


def test_without_scorer_the_remedy_is_said(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)  # importing it fails
    with pytest.raises(InputError, match="pip install pycocoevalcap"):
        Captions.on_files(write(tmp_path / "captions_val.json"), tmp_path)
