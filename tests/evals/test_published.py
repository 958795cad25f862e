"""Suites on published formats: AMBER, MME, HallusionBench; small files in the published form, and the real ones where they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from on_data import published
from PIL import Image

from vlmattn.errors import InputError, UnknownNameError
from vlmattn.evals.suites import all_suites, make_suite
from vlmattn.evals.suites.amber import AmberCaptions, AmberQuestions
from vlmattn.evals.suites.letters import read_letter
from vlmattn.evals.suites.mme import MME
from vlmattn.evals.suites.vqa import VQA, normal
from vlmattn.evals.suites.yesno import first_yes_or_no

AMBER = Path(__file__).parents[2].parent / "shared" / "data" / "amber"


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.mark.parametrize(
    ("answer", "said"),
    [("Yes.", True), ("no", False), ("The answer is No, it is not", False), ("maybe", None), ("", None), ("Nothing", None), ("I know: yes", True)],
)  # fmt: skip
def test_first_yes_or_no(answer, said):
    assert first_yes_or_no(answer) is said


@pytest.fixture
def amber(tmp_path):
    """Two captions and four questions in AMBER's form."""
    folder = tmp_path / "amber"
    folder.mkdir()
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sky", "person", "ship", "ship"], "hallu": ["cloud", "dog"]},
        {"id": 2, "type": "generative", "truth": ["road"], "hallu": ["car"]},
        {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 5, "type": "relation", "truth": "no"},
        {"id": 6, "type": "discriminative-relation", "truth": "yes"},
    ]
    queries = [{"id": n, "image": f"AMBER_{1 + n % 2}.jpg", "query": f"query {n}"} for n in range(1, 7)]
    relation = {
        "sky": [],
        "person": ["man", "woman"],
        "ship": ["boat"],
        "road": ["path"],
        "cloud": [],
        "dog": ["puppy"],
        "car": [],
        "line": [],
    }
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "query_generative.json").write_text(json.dumps(queries[:2]))
    (folder / "query_all.json").write_text(json.dumps(queries))
    (folder / "relation.json").write_text(json.dumps(relation))
    (folder / "safe_words.txt").write_text("line\nlight")
    for number in (1, 2):
        picture(tmp_path / "images" / f"AMBER_{number}.jpg")
    return folder


def test_amber_captions_by_hand(amber, tmp_path):
    suite = AmberCaptions.on_files(amber, tmp_path / "images")
    first, second = suite.samples()
    assert first.images()[0].size == (8, 8)
    found = suite.score(first, "Two men and a puppy on a boat; a line of clouds under the sky. A car.")
    # named: man, puppy, boat, line, cloud, sky, car; line is skipped but counts; puppy, cloud and car are unsafe
    assert found == {
        "words": 7, "unsafe": 3, "truth": 4, "covered": 3, "captions": 1, "unsafe_captions": 1, "traps": 2, "fallen_for": 2,
    }  # fmt: skip
    assert not suite.right(found)
    clean = suite.score(second, "A path.")
    assert suite.right(clean)
    assert clean["covered"] == clean["truth"] == 1
    assert suite.expected(second) == "road"


def test_amber_questions_by_hand(amber, tmp_path):
    suite = AmberQuestions.on_files(amber, tmp_path / "images")
    assert [sample.splits[0] for sample in suite.samples()] == ["existence", "state", "relation", "relation"]
    answers = dict(zip("3456", ("No.", "No", "yes", "perhaps"), strict=True))
    records = list(suite.records(answers).values())
    total = {name: sum(record[name] for record in records) for name in suite.fields}
    assert total == {"right": 1, "wrong": 3, "yes": 1, "tp": 1, "said_no": 2, "is_no": 2}
    values = {
        metric.name: metric.value(suite.fields, [total[name] for name in suite.fields]) for metric in suite.metrics
    }
    assert values["precision"] == values["recall"] == values["f1"] == 50
    assert values["accuracy"] == values["yes_ratio"] == 25
    assert len(AmberQuestions.on_files(amber, tmp_path / "images", limit=1).samples()) == 3


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("annotations.json", '[{"id": 1, "type": "poem", "truth": "yes"}]', "item 1: unknown type 'poem'"),
        ("annotations.json", '[{"id": 1, "truth": "yes"}]', "item 1: an AMBER annotation needs id, type and truth"),
        ("annotations.json", '[{"id": 3, "type": "relation", "truth": "maybe"}]', "truth must be yes or no"),
        ("annotations.json", '[{"id": 3, "type": "relation", "truth": "no"}, {"id": 3, "type": "relation", "truth": "no"}]', "id 3 is there twice"),
        ("annotations.json", '[{"id": 3, "type"', "not valid JSON"),
        ("query_all.json", '{"id": 99, "image": "AMBER_1.jpg", "query": "?"}', "query_all.json:1: query 99 has no annotation"),
    ],
)  # fmt: skip
def test_bad_amber_files_are_named(amber, tmp_path, file, content, message):
    (amber / file).write_text(content)
    with pytest.raises(InputError, match=message):
        AmberQuestions.on_files(amber, tmp_path / "images")


@pytest.mark.skipif(not AMBER.is_dir(), reason="needs AMBER's published files")
def test_the_published_amber_files_are_read(monkeypatch):
    captions, questions = AmberCaptions.on_files(AMBER, AMBER), AmberQuestions.on_files(AMBER, AMBER)
    assert len(captions.samples()) == 1004
    counts: dict[str, int] = {}
    for sample in questions.samples():
        counts[sample.splits[0]] = counts.get(sample.splits[0], 0) + 1
    assert counts == {"state": 4764, "number": 2072, "action": 792, "existence": 4924, "relation": 1664}
    assert sum(not sample.truth for sample in questions.samples()) == 9427
    perfect = captions.score(captions.samples()[0], "sky, forest, grass, person, lake, mountain, road")
    assert perfect["unsafe"] == 0
    assert perfect["covered"] == perfect["truth"] == 7


@pytest.fixture
def mme(tmp_path):
    folder = tmp_path / "MME"
    for name, truth in (("a", "Yes"), ("b", "No")):
        picture(folder / "existence" / f"{name}.jpg")
        other = "No" if truth == "Yes" else "Yes"
        (folder / "existence" / f"{name}.txt").write_text(
            f"Is there a cat? Please answer yes or no.\t{truth}\nA dog?\t{other}\n"
        )
    picture(folder / "scene" / "images" / "c.png")
    (folder / "scene" / "questions_answers_YN").mkdir()
    (folder / "scene" / "questions_answers_YN" / "c.txt").write_text("Indoors?\tYes\nOutdoors?\tNo\n")
    return folder


def test_mme_scores_pairs(mme):
    suite = MME.on_files(mme)
    assert [sample.id for sample in suite.samples()] == [
        "existence/a.jpg/0", "existence/a.jpg/1", "existence/b.jpg/0", "existence/b.jpg/1", "scene/c.png/0", "scene/c.png/1",
    ]  # fmt: skip
    answers = dict(
        zip((s.id for s in suite.samples()), ("Yes", "No", "no.", "No", "The answer is yes", "no"), strict=True)
    )
    records = list(suite.records(answers).values())
    total = [sum(record[name] for record in records[:4]) for name in suite.fields]
    values = {metric.name: float(metric.value(suite.fields, total)) for metric in suite.metrics}
    assert values == {"score": 75 + 50, "accuracy": 75, "accuracy_plus": 50, "yes_ratio": 25}
    assert records[4]["right"] == 0  # no yes among the first four letters: neither yes nor no
    assert len(MME.on_files(mme, limit=1).samples()) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is there?\tPerhaps\nB?\tNo", "a.txt:1: an MME line"),
        ("Only one?\tYes", "two questions are needed"),
        ("no tab", "a.txt:1"),
    ],
)
def test_bad_mme_files_are_named(mme, text, message):
    (mme / "existence" / "a.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        MME.on_files(mme)


def test_mme_needs_its_pictures(mme, tmp_path):
    (mme / "existence" / "a.jpg").unlink()
    with pytest.raises(InputError, match="no picture a"):
        MME.on_files(mme)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no MME subtask"):
        MME.on_files(tmp_path / "empty")
    with pytest.raises(InputError, match="no such folder"):
        MME.on_files(tmp_path / "none")


@pytest.fixture
def hallusion(tmp_path):
    rows = []
    for figure in ("0", "1", "2"):
        for question in ("0", "1"):
            rows.append(
                {
                    "category": "VS",
                    "subcategory": "chart",
                    "set_id": "3",
                    "figure_id": figure,
                    "question_id": question,
                    "question": f"Is it {question}?",
                    "gt_answer": str(int(figure == "1")),
                    "visual_input": "1",
                    "filename": None if figure == "0" else f"./hallusion_bench/VS/chart/3_{figure}.png",
                }
            )
    for figure in ("1", "2"):
        picture(tmp_path / "images" / "hallusion_bench" / "VS" / "chart" / f"3_{figure}.png")
    (tmp_path / "HallusionBench.json").write_text(json.dumps(rows))
    return tmp_path / "HallusionBench.json"


def test_hallusion_scores_figures_and_questions(hallusion, tmp_path):
    suite = make_suite("hallusion", data=hallusion, images=tmp_path / "images")
    assert len(suite.samples()) == 4  # two figures, two questions; those without a figure are left out
    answers = dict(zip((s.id for s in suite.samples()), ("Yes", "yes", "No", "Yes"), strict=True))
    records = list(suite.records(answers).values())
    total = [sum(record[name] for record in records) for name in suite.fields]
    values = {metric.name: float(metric.value(suite.fields, total)) for metric in suite.metrics}
    assert values == {"aAcc": 75, "fAcc": 50, "qAcc": 50, "yes_ratio": 75}
    data = json.loads(hallusion.read_text())
    hallusion.write_text(json.dumps([*data, data[-1]]))
    with pytest.raises(InputError, match="there twice"):
        make_suite("hallusion", data=hallusion, images=tmp_path / "images")
    hallusion.write_text(json.dumps([{**data[-1], "gt_answer": "2"}]))
    with pytest.raises(InputError, match="gt_answer must be 0 or 1"):
        make_suite("hallusion", data=hallusion, images=tmp_path / "images")


def test_suites_are_made_by_name(mme, tmp_path):
    assert published("mme", mme, None, None, 10).name == "mme"
    with pytest.raises(UnknownNameError, match="did you mean amber"):
        published("ambr", mme, None, None, 10)
    for name in ("pope", "amber", "amber_questions", "hallusion", "choice", "vqa"):
        with pytest.raises(InputError, match=f"suite {name} needs --images"):
            published(name, mme, None, None, 10)
    assert {name for name, info in all_suites().items() if "files" in info.doors} == {
        "pope", "amber", "amber_questions", "mme", "hallusion", "choice", "vqa", "mmhal", "llava_bench", "captions", "chair", "pqa",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(C)", "C"), ("A.", "A"), (" b", None), ("The answer is (B).", "B"), ("It is C", "C"), ("A cat", None), ("red", "A"), ("Blue.", "B"),
        ("D", None), ("none of them", None), ("Apples", None), ("A's", None),
    ],
)  # fmt: skip
def test_letters_are_read(answer, letter):
    assert read_letter(answer, ["red", "blue", "both"]) == letter


def test_choice_reads_both_forms(tmp_path):
    for name in ("1.png", "2.png"):
        picture(tmp_path / name)
    muir = {
        "idx": "7",
        "task": "Counting",
        "question": "Is <image> like <image>?",
        "options": ["yes", "no"],
        "answer": "B",
        "image_list": ["1.png", "2.png"],
    }
    blink = {
        "id": 8,
        "sub_task": "Depth",
        "question": "Which?",
        "choices": ["x", "y", "z"],
        "answer": "(C)",
        "images": ["1.png"],
    }
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(muir) + "\n" + json.dumps(blink) + "\n")
    suite = make_suite("choice", data=path, images=tmp_path)
    first, second = suite.samples()
    assert first.prompt.startswith("Is (image 1) like (image 2)?\nA. yes\nB. no\n")
    assert len(first.images()) == 2
    assert first.splits == ("Counting", "2 images")
    assert suite.score(first, "B. no") == {"right": 1, "asked": 1, "unread": 0}
    assert suite.score(second, "I cannot tell") == {"right": 0, "asked": 1, "unread": 1}
    assert suite.expected(second) == "C. z"
    for change, message in (
        ({"answer": "E"}, "answer must be a letter from A to B"),
        ({"options": ["yes"]}, "list of 2 to 10"),
        ({"image_list": []}, "list of file names"),
    ):
        path.write_text(json.dumps({**muir, **change}))
        with pytest.raises(InputError, match=message):
            make_suite("choice", data=path, images=tmp_path)
    path.write_text(json.dumps([muir, muir]))
    with pytest.raises(InputError, match="id '7' is there twice"):
        make_suite("choice", data=path, images=tmp_path)


@pytest.mark.parametrize(
    ("answer", "same"),
    [("The Dog.", "dog"), ("two", "2"), ("dont", "don't"), ("1,000", "1000"), ("red, and blue", "red and blue"), ("yes!", "yes"), ("3.5", "3.5"), ("black-white", "black white")],
)  # fmt: skip
def test_vqa_answers_are_compared_in_a_normal_form(answer, same):
    assert normal(answer) == same


def test_vqa_accuracy(tmp_path):
    answers = ["cat"] * 3 + ["dog"] * 6 + ["a cow"]
    picture(tmp_path / "images" / "COCO_val2014_000000000042.jpg")
    (tmp_path / "v2_questions.json").write_text(
        json.dumps({"questions": [{"question_id": 1, "image_id": 42, "question": "What is it?"}]})
    )
    rows = [{"question_id": 1, "answer_type": "other", "answers": [{"answer": answer} for answer in answers]}]
    (tmp_path / "v2_annotations.json").write_text(json.dumps({"annotations": rows}))
    suite = VQA.on_files(tmp_path, tmp_path / "images")
    (sample,) = suite.samples()

    def by_hand(said: str) -> float:
        scores = []
        for left_out in range(10):
            others = [normal(a) for i, a in enumerate(answers) if i != left_out]
            scores.append(min(1.0, others.count(said) / 3))
        return sum(scores) / 10

    for answer in ("cat", "dog", "cow", "bird"):
        assert suite.score(sample, f"A {answer}.")["score"] == pytest.approx(by_hand(answer))
    assert suite.expected(sample) == "dog"
    (tmp_path / "v2_annotations.json").write_text(json.dumps({"annotations": [{**rows[0], "question_id": 2}]}))
    with pytest.raises(InputError, match="question 1 has no annotation"):
        VQA.on_files(tmp_path, tmp_path / "images")
    (tmp_path / "v2_annotations.json").unlink()
    with pytest.raises(InputError, match="there are 0"):
        VQA.on_files(tmp_path, tmp_path / "images")
