"""Question files: damaged ones, odd names of images, the forms in which data are published."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_data import published
from PIL import Image

from vlmattn.cli.data import SuiteOptions
from vlmattn.errors import InputError
from vlmattn.evals.coco import load_coco_objects
from vlmattn.evals.prompts import refuse_marks
from vlmattn.evals.suites import PQA, Chair, LlavaBench, MMHal, Pope, make_suite
from vlmattn.evals.suites.amber import AmberCaptions, AmberQuestions
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.files import ImageFolder
from vlmattn.evals.suites.mme import MME
from vlmattn.evals.suites.pope import columns_of, read_questions
from vlmattn.evals.suites.vqa import VQA
from vlmattn.evals.words import ObjectWords

QUESTION = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8", errors="surrogatepass", newline="")  # fmt: skip
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def one_line(call: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) <= 1000
    return message


def read_or_refused(call: Callable[[], Any]) -> Any:
    """What a call gives; None where it refuses in one line."""
    try:
        return call()
    except InputError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) <= 1000
    return None


# --- what stands in a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["\u0085", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1e"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_line_feeds_end_a_line(tmp_path: Path, mark: str, end: str) -> None:
    rows = [{**QUESTION, "text": f"Is there{mark}a dog?", "question_id": n} for n in range(2)]
    text = end.join(json.dumps(row, ensure_ascii=False).replace(json.dumps(mark)[1:-1], mark if mark > "\x1f" else json.dumps(mark)[1:-1]) for row in rows)  # fmt: skip
    found = read_questions(write(tmp_path / "q.json", f"\ufeff{text}{end}"))
    assert [row.text("text") for row in found] == [f"Is there{mark}a dog?"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines(QUESTION) + lines({**QUESTION, "image": {"a": 1}}), ":2: image must be a text, got {'a': 1}"),
        (lines({**QUESTION, "image": None}), ":1: image must be a text, got None"),
        (lines({**QUESTION, "text": ["x"]}), ":1: text must be a text, got ['x']"),
        (lines({**QUESTION, "label": True}), ":1: label must be yes or no, got True"),
        (lines({**QUESTION, "label": "ye\ns" * 500}), ":1: label must be yes or no, got 'ye"),
        (json.dumps([QUESTION, {**QUESTION, "text": 5}]), ": item 2: text must be a text, got 5"),
        ('{"image": "a.jpg", "text": "a \\ud800 dog", "label": "yes"}', ":1: not valid text (half of a surrogate pair)"),
        ("[" * 100_000, "nested too deeply"),
        (lines(QUESTION) + '{"image":' * 100_000, "nested too deeply"),
        ('{"image":' + "9" * 6000 + ',"text":"x","label":"yes"}', ":1: a number with too many digits"),
        ('{"image": "a.jpg", "image": "b.jpg", "text": "x", "label": "yes"}', ":1: the key 'image' stands twice"),
        (lines({**QUESTION, "image": "a" * 5000}), "cannot be the name of an image: File name too long"),
        (lines({**QUESTION, "image": "a\0b"}), "cannot be the name of an image"),
        (lines({**QUESTION, "image": " "}), "cannot be the name of an image: it is empty"),
        ("\0", "not a text file"),
        ("5", ":1: a POPE question needs image, text and label"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "q.json", text)
    assert message in one_line(lambda: Pope.on_files([path], tmp_path))


def test_a_mark_for_pictures_in_a_question_is_refused() -> None:
    processor = SimpleNamespace(
        image_token="<image>", boi_token="<start_of_image>", image_token_id=5, chat_template="<image>"
    )
    for mark in ("<image>", "<start_of_image>"):
        assert f"'What does {mark} mean?' holds {mark}, which this model takes" in one_line(
            lambda mark=mark: refuse_marks(processor, ["What is it?", f"What does {mark} mean?"])
        )
    refuse_marks(processor, ["What is an <img>?", "image", ""])


# --- any damage, in every suite --------------------------------------------------------------------------------------

MMHAL = {
    "image_id": "a",
    "image_src": "http://x/a.jpg",
    "image_content": ["dog"],
    "question_type": "t",
    "question": "?",
    "gt_answer": "a",
}
HALLUSION = {
    "category": "VS", "subcategory": "chart", "set_id": "0", "figure_id": "1", "question_id": "0", "question": "?", "gt_answer": "1",
    "filename": "./a.png",
}  # fmt: skip
CHOICE = {
    "id": 1,
    "task": "t",
    "question": "<image>?",
    "options": ["x", "y"],
    "answer": "A",
    "images": ["a.jpg"],
    "counterpart_idx": 2,
}
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "category_id": 1, "caption": "a dog"}],
    "categories": [{"id": 1, "name": "dog"}],
}  # fmt: skip
AMBER = {
    "annotations.json": [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["dog"]}, {"id": 2, "type": "relation", "truth": "yes"}],
    "query/query_generative.json": [{"id": 1, "image": "a.jpg", "query": "?"}],
    "query/query_all.json": [{"id": 2, "image": "a.jpg", "query": "?"}],
    "relation.json": {"sky": ["heaven"], "dog": []},
    "safe_words.txt": "light\n",
}  # fmt: skip
VQAS = {
    "questions.json": {"questions": [{"question_id": 1, "image_id": 1, "question": "?"}], "data_subtype": "val2014"},
    "annotations.json": {"annotations": [{"question_id": 1, "answer_type": "other", "answers": [{"answer": "a"}]}]},
}
LLAVA = {
    "questions.jsonl": [{"question_id": 0, "image": "a.jpg", "category": "c", "text": "?"}],
    "context.jsonl": [{"image": "a.jpg", "caption": ["c"]}],
    "answers_gpt4.jsonl": [{"question_id": 0, "text": "a"}],
}

#: Files of each suite, and how it reads them.
SUITES: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
    "pope": ({"q.json": [QUESTION]}, lambda d: Pope.on_files([d / "q.json"], d)),
    "pqa": (
        {"q.json": [QUESTION, {**QUESTION, "image": "b.jpg", "label": "no"}]},
        lambda d: PQA.on_files([d / "q.json"], d, (2,), 1),
    ),
    "hallusion": ({"q.json": [HALLUSION]}, lambda d: make_suite("hallusion", data=d / "q.json", images=d)),
    "choice": ({"q.json": [CHOICE]}, lambda d: make_suite("choice", data=d / "q.json", images=d)),
    "mmhal": ({"q.json": [MMHAL]}, lambda d: MMHal.on_files(d / "q.json", d)),
    "llava_bench": (LLAVA, lambda d: LlavaBench.on_files(d, d)),
    "amber": (AMBER, lambda d: AmberCaptions.on_files(d, d)),
    "amber_questions": (AMBER, lambda d: AmberQuestions.on_files(d, d)),
    "vqa": (VQAS, lambda d: VQA.on_files(d, d)),
    "chair": ({"i.json": COCO}, lambda d: Chair.on_files(d / "i.json", d, d / "i.json")),
    "mme": ({"task/a.txt": "A dog?\tYes\nA cat?\tNo\n", "task/a.jpg": ""}, lambda d: MME.on_files(d)),
    "synonyms": ({"s.txt": "dog, puppy\ncat\n"}, lambda d: ObjectWords.from_file(d / "s.txt")),
}
WORDS = st.sampled_from(["", " ", "a.jpg", "../a", "/etc/passwd", "a\0b", "a" * 300, "x/" * 3000, "\ud800", "\u2028", "yes", "A", "-1", "[[", "a\nb", "<image>"])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.just(10**30) | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for key, one in inner for found in places(one, (*way, key)))]


def changed(value: Any, way: tuple[Any, ...], to: Any) -> Any:
    if not way:
        return to
    items = value.items() if isinstance(value, dict) else enumerate(value)
    new = {key: changed(one, way[1:], to) if key == way[0] else one for key, one in items}
    return new if isinstance(value, dict) else list(new.values())


@pytest.mark.parametrize("name", SUITES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_gives_items_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    files, read = SUITES[name]
    folder = tmp_path_factory.mktemp(name)
    damaged = data.draw(st.sampled_from([file for file in files if not file.endswith(".jpg")]))
    for file, content in files.items():
        if file == damaged and not isinstance(content, str):
            content = changed(content, data.draw(st.sampled_from(places(content))), data.draw(VALUES))
        text = content if isinstance(content, str) else json.dumps(content)
        raw = text.encode("utf-8", "surrogatepass")
        if file == damaged and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(raw)))
            raw = raw[:at] + data.draw(st.binary(max_size=4)) + raw[at + data.draw(st.integers(0, len(raw))) :]
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(raw)
    found = read_or_refused(lambda: read(folder))
    if found is None:
        return
    if name == "synonyms":
        assert found.names
        return
    for sample in found.samples():
        assert isinstance(sample, Sample)
        assert all(isinstance(text, str) for text in (sample.id, sample.image_id, sample.prompt, *sample.splits))
        json.dumps([sample.id, sample.prompt], ensure_ascii=False).encode()
        assert found.score(sample, "Yes, a dog.").keys() == set(found.fields) or name in ("mme", "pqa", "hallusion")


# --- names of images -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images`` with a file, links to a file inside, to a file and a folder outside, and to itself; behind a link of its own."""
    folder = tmp_path_factory.mktemp("tree")
    images = folder / "real" / "images"
    (images / "sub").mkdir(parents=True)
    (images / "a.jpg").touch()
    (folder / "outside").mkdir()
    (folder / "outside" / "b.jpg").touch()
    (images / "in.jpg").symlink_to("a.jpg")
    (images / "out.jpg").symlink_to(folder / "outside" / "b.jpg")
    (images / "folder").symlink_to(folder / "outside")
    (images / "loop").symlink_to("loop")
    (folder / "images").symlink_to(images)
    return folder / "images"


def test_names_stay_in_the_folder(tree: Path) -> None:
    def read(name: str, allow_outside: bool = False) -> Any:
        return ImageFolder(tree, allow_outside).file("q.json:1", name)

    for name in (
        "a.jpg",
        "in.jpg",
        "sub/../a.jpg",
        "missing.jpg",
        "sub/missing.jpg",
        f"{tree}/a.jpg",
        "../images/a.jpg",
        "...jpg",
    ):
        assert read(name) == tree / name, name
    for name in ("../outside/b.jpg", "sub/../../../outside/b.jpg", "out.jpg", "folder/b.jpg", "folder/missing.jpg", "/etc/passwd", "..", f"{tree}-2/a.jpg"):  # fmt: skip
        assert "q.json:1: the image " in one_line(lambda name=name: read(name))
        assert "--allow-outside" in one_line(lambda name=name: read(name))
        assert read(name, True) == tree / name


PARTS = st.lists(st.sampled_from(["..", ".", "a.jpg", "in.jpg", "out.jpg", "folder", "sub", "loop", "missing", "b.jpg", "", "outside"]), max_size=6)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(parts=PARTS, absolute=st.booleans())
def test_no_name_leads_outside(tree: Path, parts: list[str], absolute: bool) -> None:
    name = ("/" if absolute else "") + "/".join(parts)
    real = os.path.realpath(tree)
    inside = os.path.commonpath([real, os.path.realpath(os.path.join(tree, name))]) == real
    found = read_or_refused(lambda: ImageFolder(tree).file("q", name))
    assert found == (tree / name if inside and name.strip() else None)


@pytest.mark.parametrize("name", [name for name in SUITES if name not in ("synonyms", "mme")])
def test_every_suite_refuses_names_outside(tmp_path: Path, name: str) -> None:
    files, read = SUITES[name]
    for file, content in files.items():
        text = (
            json.dumps(content)
            .replace("a.jpg", "..out.jpg")
            .replace("./a.png", "../out.png")
            .replace("..out.jpg", "../out.jpg")
        )
        text = text.replace("http://x/../out.jpg", "http://x/out.jpg").replace(
            '"image_id": "a"', '"image_id": "../out"'
        )
        if name == "vqa":
            text = text.replace('"question_id": 1, "image_id"', '"image": "../out.jpg", "question_id": 1, "image_id"')
        write(tmp_path / "data" / file, content if isinstance(content, str) else text)

    def asked() -> list[Any]:
        return [sample.images() for sample in read(tmp_path / "data").samples()]  # those of PQA are named when shown

    assert "lies outside of" in one_line(asked)


def test_the_command_line_and_python_can_allow_it(tmp_path: Path) -> None:
    path = write(tmp_path / "data" / "q.json", [{**QUESTION, "image": "../b.jpg"}])
    folder = tmp_path / "images"
    folder.mkdir()

    for options in ({}, {"set_": [f"pope.images={folder}"], "images": None}):
        given_ = {"data": [f"pope={path}"], "images": folder, **options}
        one_line(lambda given_=given_: SuiteOptions(**given_).make(["pope"], "embedded"))
        (suite,) = SuiteOptions(**given_, allow_outside=True).make(["pope"], "embedded")
        assert [str(p) for p in suite.samples()[0].images.paths] == [str(folder / "../b.jpg")]
    one_line(lambda: published("pope", path, folder, None, 16))
    assert len(published("pope", path, folder, None, 16, allow_outside=True).samples()) == 1


def test_pictures_of_mme_are_no_links_to_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "MME" / "count" / "a.txt", "A dog?\tYes\nA cat?\tNo\n")
    (tmp_path / "b.jpg").touch()
    (tmp_path / "MME" / "count" / "a.jpg").symlink_to(tmp_path / "b.jpg")
    assert "lies outside of" in one_line(lambda: MME.on_files(tmp_path / "MME"))
    assert len(MME.on_files(tmp_path / "MME", allow_outside=True).samples()) == 2


def test_tables_hold_their_pictures_or_name_files_beside_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "table").mkdir()

    def table(image: Any) -> Path:
        row = {"question": ["?"], "answer": ["yes"], "image_source": ["a"], "category": ["random"], "image": [image]}
        datasets.Dataset.from_dict(row).to_parquet(str(tmp_path / "table" / "test.parquet"))
        return tmp_path / "table"

    def read(image: Any, **options: Any) -> Any:
        return published("pope", table(image), None, None, 16, **options).samples()

    assert "does not hold pictures" in one_line(lambda: read("a.png"))
    for path in ("/etc/passwd", "http://localhost/a.png", None):
        (sample,) = read({"bytes": None, "path": path})
        assert "row 0: cannot read the pictures of this row: the table holds no picture here" in one_line(sample.images)
    for path, options in ((tmp_path / "table" / "a.png", {}), (tmp_path / "a.png", {"allow_outside": True})):
        Image.new("RGB", (3, 4)).save(path)
        (sample,) = read({"bytes": None, "path": str(path)}, **options)
        assert sample.images()[0].size == (3, 4)


# --- forms in which data are published -------------------------------------------------------------------------------


def test_amber_is_read_as_released_and_in_one_folder(tmp_path: Path) -> None:
    for file, content in AMBER.items():
        write(tmp_path / "released" / file, content)
        write(tmp_path / "flat" / Path(file).name, content)
    for kind, count in ((AmberCaptions, 1), (AmberQuestions, 1)):
        released, flat = (kind.on_files(tmp_path / folder, tmp_path) for folder in ("released", "flat"))
        assert [(s.id, s.prompt, s.truth) for s in released.samples()] == [
            (s.id, s.prompt, s.truth) for s in flat.samples()
        ]
        assert len(released.samples()) == count
    assert len(published("amber", tmp_path / "released", tmp_path, None, 16).samples()) == 1


VCD = [f"{data}_pope_{seem}{split}.json" for data, seem in (("coco", ""), ("aokvqa", "seem_"), ("gqa", "seem_")) for split in ("random", "popular", "adversarial")]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from([Path(folder) / name for folder in ("a", "b") for name in VCD]),
        min_size=1,
        max_size=8,
        unique=True,
    )
)
def test_each_pope_file_is_a_column(files: list[Path]) -> None:
    columns = columns_of(files)
    assert len(set(columns.values())) == len(files)
    splits = [path.stem.rpartition("_")[2] for path in files]
    if len(set(splits)) == len(splits):
        assert list(columns.values()) == splits


def test_files_of_one_split_do_not_fall_into_one_column(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / name, [{**QUESTION, "label": label}])
        for name, label in zip(VCD[::3], ("yes", "no", "yes"), strict=True)
    ]
    samples = Pope.on_files(paths, tmp_path).samples()
    assert {s.truth: s.splits for s in samples} == {
        True: ("coco_pope_random", "gqa_pope_seem_random"),
        False: ("aokvqa_pope_seem_random",),
    }


def test_pqa_leaves_out_what_files_answer_both_ways(tmp_path: Path) -> None:
    rows = [
        {**QUESTION, "image": image, "label": label}
        for image, label in (("a", "yes"), ("b", "no"), ("c", "yes"), ("c", "no"))
    ]
    suite = PQA.on_files([write(tmp_path / "q.json", rows)], tmp_path, (2,), 3)
    assert {path.name for sample in suite.samples() for path in sample.images.paths} == {"a", "b"}
    one_line(lambda: PQA.on_files([tmp_path / "q.json"], tmp_path, (3,), 1))


def test_coco_files_are_read_by_the_same_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "i.json", '{"images": [], "images": []}')
    assert "stands twice" in one_line(lambda: load_coco_objects(path, None, ObjectWords.coco()))
    path = write(tmp_path / "i.json", '{"images": [{"id": ' + "9" * 5000 + "}]}")
    assert "too many digits" in one_line(lambda: load_coco_objects(path, None, ObjectWords.coco()))
