"""Free text on published files: MMHal-Bench, LLaVA-Bench, and the judges that rate it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from on_data import published
from PIL import Image

from vlmattn.errors import InputError
from vlmattn.evals.judges import Ratings, RuleJudge, Verdict, content_words, load_judge
from vlmattn.evals.suites.llava_bench import LlavaBench
from vlmattn.evals.suites.mmhal import MMHal


def by_length(question: str, reference: str, known, answer: str) -> Verdict:
    """A judge that likes long answers, up to six words."""
    words = len(answer.split())
    return Verdict(min(words, 6), hallucinated=words < 2)


def values(suite, answers) -> dict[str, float]:
    records = suite.records(answers)
    sums = np.array([[record[name] for name in suite.fields] for record in records.values()]).sum(0)
    return {metric.name: round(float(metric.value(suite.fields, sums)), 4) for metric in suite.metrics}


RULE = [
    # question, reference, known, answer, rating
    ("What color is the bus?", "The bus is yellow.", ["Bus"], "It is yellow.", 6),
    ("What color is the bus?", "The bus is yellow.", ["Bus"], "The bus is red.", 0),
    ("Is the bus red?", "The bus is red.", [], "The red bus", 6),  # the reference has the question's words only
    ("What is on the table?", "Two cups and a fork.", ["Table"], "Two cups", 4),
    ("What is on the table?", "Two cups and a fork.", ["Table"], "Two cups, a fork and a dog", 2),  # no dog is known
    ("What is on the table?", "Two cups and a fork.", ["Dog"], "Two cups, a fork and a puppy", 6),  # here one is
    ("What is on the dog?", "A hat and a coat.", [], "A hat and a coat on the dog", 6),  # the question names it
    ("What is on the table?", "A fork.", [], "A knife", 0),
    ("Where is the cat?", "There is no cat in the image.", [], "There isn't a cat.", 6),
    ("Where is the cat?", "There is no cat in the image.", [], "The cat is on the sofa.", 0),
    ("What is it?", "A dog’s leash", [], "The leashes of dogs", 6),
    ("What is it?", "", [], "A leash", 0),
    ("What is it?", "A leash", [], "", 0),
]


@pytest.mark.parametrize(("question", "reference", "known", "answer", "rating"), RULE)
def test_the_rule_by_hand(question, reference, known, answer, rating):
    verdict = RuleJudge()(question, reference, known, answer)
    assert verdict.rating == pytest.approx(rating)
    assert verdict.hallucinated is (rating < 3)


def test_content_words():
    assert content_words("There are two DOGS, aren't there? Never in the image!") == {"two", "dog", "no"}


def test_ratings_are_asked_for_once():
    asked = []

    def judge(question, reference, known, answer):
        asked.append(answer)
        return Verdict(4, False)

    ratings = Ratings(judge)
    for key, answer in (("1", "a"), ("1", "a"), ("1", "b"), ("2", "a"), ("1", "b")):
        assert ratings.of(key, "q", "r", (), answer).rating == 4
    assert asked == ["a", "b", "a"]


def test_judges_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(
        "from vlmattn.evals.judges import Verdict\n"
        "LIMIT = 3\n"
        "def kind(question, reference, known, answer):\n    return Verdict(6, False)\n"
        "def odd(question, reference, known, answer):\n    return 5\n"
        "def wild(question, reference, known, answer):\n    return Verdict(7, False)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(load_judge("rule"), RuleJudge)
    kind = load_judge("my_judges:kind")
    assert kind("q", "r", (), "a") == Verdict(6, False)
    assert Ratings(kind).name == "my_judges:kind"
    assert Ratings(RuleJudge()).name == Ratings().name == "rule (experimental)"
    for name, message in (
        ("gpt", "unknown judge 'gpt'; it is rule, or a function of yours as package.module:function"),
        ("my_judges:", "unknown judge"),
        ("none_such:f", "cannot import none_such"),
        ("my_judges:f", "my_judges has no 'f'"),
        ("my_judges:LIMIT", "LIMIT is no function"),
    ):
        with pytest.raises(InputError, match=message):
            load_judge(name)
    with pytest.raises(InputError, match=r"my_judges:odd returned 5; it must return vlmattn\.evals\.judges\.Verdict"):
        Ratings(load_judge("my_judges:odd")).of("1", "q", "r", (), "a")
    with pytest.raises(InputError, match=r"within 0\.\.6, got 7"):
        Ratings(load_judge("my_judges:wild")).of("1", "q", "r", (), "a")


QUESTION = {
    "question_type": "attribute", "question_topic": "outdoor", "image_id": "a1", "image_src": "https://x.org/8/7/one.jpg?s=1",
    "image_content": ["Bus", "Person"], "question": "What color is the bus?", "gt_answer": "The bus is yellow.", "model_answer": "",
}  # fmt: skip


@pytest.fixture
def mmhal(tmp_path) -> Path:
    """Three questions in the form of response_template.json."""
    more = {
        "question": "What is on the table?",
        "gt_answer": "Two cups and a fork.",
        "image_content": ["Table", "Cup", "Fork"],
    }
    items = [
        QUESTION,
        {**QUESTION, **more, "image_id": "b2", "image_src": "https://x.org/two.png", "question_type": "holistic"},
        {**QUESTION, **more, "image_id": "c3", "image_src": "https://x.org/three", "question_type": "holistic"},
    ]
    (tmp_path / "images").mkdir()
    for name in ("one.jpg", "b2.png", "c3.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    path = tmp_path / "response_template.json"
    path.write_text(json.dumps(items))
    return path


def test_mmhal_by_hand(mmhal):
    suite = MMHal.on_files(mmhal, mmhal.parent / "images")
    samples = suite.samples()
    assert [sample.splits for sample in samples] == [("attribute",), ("holistic",), ("holistic",)]
    assert samples[0].prompt == "What color is the bus?"
    assert suite.expected(samples[0]) == "The bus is yellow."
    assert [sample.images.paths[0].name for sample in samples] == ["one.jpg", "b2.png", "c3.jpg"]  # by address or id
    answers = {"a1": "Yellow", "b2": "Two cups", "c3": "Two cups, a fork and a dog"}
    assert values(suite, answers) == {"rating": 4, "hallucinations": 33.3333}
    records = suite.records(answers)
    assert [suite.right(record) for record in records.values()] == [True, True, False]
    assert values(suite, {s.id: s.truth.reference for s in samples}) == {"rating": 6, "hallucinations": 0}
    assert suite.settings["judge"] == "rule (experimental)"
    assert list(suite.records({"b2": "cups"})) == ["b2"]
    assert [s.id for s in MMHal.on_files(mmhal, mmhal.parent, limit=2).samples()] == ["a1", "b2"]


def test_a_judge_of_ones_own_rates(mmhal):
    suite = published("mmhal", mmhal, mmhal.parent / "images", None, 77, judge=by_length)
    assert suite.max_new_tokens == 77
    assert suite.settings["judge"].endswith("test_freetext:by_length")
    assert values(suite, {"a1": "one two", "b2": "one two three", "c3": "one"}) == {
        "rating": 2,
        "hallucinations": 66.6667,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image_id": "a1"}\n{"image_id": ', r"response_template\.json:2: not valid JSON"),
        ('[{"image_id": "a1"},\n{"image_id', r"response_template\.json:2: not valid JSON"),
        (json.dumps([{**QUESTION, "image_content": "Bus"}]), "item 1: image_content must be a list of texts"),
        (json.dumps([QUESTION, QUESTION]), r"item 2: image_id 'a1' is there twice \(first .*item 1\); keep one of them"),
        (json.dumps([{key: QUESTION[key] for key in QUESTION if key != "gt_answer"}]), "item 1: an MMHal-Bench question needs image_id, .*gt_answer"),
        (json.dumps([{"id": 1, "type": "generative", "truth": []}]), "item 1: an MMHal-Bench question needs image_id"),
        ("[]", "an MMHal-Bench question is needed, the file holds none"),
    ],
)  # fmt: skip
def test_bad_mmhal_files_are_named(mmhal, text, message):
    mmhal.write_text(text)
    with pytest.raises(InputError, match=message):
        MMHal.on_files(mmhal, mmhal.parent / "images")
    with pytest.raises(InputError, match="cannot read"):
        MMHal.on_files(mmhal.parent, mmhal.parent)


def lines(path: Path, *items: dict) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture
def bench(tmp_path) -> Path:
    """LLaVA-Bench's folder with three questions about two images."""
    folder = tmp_path / "bench"
    folder.mkdir()
    texts = ("What color is the bus?", "Describe it.", "Where is it?")
    categories = ("conv", "detail", "conv")
    lines(
        folder / "questions.jsonl",
        *({"question_id": n, "image": f"00{1 + n // 2}.jpg", "category": categories[n], "text": texts[n]} for n in range(3)),
    )  # fmt: skip
    lines(
        folder / "context.jsonl",
        {"id": "001", "image": "001.jpg", "caption": "A yellow bus and a dog."},
        {"id": "002", "image": "002.jpg", "caption": ["A street.", "A cat."]},
    )
    answers = ("The bus is yellow.", "A yellow bus and a truck.", "In the street.")
    lines(folder / "answers_gpt4.jsonl", *({"question_id": n, "text": answers[n]} for n in range(3)))
    return folder


def test_llava_bench_by_hand(bench, tmp_path):
    suite = LlavaBench.on_files(bench, tmp_path)
    samples = suite.samples()
    assert [(s.id, s.image_id, s.splits[0]) for s in samples] == [("0", "001.jpg", "conv"), ("1", "001.jpg", "detail"), ("2", "002.jpg", "conv")]  # fmt: skip
    assert samples[2].truth.known == ("A street.", "A cat.")
    assert samples[0].images.paths == (tmp_path / "001.jpg",)
    # ratings: 6 of 6; 2 words of 3 are 4 of 6, the dog is in the caption; the street is right, but no horse is known: 2 of 6
    answers = {"0": "Yellow", "1": "A bus, yellow, and a dog", "2": "In the street with a horse"}
    assert values(suite, answers) == {"relative": round(100 * 12 / 18, 4), "hallucinations": 33.3333}
    assert values(suite, {s.id: suite.expected(s) for s in samples}) == {"relative": 100, "hallucinations": 0}


def test_llava_bench_rates_the_reference_by_the_same_judge(bench, tmp_path):
    asked = []

    def judge(question, reference, known, answer):
        asked.append(answer)
        return by_length(question, reference, known, answer)

    suite = published("llava_bench", bench, tmp_path, None, 10, judge=judge)
    answers = {"0": "one", "1": "one two three", "2": "one two"}
    expected = {"relative": round(100 * 6 / (4 + 6 + 3), 4), "hallucinations": 33.3333}
    assert values(suite, answers) == values(suite, answers) == expected
    assert len(asked) == 6  # three answers, three references, each once


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("questions.jsonl", '{"question_id": 0, "image": "001.jpg", "category": "conv", "text": "?"}\n{"quest', r"questions\.jsonl:2: not valid JSON"),
        ("questions.jsonl", '{"question_id": 0, "image": "001.jpg", "text": "?"}', r"questions\.jsonl:1: a LLaVA-Bench question needs"),
        ("questions.jsonl", '{"question_id": 9, "image": "001.jpg", "category": "conv", "text": "?"}', r"questions\.jsonl:1: question 9 is not in answers_gpt4"),
        ("questions.jsonl", '{"question_id": 0, "image": "9.jpg", "category": "conv", "text": "?"}', r"questions\.jsonl:1: image 9\.jpg is not in context"),
        ("answers_gpt4.jsonl", '{"question_id": 0, "text": "a"}\n{"question_id": 0, "text": "b"}', r"answers_gpt4\.jsonl:2: question_id '0' is there twice"),
        ("context.jsonl", '{"image": "001.jpg"}', r"context\.jsonl:1: a LLaVA-Bench context needs image and caption"),
        ("context.jsonl", "", "the file holds none"),
    ],
)  # fmt: skip
def test_bad_llava_bench_files_are_named(bench, tmp_path, file, text, message):
    (bench / file).write_text(text)
    with pytest.raises(InputError, match=message):
        LlavaBench.on_files(bench, tmp_path)
    with pytest.raises(InputError, match=r"LLaVA-Bench is one with questions\.jsonl"):
        LlavaBench.on_files(bench / file, tmp_path)
    (bench / file).unlink()
    with pytest.raises(InputError, match="cannot read"):
        LlavaBench.on_files(bench, tmp_path)


@pytest.mark.parametrize("name", ["mmhal", "llava_bench", "captions"])
def test_images_are_needed(name, tmp_path):
    with pytest.raises(InputError, match=f"suite {name} needs --images"):
        published(name, tmp_path, None, None, 10)
