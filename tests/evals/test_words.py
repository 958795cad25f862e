"""The object vocabulary of CHAIR: singulars, phrases, the reference's special rules, and the published file format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmattn.embedded.scenes import CATEGORIES, COLOURS, SYNONYMS
from vlmattn.errors import InputError
from vlmattn.evals.words import ObjectWords, singular

DATA = Path(__file__).parents[2].parent / "shared" / "data"
PUBLISHED = DATA / "chair" / "synonyms.txt"
LLAVA = DATA / "pope" / "captions_instruction1_llava.json"
COCO = ObjectWords.coco()

COCO_CLASSES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking meter,"
    " bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase,"
    " frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,"
    " wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,"
    " chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,"
    " toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
CLASSES = COCO_CLASSES.split(", ")

PLURALS = {
    "person": "people", "bus": "buses", "sheep": "sheep", "skis": "skis", "bench": "benches", "couch": "couches",
    "wine glass": "wine glasses", "knife": "knives", "sandwich": "sandwiches", "mouse": "mice", "scissors": "scissors",
    "toothbrush": "toothbrushes",
}  # fmt: skip


def plural(name: str) -> str:
    return PLURALS.get(name, name + "s")


def json_values(text: str) -> list[dict[str, object]]:
    """JSON values one after the other, as in the published captions."""
    decoder, at, rows = json.JSONDecoder(), 0, []
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        row, at = decoder.raw_decode(text, at)
        rows.append(row)
    return rows


# --- singulars -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("many", "one"),
    [
        ("men", "man"), ("women", "woman"), ("firemen", "fireman"), ("policewomen", "policewoman"), ("people", "person"),
        ("children", "child"), ("grandchildren", "grandchild"), ("businesspeople", "businessperson"), ("passersby", "passerby"),
        ("mice", "mouse"), ("geese", "goose"), ("teeth", "tooth"), ("feet", "foot"), ("oxen", "ox"), ("calves", "calf"),
        ("wolves", "wolf"), ("bookshelves", "bookshelf"), ("leaves", "leaf"), ("knives", "knife"), ("jackknives", "jackknife"),
        ("scarves", "scarf"), ("gloves", "glove"), ("stoves", "stove"), ("olives", "olive"), ("valves", "valve"),
        ("buses", "bus"), ("busses", "bus"), ("minibuses", "minibus"), ("glasses", "glass"), ("dishes", "dish"),
        ("benches", "bench"), ("couches", "couch"), ("boxes", "box"), ("toothbrushes", "toothbrush"), ("vases", "vase"),
        ("horses", "horse"), ("purses", "purse"), ("suitcases", "suitcase"), ("skis", "ski"), ("taxis", "taxi"),
        ("zucchinis", "zucchini"), ("puppies", "puppy"), ("ties", "tie"), ("neckties", "necktie"), ("cookies", "cookie"),
        ("potatoes", "potato"), ("shoes", "shoe"), ("canoes", "canoe"), ("tvs", "tv"), ("suvs", "suv"), ("sofas", "sofa"),
        ("zebras", "zebra"), ("boys", "boy"), ("kangaroos", "kangaroo"), ("teddy-bears", "teddy-bear"), ("lenses", "lens"),
    ],
)  # fmt: skip
def test_singular(many: str, one: str) -> None:
    assert singular(many) == one
    assert singular(one) == one


@pytest.mark.parametrize(
    "word",
    [
        "glass",
        "grass",
        "bus",
        "gas",
        "tennis",
        "canvas",
        "sheep",
        "fish",
        "has",
        "is",
        "us",
        "cactus",
        "dress",
        "tv",
        "s",
    ],
)
def test_words_that_are_no_plurals_stay(word: str) -> None:
    assert singular(word) == word


@given(st.text(max_size=12))
def test_singular_takes_any_text(word: str) -> None:
    assert len(singular(word.lower())) <= len(word.lower()) + 1  # mice -> mouse


# --- the COCO vocabulary ---------------------------------------------------------------------------------------------


def test_coco_has_the_80_classes_in_order() -> None:
    assert list(COCO.names) == CLASSES
    assert len(CLASSES) == 80


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_found_in_singular_and_plural(name: str) -> None:
    assert COCO.mentions(f"There is a {name}.") == [name]
    assert COCO.mentions(f"Three {plural(name)}, seen from above") == [name]
    assert COCO.mentions(f"{plural(name).upper()}!") == [name]
    assert COCO.mentions(name.replace(" ", "-")) == [name]


@given(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=6), st.booleans())
def test_objects_come_in_order_and_repetitions_count(names: list[str], several: bool) -> None:
    words = [plural(name) if several else f"a {name}" for name in names]
    assert COCO.mentions("We see " + " and ".join(words) + ".") == names
    assert COCO.mentions("; ".join(words)) == names


@given(st.text(max_size=80))
def test_any_text_is_read(text: str) -> None:
    assert set(COCO.mentions(text)) <= set(CLASSES)


@given(st.sampled_from(CLASSES), st.sampled_from(CLASSES))
def test_sentences_do_not_run_into_each_other(first: str, second: str) -> None:
    assert COCO.mentions(f"Here is a {first}. {second.capitalize()}") == [first, second]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        # synonyms
        ("Two women and a boy ride bikes past a taxi", ["person", "person", "bicycle", "car"]),
        ("a puppy, a kitten and seven geese", ["dog", "cat", "bird"]),
        ("a sofa, a fridge, a television and a desk", ["couch", "refrigerator", "tv", "dining table"]),
        ("a man with a racquet hits the ball", ["person", "tennis racket", "sports ball"]),
        ("mobile phones, a computer mouse and a Wii remote", ["cell phone", "mouse", "remote"]),
        ("a burger, doughnuts and a cupcake", ["sandwich", "donut", "cake"]),
        # phrases beat their words
        ("a hot dog on a plate", ["hot dog"]),
        ("a hot-dog stand", ["hot dog"]),
        ("It is hot. Dogs sleep.", ["dog"]),
        ("a traffic light and a street light", ["traffic light"]),
        ("a teddy bear and a polar bear", ["teddy bear", "bear"]),
        ("a baseball player swings a baseball bat", ["person", "baseball bat"]),
        ("a glass of wine and two wine glasses", ["wine glass", "wine glass"]),
        ("a bow tie and a bowtie", ["tie", "tie"]),
        ("a laptop computer next to a computer keyboard", ["laptop", "keyboard"]),
        ("a stove top oven and a microwave oven", ["oven", "microwave"]),
        ("a double-decker bus", ["bus"]),
        ("a flat-screen TV", ["tv"]),
        ("the TV remote", ["remote"]),
        ("a fire truck by the fire hydrant", ["truck", "fire hydrant"]),
        ("baby carrots", ["carrot"]),
        ("a dirt bike", ["motorcycle"]),
        # phrases that are no object
        ("a train station, train tracks and a bus stop", []),
        ("the catcher behind home plate", ["person"]),
        ("ski slopes, ski-lift, a jet ski", []),
        ("orange juice and toilet paper", []),
        ("a couple of dogs", ["dog"]),
        ("a DVD player", []),
        ("an oven mitt", []),
        # qualifiers
        ("a baby elephant and an adult giraffe", ["elephant", "giraffe"]),
        ("baby ducks, a baby animal", ["bird"]),
        ("a baby and an elephant", ["person", "elephant"]),
        ("a baby holding a teddy bear", ["person", "teddy bear"]),
        ("a baby", ["person"]),
        ("a mother bear with two bear cubs", ["bear", "bear"]),
        ("a passenger jet over a passenger train", ["airplane", "train"]),
        ("a passenger on the train", ["person", "train"]),
        # toilets
        ("a toilet seat", ["toilet"]),
        ("the seat of the toilet", ["toilet"]),
        ("the toilet has a seat. A chair stands by", ["toilet", "chair"]),
        ("an empty seat", ["chair"]),
        ("a toilet bowl", ["toilet"]),
        # writing
        ("the man's dogs' bowl", ["person", "dog", "bowl"]),
        ("the man’s hat", ["person"]),
        ("man-made", []),
        ("a well-lit sail-boat", ["boat"]),
        ("a stop_sign", ["stop sign"]),
        ("cats\n\ndogs", ["cat", "dog"]),
        ("carpet, catalogue, busy, doggerel", []),
        ("", []),
    ],
)  # fmt: skip
def test_mentions(caption: str, expected: list[str]) -> None:
    assert COCO.mentions(caption) == expected


@pytest.mark.parametrize(
    "caption", ["a glass table lamp's screen", "his watch and gloves", "guests, friends and a family", "computers"]
)
def test_ambiguous_words_are_left_out(caption: str) -> None:
    assert set(COCO.mentions(caption)) <= {"dining table"}


def test_canonical() -> None:
    assert COCO.canonical("bikes") == COCO.canonical("Bicycle") == "bicycle"
    assert COCO.canonical("cell phone") == COCO.canonical("cellphone") == "cell phone"
    assert COCO.canonical("a bike") is None
    assert COCO.canonical("train track") is None
    assert COCO.canonical("") is None


# --- other vocabularies ----------------------------------------------------------------------------------------------


def test_own_groups() -> None:
    words = ObjectWords({"dog": ["puppy", "hounds"], "ice cream": []})
    assert words.names == ("dog", "ice cream")
    assert words.mentions("A hound, puppies and ice creams; a cat") == ["dog", "dog", "ice cream"]


def test_the_longest_phrase_wins() -> None:
    words = ObjectWords({"boat": ["house boat"], "house": ["house boat club house"], "club": []})
    assert words.mentions("a house boat") == ["boat"]
    assert words.mentions("a house boat club house") == ["house"]
    assert words.mentions("a house boat club") == ["boat", "club"]


def test_compounds() -> None:
    assert ObjectWords({"dog": []}).mentions("a hot dog and a dog") == ["dog"]
    assert ObjectWords({"dog": []}, compounds=()).mentions("a hot dog") == ["dog"]
    assert ObjectWords({"dog": []}, compounds=["sun dogs"]).mentions("a sun dog, a hot dog") == ["dog"]
    assert ObjectWords({"dog": [], "snack": ["hot dog"]}).mentions("a hot dog") == ["snack"]


def test_the_generated_scenes() -> None:
    words = ObjectWords({name: SYNONYMS.get(name, ()) for name in CATEGORIES})
    for colour in COLOURS:
        for first in CATEGORIES:
            for second in CATEGORIES:
                caption = f"there is a {colour} {first} , a striped {colour} {second} and {colour} {plural(second)} ."
                assert words.mentions(caption) == [first, second, second]
    for name, others in SYNONYMS.items():
        assert all(words.mentions(f"a {other}") == [name] for other in others)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"dog": ["pet"], "cat": ["pets"]}, "'pets' names both 'dog' and 'cat'; keep it with one of them"),
        ({"dog": ["cat"], "cat": []}, "'cat' names both"),
        ({"": ["pet"]}, "'' is not a word"),
        ({"dog": [" "]}, "' ' is not a word"),
        ({"dog": ["--"]}, "'--' is not a word"),
        ({"dog": "puppy"}, "the words of 'dog' are the text 'puppy'; give a list"),
    ],
)  # fmt: skip
def test_bad_groups(groups: dict[str, list[str]], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ObjectWords(groups)
    assert str(caught.value).startswith(message)


# --- the published file format ---------------------------------------------------------------------------------------


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text(
        "\ufeffdog, puppy,  hound\n\nmotorcycle, scooter,  motor bike, motor cycle \nhot dog, \n", encoding="utf-8"
    )
    words = ObjectWords.from_file(path)
    assert words.names == ("dog", "motorcycle", "hot dog")
    assert words.mentions("Hounds on motor bikes eat hot dogs") == ["dog", "motorcycle", "hot dog"]
    assert ObjectWords.from_file(str(path)).names == words.names


def test_from_file_has_no_compounds_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("train\ntoilet\nchair, seat\nperson, baby\nelephant", encoding="utf-8")
    words = ObjectWords.from_file(path)
    assert words.mentions("a train station") == ["train"]
    assert words.mentions("a toilet seat, a baby elephant") == ["toilet", "elephant"]


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (b"dog, pet\n\ncat, pets", ":3: ", "'pets' names both 'dog' and 'cat'"),
        (b"dog\ncat\ndog, hound", ":3: ", "the object 'dog' is there twice"),
        (b"dog\n, hound", ":2: ", "'' is not a word"),
        (b"dog\n#, hound", ":2: ", "'#' is not a word"),
        (b"\n \n", ": ", "no objects in it"),
        (b"", ": ", "no objects in it"),
        (b"dog, \xff\xfe", ": ", "not a text file in UTF-8"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, content: bytes, where: str, message: str) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        ObjectWords.from_file(path)
    assert str(caught.value).startswith(f"{path}{where}{message}")
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No such file or directory; leave chair\.synonyms out"):
        ObjectWords.from_file(tmp_path / "none.txt")


# --- against the published list and the captions of a real model -----------------------------------------------------


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published synonyms are not here")
def test_published_list() -> None:
    published = ObjectWords.from_file(PUBLISHED)
    assert set(published.names) == set(CLASSES)
    assert published.mentions("a motor bike, wine glasses, two buses, skis and scissors") == [
        "motorcycle", "wine glass", "bus", "skis", "scissors",
    ]  # fmt: skip
    assert published.mentions("a baby bird on the toilet seat of a passenger jet") == ["bird", "toilet", "airplane"]
    for name in CLASSES:
        assert published.mentions(f"a {name} and {plural(name)}") == [name, name]


@pytest.mark.skipif(not (PUBLISHED.exists() and LLAVA.exists()), reason="the published files are not here")
def test_our_words_agree_with_the_published_ones() -> None:
    captions = [str(row["text"]) for row in json_values(LLAVA.read_text(encoding="utf-8"))]
    published = ObjectWords.from_file(PUBLISHED)
    pairs = [(set(COCO.mentions(text)), set(published.mentions(text))) for text in captions]
    assert len(pairs) == 2000
    assert sum(ours == theirs for ours, theirs in pairs) / len(pairs) > 0.90
    common = sum(len(ours & theirs) for ours, theirs in pairs)
    assert common / sum(len(ours) for ours, _ in pairs) > 0.98
    assert common / sum(len(theirs) for _, theirs in pairs) > 0.98
