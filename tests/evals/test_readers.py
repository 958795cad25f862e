"""How answers are read: against outputs of the released scripts, and against the same rules written once more, on random answers."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmattn.evals.suites import Which, World, make_suite
from vlmattn.evals.suites.amber import AmberCaptions, AmberQuestions
from vlmattn.evals.suites.letters import read_letter
from vlmattn.evals.suites.mme import MME
from vlmattn.evals.suites.pope import Pope, says_yes
from vlmattn.evals.suites.questions import read_numbers
from vlmattn.evals.suites.vqa import VQA, normal
from vlmattn.evals.suites.yesno import first_yes_or_no
from vlmattn.evals.words import ObjectWords, penn_words, singular

GOLDENS = Path(__file__).parents[1] / "goldens" / "released"
DATA = Path(__file__).parents[2].parent / "shared" / "data"
MANY = 2000
PAGE = (Path(__file__).parents[2] / "docs" / "howto-evals.md").read_text(encoding="utf-8")


def golden(name: str) -> Any:
    return json.loads(gzip.decompress((GOLDENS / name).read_bytes()))


def figures(suite: Any, answers: dict[str, str]) -> dict[str, float]:
    records = suite.records(answers).values()
    total = [sum(record[field] for record in records) for field in suite.fields]
    return {metric.name: float(metric.value(suite.fields, total)) for metric in suite.metrics}


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


# --- choice ----------------------------------------------------------------------------------------------------------

PETS = ("a cat", "a dog")


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        # articles and pronouns are no letters
        ("A dog.", PETS, "B"), ("A dog", ("A cat", "A dog"), "B"), ("A red car", ("a blue car", "a red car"), "B"),
        ("A person walks here.", PETS, None), ("The answer is a dog.", PETS, "B"), ("It's a dog", PETS, "B"), ("Answer: A dog", PETS, "B"),
        ("I cannot tell", tuple("123456789"), None), ("I think it is D", tuple("123456789"), "D"), ("I", tuple("123456789"), "I"),
        # denied letters
        ("Neither A nor B.", PETS, None), ("not A but B", PETS, "B"), ("The answer is not A", PETS, None),
        ("The answer isn't A, it's B", PETS, "B"), ("A is wrong, so it must be B", PETS, "B"),
        # announced letters
        ("The correct answer is B. A dog runs.", PETS, "B"), ("The correct answer is B, because A shows a cat", PETS, "B"),
        ("The correct option is A. B is a dog.", PETS, "A"), ("**Answer:** B", PETS, "B"), ("I would choose option B because A has none", PETS, "B"),
        ("The answer to the question is (B).", PETS, "B"), ("$\\boxed{B}$", PETS, "B"),
        ("A. a cat\nB. a dog\nAnswer: B", PETS, "B"), ("The given answer is incorrect. The correct answer is B", PETS, "B"),
        # letters at the beginning
        ("B", PETS, "B"), ("(B)", PETS, "B"), ("B) a dog", PETS, "B"), ("B a dog", PETS, "B"), ("A A cat", PETS, "A"), ("B\nA dog", PETS, "B"),
        ("B, since A is a cat", PETS, "B"), ("A is the correct answer", PETS, "A"), ("A because it purrs", PETS, "A"), ("B - a dog", PETS, "B"),
        # several letters, words that hold letters
        ("A or B", PETS, None), ("The answer is A or B", PETS, None), ("option A and option B", PETS, None), ("A-frame", PETS, None),
        ("A's", PETS, None), ("U.S.A. is big", PETS, None), ("b", PETS, None), ("", PETS, None), ("Apples", PETS, None),
        ("None of the above", ("a cat", "none of the above"), "B"),
    ],
)  # fmt: skip
def test_letters(answer: str, options: tuple[str, ...], letter: str | None) -> None:
    assert read_letter(answer, options) == letter


NAMING = (
    "{}", "({})", "{}.", "{})", "{}: {option}", "{}. {option}", "({}) {option}", "{} {option}", "{option}", "{option}.", "**{}**", "Answer: {}",
    "The answer is {}.", "The correct answer is {}. {other} is shown too.", "The correct answer is ({}) because the others are wrong.",
    "I would pick {}", "It is {}", "The best choice is {}, not {wrong}.", "Not {wrong} but {}.", "'{}'", "{}\n\n{Other} looks alike.", "{wrong}. x\n{0}. y\nThe answer is {0}.", "{}, I think.",
)  # fmt: skip
NAMING_NONE = (
    "A {word} is shown.", "I see {word}.", "Neither {one} nor {two}.", "{one} or {two}", "It could be {one} or {two}.", "It is not {one}.",
    "There is a {word}", "Maybe", "A {word}", "None of them.", "It is neither ({one}) nor ({two}).",
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_chosen_letter_is_read_however_it_is_said(data: st.DataObject) -> None:
    options = data.draw(st.lists(st.sampled_from([f"{a} {n}" for a in ("a", "an old", "the") for n in ("cat", "dog", "red car", "bird")]), min_size=2, max_size=10, unique=True))  # fmt: skip
    letters = "ABCDEFGHIJ"[: len(options)]
    index = data.draw(st.integers(0, len(options) - 1))
    other = options[(index + 1) % len(options)]
    said = data.draw(st.sampled_from(NAMING)).format(
        letters[index], option=options[index], other=other, Other=other.capitalize(), wrong=letters[index - 1]
    )
    assert read_letter(said, options) == letters[index]
    one, two = data.draw(st.permutations(letters))[:2]
    said = data.draw(st.sampled_from(NAMING_NONE)).format(word="zebra", one=one, two=two)
    assert read_letter(said, options) is None


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.lists(st.text(max_size=10), min_size=2, max_size=10))
def test_any_answer_is_read(answer: str, options: list[str]) -> None:
    assert read_letter(answer, options) in {None, *"ABCDEFGHIJ"[: len(options)]}


def test_the_page_says_how_letters_are_read() -> None:
    assert '"A" and "I" before a word are an article and a pronoun' in PAGE


# --- VQA -------------------------------------------------------------------------------------------------------------

MARKS = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = {
    "dont": "don't", "cant": "can't", "isnt": "isn't", "couldnt've": "couldn't've", "couldn'tve": "couldn't've", "hes": "he's", "im": "im",
    "yall": "y'all", "yall'd've": "y'all'd've", "somebody'd": "somebodyd", "oclock": "o'clock", "twas": "'twas", "ow's'at": "'ow's'at",
    "let's": "let's", "youre": "you're", "whered": "where'd", "id": "id", "shell": "shell", "thats": "that's", "maam": "ma'am",
}  # fmt: skip
DIGITS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        strict=True,
    )
)


def vqa_form(answer: str) -> str:
    """The rules of the released script, written once more."""
    gone = bool(re.search("[0-9],[0-9]", answer))
    text = "".join(
        ("" if gone or letter + " " in answer or " " + letter in answer else " ") if letter in MARKS else letter
        for letter in answer
    )
    kept, removed = "", 0
    for at, letter in enumerate(text):
        if letter == "." and not text[at + 1 : at + 2].isdigit() and removed < 32:
            removed += 1
        else:
            kept += letter
    words = [DIGITS.get(word, word) for word in kept.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in {"a", "an", "the"})


def vqa_accuracy(people: list[str], answer: str) -> float:
    people, answer = [p.replace("\n", " ").replace("\t", " ").strip() for p in people], answer.replace("\n", " ").replace("\t", " ").strip()  # fmt: skip
    if len(set(people)) > 1:
        people, answer = [vqa_form(p) for p in people], vqa_form(answer)
    scores = [min(1, sum(q == answer for q in people[:i] + people[i + 1 :]) / 3) for i in range(len(people))]
    return sum(scores) / len(scores)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("Two dogs.", "2 dogs"), ("none", "0"), ("dont", "don't"), ("1,000", "1000"), ("red,blue", "red blue"), ("red, blue", "red blue"),
        ("black-white", "black white"), ("3.5 m.", "3.5 m"), ("it's a dog!", "it's dog"), ("A", ""), ("yes/no", "yes no"), ("yes / no", "yes no"),
        ("e.g.", "eg"), ("$3", "$3"), ("1,000-2", "10002"), ("somebody'd", "somebodyd"), ("." * 40, "." * 8), ("don’t", "don’t"),
    ],
)  # fmt: skip
def test_vqa_form_by_hand(answer: str, same: str) -> None:
    assert normal(answer) == same == vqa_form(answer)


def test_vqa_is_the_released_rule_on_random_answers(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [
        *CONTRACTIONS,
        *DIGITS,
        "a",
        "an",
        "the",
        "The",
        "dog",
        "Red",
        "3.5",
        "1,000",
        "don't",
        "...",
        ".",
        "e.g.",
        "2",
    ]
    joints = [" ", "  ", "\n", "\t", ". ", *MARKS, *(f"{m} " for m in MARKS)]

    def draw() -> str:
        return "".join(rng.choice(words) + rng.choice(joints) for _ in range(rng.randint(0, 3))) + rng.choice(words)

    asked, known, truth, answers = [], [], {}, {}
    for number in range(MANY):
        pool = [draw() for _ in range(rng.randint(1, 4))]
        people = [rng.choice(pool) for _ in range(10)]
        answers[str(number)] = rng.choice([*pool, rng.choice(pool).upper(), draw(), vqa_form(pool[0])])
        truth[str(number)] = people
        asked.append({"question_id": number, "image_id": 1, "question": "?"})
        known.append({"question_id": number, "answers": [{"answer": p, "answer_id": i} for i, p in enumerate(people)]})
    write(tmp_path / "questions.json", {"questions": asked})
    write(tmp_path / "annotations.json", {"annotations": known})
    suite = VQA.on_files(tmp_path, tmp_path)
    records = suite.records(answers)
    for key, answer in answers.items():
        assert records[key]["score"] == pytest.approx(vqa_accuracy(truth[key], answer)), (answer, truth[key])
    assert 0 < sum(record["score"] for record in records.values()) < sum(r["normal"] for r in records.values()) < MANY


def test_vqa_compares_as_it_is_what_all_people_say(tmp_path: Path) -> None:
    people = [{"answer": "yes", "answer_id": i} for i in range(10)]
    write(tmp_path / "questions.json", {"questions": [{"question_id": 1, "image_id": 1, "question": "?"}], "data_subtype": "train2014"})  # fmt: skip
    write(tmp_path / "annotations.json", {"annotations": [{"question_id": 1, "answers": people}]})
    suite = VQA.on_files(tmp_path, tmp_path)
    (sample,) = suite.samples()
    assert suite.score(sample, "Yes.") == {"score": 0, "normal": 1, "asked": 1}
    assert suite.score(sample, "yes\n") == {"score": 1, "normal": 1, "asked": 1}
    assert [path.name for path in sample.images.paths] == ["COCO_train2014_000000000001.jpg"]
    assert 'so "Yes." is not the "yes" of all ten' in PAGE


# --- yes and no ------------------------------------------------------------------------------------------------------


def test_pope_reads_the_golden_answers_as_released(tmp_path: Path) -> None:
    data = json.loads((GOLDENS / "pope.json").read_text(encoding="utf-8"))
    assert [says_yes(answer) for answer in data["answers"]] == data["official_yes"]
    rows = [{"image": f"{i}.jpg", "text": "?", "label": label} for i, label in enumerate(data["labels"])]
    suite = Pope.on_files([write(tmp_path / "coco_pope_random.json", rows)], tmp_path)
    found = figures(suite, {s.id: a for s, a in zip(suite.samples(), data["answers"], strict=True)})
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert found[name] == pytest.approx(100 * data[name])


SAID = (
    "yes",
    "Yes",
    "no",
    "No",
    "NO",
    "not",
    "Not",
    "nothing",
    "none",
    "no-one",
    "yesterday",
    "dog",
    "can't",
    "cannot",
    "nope",
    "know",
)
MARKS_BETWEEN = (" ", ". ", ".", ", ", ",", "\n", "\t", "; ", "! ", "")


def test_yes_and_no_on_random_answers() -> None:
    rng = random.Random(4)
    for _ in range(MANY):
        check_yes_and_no("".join(rng.choice(SAID) + rng.choice(MARKS_BETWEEN) for _ in range(rng.randint(0, 6))))


def check_yes_and_no(answer: str) -> None:
    # POPE: text before the first full stop, without commas, between single spaces
    pattern = r"(?:\A| )(?:No|no|not)(?= |\Z)"
    assert says_yes(answer) == (re.search(pattern, answer[: (answer + ".").index(".")].replace(",", "")) is None)
    # MME: the first four letters in lower case
    start = answer[:4].lower()
    expected = True if start.count("yes") else False if start.count("no") else None
    assert MME.read(None, answer) is expected  # type: ignore[arg-type]
    # ours: the first of the two words
    words = [word for word in re.split(r"[^\w'’-]+", answer.lower()) if word.strip("-") in ("yes", "no")]
    assert first_yes_or_no(answer) is (words[0].strip("-") == "yes" if words else None)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("no-one is there", None), ("not sure", None), ("yesterday", None), ("nothing", None), ("I know", None), ("Yes-", True), ("no.", False),
        ("Please answer yes or no: no", False), ("yes/no", None), ("(yes)", True), ("No, there is no dog", False), ("“Yes”", True),
    ],
)  # fmt: skip
def test_first_yes_or_no_by_hand(answer: str, said: bool | None) -> None:
    assert first_yes_or_no(answer) is said


def test_hallusion_groups_on_random_answers(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [
        {"category": "VS", "subcategory": sub, "set_id": str(s), "figure_id": str(f), "question_id": str(q), "question": "?",
         "gt_answer": rng.choice("01"), "filename": f"./{sub}/{s}_{f}.png" if f else None}
        for sub in ("chart", "map") for s in range(8) for f in range(4) for q in range(rng.randint(1, 3))
    ]  # fmt: skip
    suite = make_suite("hallusion", data=write(tmp_path / "HallusionBench.json", rows), images=tmp_path)
    shown = [row for row in rows if row["filename"]]
    assert len(suite.samples()) == len(shown)  # those without a figure are not asked
    assert "questions without a figure are left out" in PAGE
    for _ in range(20):
        right = {s.id: rng.random() < 0.8 for s in suite.samples()}
        found = figures(suite, {s.id: "Yes." if s.truth == right[s.id] else "No." for s in suite.samples()})
        pairs = list(zip(shown, right.values(), strict=True))

        def share(*keys: str, pairs: list[Any] = pairs) -> float:
            groups: dict[Any, bool] = {}
            for row, ok in pairs:
                key = tuple(row[name] for name in ("subcategory", "set_id", *keys))
                groups[key] = groups.get(key, True) and ok
            return 100 * sum(groups.values()) / len(groups)

        assert found["fAcc"] == pytest.approx(share("figure_id"))
        assert found["qAcc"] == pytest.approx(share("question_id"))
        assert found["aAcc"] == pytest.approx(100 * sum(right.values()) / len(right))


# --- CHAIR -----------------------------------------------------------------------------------------------------------

SYNONYMS = """person, man, woman, passenger, baby, adult, mother, male, player
bird, duck, hen
bear, panda
train, tram
airplane, plane, air plane, jet
bus, coach
bicycle, bike
motorcycle, motor bike
tie, bow, bow tie
toilet, potty
chair, seat, stool
oven, stove, stove top oven
hot dog
dog, puppy
wine glass
cow, ox, oxen
laptop, computer, laptop computer
"""
PAIRS = {
    "home plate": "", "train track": "", "hot dog": "hot dog", "wine glass": "wine glass", "motor bike": "motor bike", "air plane": "air plane",
    "bow tie": "tie", "toilet seat": "toilet", "laptop computer": "laptop computer", "passenger jet": "jet", "passenger train": "train",
    "sports ball": "", "traffic light": "",
} | {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ("bird", "dog", "cow", "bear", "animal", "cub", "zebra")}  # fmt: skip
NAMES = {word: line.split(", ")[0] for line in SYNONYMS.splitlines() for word in line.split(", ")}


def chair_objects(tokens: list[str]) -> list[str]:
    """The rules of the reference, written once more."""
    words, rest = [], [singular(token) for token in tokens]
    while rest:
        two = " ".join(rest[:2])
        words.append(PAIRS.get(two, rest[0]))
        rest = rest[2 if two in PAIRS else 1 :]
    if "toilet" in words:
        words = [word for word in words if word != "seat"]
    return [NAMES[word] for word in words if word in NAMES]


def test_chair_is_the_reference_on_random_captions(tmp_path: Path) -> None:
    words = ObjectWords.from_file(write(tmp_path / "synonyms.txt", SYNONYMS))
    rng = random.Random(2)
    single = [*sorted({part for phrase in (*NAMES, *PAIRS) for part in phrase.split()}), "cub", "lion", "a", "top", "hot-dog", "bicycle/bike"]  # fmt: skip
    phrases = [
        *NAMES,
        *PAIRS,
        "mother bear",
        "male dog",
        "passenger bus",
        "passenger car",
        "baby duck",
        "stove top oven",
        "train tracks",
    ]
    seen = set()
    for _ in range(MANY):
        tokens: list[str] = []
        for _ in range(rng.randint(1, 8)):
            drawn = rng.choice((rng.choice(single), rng.choice(phrases))).split()
            if rng.random() < 0.3 and drawn[-1].isalpha() and not drawn[-1].endswith("s"):
                drawn[-1] += "s"
            tokens += drawn + rng.choice(([], [], [], [","], ["."], ["'s"], ["and"]))
        caption = re.sub(r" (?=[,.']|$)", "", " ".join(tokens)).capitalize()
        expected = chair_objects(tokens)
        assert words.mentions(caption) == expected, caption
        seen.update(expected)
    assert seen == set(NAMES.values())


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("a train on the train tracks", ["train"]), ("a stove top oven", ["oven", "oven"]), ("a baby duck", ["person", "bird"]),
        ("a mother bear and her cub", ["person", "bear"]), ("a male dog", ["person", "dog"]), ("a passenger bus", ["person", "bus"]),
        ("a passenger jet", ["airplane"]), ("a hot-dog", []), ("a bicycle/bike", []), ("an adult dog", ["dog"]), ("a baby animal", []),
        ("the seat of the toilet", ["toilet"]), ("the seat of the potty", ["chair", "toilet"]), ("a dog. Hot dogs", ["dog", "hot dog"]),
        ("oxen", ["cow"]), ("the man's puppies' bow tie", ["person", "dog", "tie"]), ("It is hot. Dogs run", ["dog"]),
    ],
)  # fmt: skip
def test_the_rules_of_the_reference_by_hand(tmp_path: Path, caption: str, objects: list[str]) -> None:
    assert ObjectWords.from_file(write(tmp_path / "synonyms.txt", SYNONYMS)).mentions(caption) == objects


def test_stray_blanks_and_capitals_of_the_file_are_forgiven(tmp_path: Path) -> None:
    words = ObjectWords.from_file(
        write(tmp_path / "synonyms.txt", "motorcycle, scooter,  motor bike\r\ncell phone, iPhone \r\n")
    )
    assert words.mentions("a motor bike and an iPhone") == ["motorcycle", "cell phone"]
    assert "stray blanks or capitals" in PAGE
    strange = write(tmp_path / "synonyms.txt", "dog\u2028ish, puppy\ncat")
    assert ObjectWords.from_file(strange).names == ("dog\u2028ish", "cat")  # one line, as the released script reads it


def test_words_are_split_as_by_the_treebank() -> None:
    text = "The man's dogs' bowl isn't a hot-dog, is it? \"Yes.\" (a bicycle/bike) 3,000 cats... 5:30, men’s."
    assert penn_words(text) == [
        "The", "man", "'s", "dogs", "'", "bowl", "is", "n't", "a", "hot-dog", ",", "is", "it", "?", '"', "Yes", ".", '"', "(", "a", "bicycle/bike",
        ")", "3,000", "cats", "..", ".", "5:30", ",", "men", "’", "s", ".",
    ]  # fmt: skip


@pytest.mark.skipif(not (DATA / "chair").is_dir(), reason="the published synonyms are not here")
def test_chair_reads_the_golden_captions_as_released() -> None:
    data, words = golden("chair.json.gz"), ObjectWords.from_file(DATA / "chair" / "synonyms.txt")
    assert len(data["captions"]) == 1997
    assert [words.mentions(caption) for caption in data["captions"]] == data["reference"]


# --- AMBER -----------------------------------------------------------------------------------------------------------


def test_amber_is_the_released_rule_on_random_captions(tmp_path: Path) -> None:
    rng = random.Random(3)
    names = ["sky", "person", "ship", "dog", "road", "cloud", "TV", "line", "tree", "light"]
    near = {name: [f"{name}{letter}" for letter in "kq"[: rng.randint(0, 2)]] for name in names}
    near["person"].append("dogk")  # stands for a person wherever both are there
    truths = [(rng.choices(names, k=rng.randint(1, 5)), rng.sample(names, rng.randint(1, 3))) for _ in range(MANY)]
    write(tmp_path / "relation.json", near)
    write(tmp_path / "safe_words.txt", "line\nlight")
    entries = [{"id": i, "type": "generative", "truth": t, "hallu": h} for i, (t, h) in enumerate(truths)]
    write(tmp_path / "annotations.json", entries)
    queries = [{"id": i, "image": "a.jpg", "query": "?"} for i in range(MANY)]
    write(tmp_path / "query" / "query_generative.json", queries)
    suite = AmberCaptions.on_files(tmp_path, tmp_path)
    vocabulary = {*near, *itertools.chain(*near.values())}
    for sample, (truth, traps) in zip(suite.samples(), truths, strict=True):
        said = rng.choices([*vocabulary, "Dogs", "dogs", "tv", "nothing"], k=rng.randint(0, 8))
        nouns = [noun for noun in map(singular, said) if noun in vocabulary]
        lists = [([*((n, i) for i, w in enumerate(of) for n in near[w]), *((w, i) for i, w in enumerate(of))]) for of in (truth, traps)]  # fmt: skip
        first = [{noun: next(i for n, i in pairs if n == noun) for noun, _ in pairs} for pairs in lists]
        counted = [noun for noun in nouns if noun not in ("line", "light")]
        unsafe = [noun for noun in counted if noun not in first[0]]
        found = suite.score(sample, f"There is {', '.join(said)}.")
        assert (found["words"], found["unsafe"], found["unsafe_captions"]) == (len(nouns), len(unsafe), bool(unsafe))
        assert found["covered"] == len({first[0][noun] for noun in counted if noun in first[0]})
        assert found["fallen_for"] == len({first[1][noun] for noun in unsafe if noun in first[1]})


@pytest.mark.skipif(not (DATA / "amber").is_dir(), reason="needs AMBER's published files")
def test_amber_has_the_figures_of_the_released_script() -> None:
    data = golden("amber.json.gz")
    printed = dict(zip(("chair", "cover", "hal", "cog", "accuracy", "precision", "recall"), map(float, re.findall(r"[\d.]+", data["output"].replace("F1", ""))), strict=False))  # fmt: skip
    captions, questions = (kind.on_files(DATA / "amber", DATA / "amber") for kind in (AmberCaptions, AmberQuestions))
    found = figures(captions, {str(number + 1): text for number, text in enumerate(data["captions"])})
    no = set(data["no"])
    found |= figures(questions, {s.id: "No" if int(s.id) - 1 in no else "Yes" for s in questions.samples()})
    assert {name: round(found[name], 1) for name in printed} == printed


def test_the_page_says_where_amber_differs() -> None:
    assert 'The released AMBER script takes "Yes" and "No" alone' in PAGE
    assert "spaCy" in PAGE


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "numbers"),
    [("2", [2]), ("Image 2.", [2]), ("two", [2]), ("no one", []), ("the one on the left", []), ("one of them", []), ("3.5", []), ("1,000", []),
     ("12th", []), ("-3", []), ("None", []), ("2 of 3", [2, 3]), ("everyone", []), ("There is one", [1]), ("9" * 50, [])],
)  # fmt: skip
def test_numbers(answer: str, numbers: list[int]) -> None:
    assert read_numbers(answer) == numbers


def test_which_reads_the_one_number_that_is_named() -> None:
    suite = Which(World("clear", 0, 4), (2,))
    sample = suite.samples()[0]  # the answer is 1
    right = [
        suite.score(sample, answer)["right"]
        for answer in ("1", " 1.", "Image 1", "one", "1 or 2", "2", "12", "", "image")
    ]
    assert right == [1, 1, 1, 1, 0, 0, 0, 0, 0]
