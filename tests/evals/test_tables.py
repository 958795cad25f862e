"""Tables of the hub: parquet folders with the hub's columns give the same suites as the published files."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path

import numpy as np
import pytest
from on_data import published
from PIL import Image

from vlmattn.errors import InputError
from vlmattn.evals.suites import Pope, make_suite
from vlmattn.evals.suites.tables import is_table

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No network, and nothing left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 0, 0))


def saved(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(shade).save(path)


def parquet(folder: Path, split: str, columns: dict, features: dict, part: str = "data") -> Path:
    """A split as the hub stores it."""
    value = {"str": datasets.Value("string"), "int": datasets.Value("int64"), "image": datasets.Image()}
    listed = {
        name: [value[kind[0]]] if isinstance(kind, list) else value.get(kind, kind) for name, kind in features.items()
    }
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(listed))
    (folder / part).mkdir(parents=True, exist_ok=True)
    data.to_parquet(folder / part / f"{split}-00000-of-00001.parquet")
    return folder


def same(table, files, pictures=True) -> None:
    """Two suites ask the same about the same pictures, know the same truth, and score alike."""
    assert [s.id for s in table.samples()] == [s.id for s in files.samples()]
    for one, other in zip(table.samples(), files.samples(), strict=True):
        for name in ("image_id", "condition", "splits", "prompt", "truth", "image_count"):
            assert getattr(one, name) == getattr(other, name), name
        if pictures:
            assert [list(p.getdata()) for p in one.images()] == [list(p.getdata()) for p in other.images()]
            assert all(p.mode == "RGB" for p in one.images())
        assert len(one.images()) == one.image_count
    replies = ["Yes.", "No", "B", "two", "(A)", "perhaps"]
    answers = {s.id: replies[i % len(replies)] for i, s in enumerate(files.samples())}
    assert table.records(answers) == files.records(answers)
    assert table.name == files.name


POPE = {"id": "str", "question_id": "str", "question": "str", "answer": "str", "image_source": "str", "image": "image", "category": "str"}  # fmt: skip


@pytest.fixture
def pope(tmp_path):
    """Three splits of four questions about two images as a table, and the same as files."""
    columns: dict[str, list] = {name: [] for name in POPE}
    for split in ("adversarial", "popular", "random"):
        lines = []
        for number in range(4):
            source, shade = f"COCO_val2014_{number // 2:012d}", number // 2
            thing = "dog" if number % 2 == 0 else {"adversarial": "cat", "popular": "cat", "random": "boat"}[split]
            answer = "yes" if number % 2 == 0 else "no"
            text = f"Is there a {thing} in the image?"
            row = (str(len(columns["id"])), str(number), text, answer, source, picture(shade), split)
            for name, value in zip(POPE, row, strict=True):
                columns[name].append(value)
            lines.append({"question_id": number, "image": f"{source}.jpg", "text": text, "label": answer})
            saved(tmp_path / "images" / f"{source}.jpg", shade)
        (tmp_path / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
    return parquet(tmp_path / "POPE", "test", columns, POPE)


@pytest.mark.parametrize("limit", [None, 2])
def test_pope(pope, tmp_path, limit):
    table = published("pope", pope, None, limit, 16)
    files = [tmp_path / f"coco_pope_{split}.json" for split in ("adversarial", "popular", "random")]
    same(table, Pope.on_files(files, tmp_path / "images", limit), pictures=False)  # the files' pictures are JPEG
    assert table.samples()[0].splits == ("adversarial", "popular", "random")
    assert table.samples()[0].images()[0].getpixel((0, 0)) == (0, 0, 0)
    assert table.samples()[-1].images()[0].getpixel((0, 0)) == ((1, 0, 0) if limit is None else (0, 0, 0))
    settings = dict(table.settings)
    assert len(settings.pop("revision")) == 1
    assert settings == {"table": "POPE", "config": ["default"], "split": ["test"], "limit": limit}
    assert published("pope", pope, None, limit, 16).settings == table.settings  # so that runs resume


def test_a_configuration_of_splits_that_are_categories(pope, tmp_path):
    """POPE's configuration Full has one split per category; a colon chooses it."""
    for split in ("adversarial", "random"):
        columns = {name: [None] for name in POPE} | {
            "question": ["Is there a dog in the image?"], "answer": ["yes"], "image_source": ["a"], "image": [picture(1)], "category": [split],
        }  # fmt: skip
        parquet(pope, split, columns, POPE, "Full")
    (pope / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*\n"
        "- config_name: Full\n  data_files:\n  - split: adversarial\n    path: Full/adversarial-*\n"
        "  - split: random\n    path: Full/random-*\n---\n"
    )
    (sample,) = published("pope", Path(f"{pope}:Full"), None, None, 16).samples()
    assert sample.splits == ("adversarial", "random")
    assert len(published("pope", pope, None, None, 16).samples()) == 6
    with pytest.raises(InputError, match="no configuration 'Half'; there are default, Full"):
        published("pope", Path(f"{pope}:Half"), None, None, 16)
    card = (pope / "README.md").read_text()
    (pope / "README.md").write_text(card.replace("config_name: default", "config_name: Short"))
    with pytest.raises(InputError, match=r"add a configuration, --data pope=.*POPE:\w+; there are"):
        published("pope", pope, None, None, 16)


def test_mme(tmp_path):
    features = {"question_id": "str", "image": "image", "question": "str", "answer": "str", "category": "str"}
    columns: dict[str, list] = {name: [] for name in features}
    for task, name, shade in (("OCR", "a", 1), ("OCR", "b", 2), ("count", "a", 3)):
        saved(tmp_path / "MME_Benchmark" / task / f"{name}.png", shade)
        asked = [(f"Is it {name}? Please answer yes or no.", "Yes"), ("Is it x? Please answer yes or no.", "No")]
        (tmp_path / "MME_Benchmark" / task / f"{name}.txt").write_text("\n".join(map("\t".join, asked)))
        for question, answer in asked:
            for column, value in zip(
                features, (f"{task}/{name}.png", picture(shade), question, answer, task), strict=True
            ):
                columns[column].append(value)
    folder = parquet(tmp_path / "MME", "test", columns, features)
    for limit in (None, 1):
        same(
            published("mme", folder, None, limit, 16),
            published("mme", tmp_path / "MME_Benchmark", None, limit, 16),
        )
    columns["answer"][3] = "maybe"
    with pytest.raises(InputError, match="bad: row 3: answer must be yes or no, got 'maybe'"):
        published("mme", parquet(tmp_path / "bad", "test", columns, features), None, None, 16)
    odd = {name: values[:3] for name, values in columns.items()}
    with pytest.raises(InputError, match=r"two questions per image, 'OCR/b\.png' has 1"):
        published("mme", parquet(tmp_path / "odd", "test", odd, features), None, None, 16)


HALLUSION = ("category", "subcategory", "visual_input", "set_id", "figure_id", "sample_note", "question_id", "question", "gt_answer_details", "gt_answer", "filename")  # fmt: skip


def test_hallusion(tmp_path):
    rows = []
    for figure in ("0", "1", "2"):
        for question in ("0", "1"):
            name = None if figure == "0" else f"./hallusion_bench/VS/chart/3_{figure}.png"
            row = ("VS", "chart", "1", "3", figure, "note", question, f"Is it {question}?", "why", str(int(figure == "1")), name)  # fmt: skip
            rows.append(dict(zip(HALLUSION, row, strict=True)))
            if name:
                saved(tmp_path / name, int(figure))
    (tmp_path / "HallusionBench.json").write_text(json.dumps(rows))
    features = {**dict.fromkeys(HALLUSION, "str"), "image": "image"}
    columns = {name: [row[name] for row in rows] for name in HALLUSION}
    columns["image"] = [picture(int(row["figure_id"])) if row["filename"] else None for row in rows]
    folder = parquet(tmp_path / "table", "image", columns, features)  # rows without picture are passed over
    (tmp_path / "table" / "data" / "non_image-00000-of-00001.parquet").write_text("a split that nobody reads")
    for limit in (None, 3):
        files = make_suite("hallusion", data=tmp_path / "HallusionBench.json", images=tmp_path, limit=limit)
        same(published("hallusion", folder, None, limit, 16), files)


def test_vqa(tmp_path):
    people = [
        {"answer": word, "answer_confidence": "yes", "answer_id": n} for n, word in enumerate(["two"] * 6 + ["b"] * 4)
    ]
    rows = [{"question_id": n, "image_id": n, "question": f"What is {n}?"} for n in (11, 12, 13)]
    known = [{"question_id": n, "answer_type": kind, "answers": people} for n, kind in ((11, "number"), (12, "other"), (13, "other"))]  # fmt: skip
    for row in rows:
        saved(tmp_path / "images" / f"COCO_val2014_{row['image_id']:012d}.jpg", 0)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "v2_questions.json").write_text(json.dumps({"questions": rows}))
    (tmp_path / "files" / "v2_annotations.json").write_text(json.dumps({"annotations": known}))
    person = [
        {"answer": datasets.Value("string"), "answer_confidence": datasets.Value("string"), "answer_id": datasets.Value("int64")}
    ]  # fmt: skip
    features = {
        "question_type": "str", "multiple_choice_answer": "str", "answers": person, "image_id": "int", "answer_type": "str",
        "question_id": "int", "question": "str", "image": "image",
    }  # fmt: skip
    columns = {name: [row[name] for row in rows] for name in ("question_id", "image_id", "question")}
    columns |= {name: [row[name] for row in known] for name in ("answer_type", "answers")}
    columns |= {"question_type": ["what"] * 3, "multiple_choice_answer": ["two"] * 3, "image": [picture(0)] * 3}
    value = {"str": datasets.Value("string"), "int": datasets.Value("int64"), "image": datasets.Image()}
    typed = datasets.Features({name: value[kind] if isinstance(kind, str) else kind for name, kind in features.items()})
    folder = tmp_path / "VQAv2" / "data"
    folder.mkdir(parents=True)
    for split, answers in (("validation", columns["answers"]), ("test", [None] * 3)):  # test has no answers
        data = datasets.Dataset.from_dict({**columns, "answers": answers}, features=typed)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    for limit in (None, 2):
        table = published("vqa", folder.parent, None, limit, 16)
        same(table, published("vqa", tmp_path / "files", tmp_path / "images", limit, 16))
        assert table.settings["split"] == ["validation"]
    (folder / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match="row 0: no answers of people"):
        published("vqa", folder.parent, None, None, 16)


def test_muirbench(tmp_path):
    features = {
        "idx": "str", "task": "str", "image_relation": "str", "image_type": "str", "image_list": ["image"], "question": "str",
        "options": ["str"], "answer": "str", "counterpart_idx": "str",
    }  # fmt: skip
    rows = [
        ("0", "Counting", "Is <image> like <image>?", ["yes", "no", "None"], "B", "1", [1, 2]),
        ("1", "Counting", "Is <image> like <image>?", ["yes", "maybe", "None"], "C", "0", [1, 2]),
        ("2", "Retrieval", "Like <image>?", ["<image>", "<image>"], "A", "3", [3, 4, 5]),
    ]
    names = ("idx", "task", "question", "options", "answer", "counterpart_idx")
    items, columns = [], {name: ["x"] * 3 for name in features}
    for row in rows:
        items.append({**dict(zip(names, row, strict=False)), "image_list": [f"{shade}.png" for shade in row[-1]]})
        for shade in row[-1]:
            saved(tmp_path / "images" / f"{shade}.png", shade)
    columns |= {name: [row[i] for row in rows] for i, name in enumerate(names)}
    columns["image_list"] = [[picture(shade) for shade in row[-1]] for row in rows]
    (tmp_path / "muir.jsonl").write_text("\n".join(map(json.dumps, items)))
    folder = parquet(tmp_path / "MUIRBENCH", "test", columns, features)
    for limit in (None, 1):
        table = published("choice", folder, None, limit, 16)
        same(table, published("choice", tmp_path / "muir.jsonl", tmp_path / "images", limit, 16))
    first, second, third = published("choice", folder, None, None, 16).samples()
    assert first.image_id == second.image_id == "0+1"  # twins show the same pictures: the bootstrap draws them together
    assert third.prompt.startswith("Like (image 1)?\nA. (image 2)\nB. (image 3)\n")  # no mark is left for the processor
    assert third.image_count == 3


def test_blink(tmp_path):
    """One configuration per task, pictures in up to four columns, answers in brackets."""
    columns = ("idx", "question", "sub_task", "image_1", "image_2", "image_3", "image_4", "choices", "answer", "prompt", "explanation")  # fmt: skip
    features = {name: "image" if name.startswith("image") else "str" for name in columns} | {"choices": ["str"]}
    items = []
    for task, count in (("Counting", 1), ("Jigsaw", 3)):
        shown = [picture(n) if n < count else None for n in range(4)]
        prompt = f"How many?\n(A) {task}\n(B) two"
        row = (f"val_{task}_1", "How many?", task, *shown, [task, "two"], "(B)", prompt, "because")
        one = {name: [value] for name, value in zip(columns, row, strict=True)}
        parquet(tmp_path / "BLINK", "val", one, features, task)
        parquet(tmp_path / "BLINK", "test", one | {"answer": ["hidden"]}, features, task)
        names = [f"{n}.png" for n in range(count)]
        items.append({**{k: v[0] for k, v in one.items() if not k.startswith("image")}, "images": names})
    for shade in range(4):
        saved(tmp_path / "images" / f"{shade}.png", shade)
    (tmp_path / "blink.json").write_text(json.dumps(items))
    files = published("choice", tmp_path / "blink.json", tmp_path / "images", None, 16)
    same(published("choice", tmp_path / "BLINK", None, None, 16), files)  # files without a card: one table
    parts = "".join(
        f"- config_name: {task}\n  data_files:\n  - split: val\n    path: {task}/val-*\n  - split: test\n    path: {task}/test-*\n"
        for task in ("Counting", "Jigsaw")
    )
    (tmp_path / "BLINK" / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    table = published("choice", tmp_path / "BLINK", None, None, 16)
    same(table, files)
    assert table.settings["config"] == ["Counting", "Jigsaw"]
    assert table.settings["split"] == ["val"]
    assert table.samples()[0].prompt == (
        "How many?\n(A) Counting\n(B) two\nAnswer with the option's letter from the given choices directly."
    )
    only = published("choice", Path(f"{tmp_path / 'BLINK'}:Jigsaw"), None, None, 16)
    assert [s.id for s in only.samples()] == ["val_Jigsaw_1"]


def test_other_columns_are_named_with_the_suite_they_fit(pope, tmp_path):
    with pytest.raises(
        InputError,
        match=r"suite vqa \(VQAv2\) the columns image_id, answers are missing.*those of .*POPE: --data pope=",
    ):
        published("vqa", pope, None, None, 16)
    odd = parquet(tmp_path / "odd", "test", {"text": ["a"]}, {"text": "str"})
    with pytest.raises(InputError, match="are missing; there are text") as caught:
        published("choice", odd, None, None, 16)
    assert "--data" not in str(caught.value)
    with pytest.raises(InputError, match="two questions per image"):  # POPE has all of MME's columns
        published("mme", pope, None, None, 16)


def test_a_table_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"no file or folder 'lmms-lab/POPE' here.*hf download lmms-lab/POPE"
    ) as caught:
        published("pope", Path("lmms-lab/POPE"), None, None, 16)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        InputError, match=r"suite pope: no such file or folder: a/b/c; a table of the hub is owner/name"
    ):
        published("pope", Path("a/b/c"), None, None, 16)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "test-00000-of-00001.parquet").write_text("not parquet")
    with pytest.raises(InputError, match=r"cannot read the table in .*broken") as caught:
        published("pope", broken, None, None, 16)
    assert "\n" not in str(caught.value)
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r'pip install "vlmattn\[hub\]"'):
        published("pope", Path("lmms-lab/POPE"), None, None, 16)


@pytest.mark.parametrize("kind", ["photo", "deep", "named"])
def test_pictures_of_a_table_are_read_as_files_are(pope, kind):
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    ramp = np.linspace(0, 65535, 2400).reshape(40, 60)
    grey = ramp.astype(np.uint16) if kind == "deep" else (ramp / 257).astype(np.uint8)
    Image.fromarray(grey).save(content, "PNG", exif=exif)
    path = pope / "data" / "test-00000-of-00001.parquet"
    table = pq.read_table(path).slice(0, 1)
    place = table.column_names.index("image")
    cells = pa.array(
        [{"bytes": None if kind == "named" else content.getvalue(), "path": "/etc/hostname"}],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    pq.write_table(table.set_column(place, "image", cells).replace_schema_metadata(table.schema.metadata), path)
    (sample,) = published("pope", pope, None, None, 16).samples()
    if kind == "named":  # of a file of this machine, which a table has no business to read
        with pytest.raises(InputError, match="lies outside"):
            sample.images()
        return
    (picture,) = sample.images()
    assert picture.size == (40, 60)
    assert np.asarray(picture).mean() == pytest.approx(127.5, abs=0.6)


def test_a_damaged_picture_is_named(pope):
    cells = [{"bytes": b"not a picture", "path": None}]
    data = datasets.load_dataset("parquet", data_files=str(pope / "data" / "*.parquet"), split="train")
    plain = data.cast_column("image", datasets.Image(decode=False)).select(range(1))
    columns = {name: plain[name][:] for name in plain.column_names} | {"image": cells}
    datasets.Dataset.from_dict(columns, features=data.features).to_parquet(
        pope / "data" / "test-00000-of-00001.parquet"
    )
    (sample,) = published("pope", pope, None, None, 16).samples()
    with pytest.raises(InputError, match="POPE: row 0: cannot read the pictures"):
        sample.images()


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("lmms-lab/POPE", True), ("BLINK-Benchmark/BLINK:Counting", True), ("MME_Benchmark", False), ("/data/MME", False), ("data/questions.jsonl", False),
        ("a/b/c", False),
    ],
)  # fmt: skip
def test_names_of_the_hub(name, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_table(Path(name)) is table
    Path(name if not name.startswith("/") else "x").mkdir(parents=True, exist_ok=True)
    assert is_table(Path(name)) is False  # a folder of that name without parquet files
