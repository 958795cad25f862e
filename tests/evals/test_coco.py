"""Ground truth of CHAIR from annotation files in COCO's format."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmattn.errors import InputError
from vlmattn.evals.coco import CocoImage, load_coco_objects
from vlmattn.evals.words import ObjectWords

COCO = ObjectWords.coco()


def instances() -> dict[str, Any]:
    return {
        "info": {"year": 2014},
        "images": [
            {"id": 42, "file_name": "COCO_val2014_000000000042.jpg", "height": 480},
            {"id": 7, "file_name": "COCO_val2014_000000000007.jpg"},
            {"id": 9, "file_name": "COCO_val2014_000000000009.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 42, "category_id": 18, "segmentation": [[1.0, 2.0, 3.0]], "bbox": [0, 0, 5, 5]},
            {"id": 2, "image_id": 42, "category_id": 18},
            {"id": 3, "image_id": 42, "category_id": 77, "segmentation": {"counts": [1, 2], "size": [2, 2]}},
            {"id": 4, "image_id": 7, "category_id": 1},
        ],
        "categories": [
            {"id": 1, "name": "person", "supercategory": "person"},
            {"id": 18, "name": "dog"},
            {"id": 77, "name": "cell phone"},
        ],
    }


def captions() -> dict[str, Any]:
    return {
        "annotations": [
            {"image_id": 42, "caption": "A puppy on a sofa."},
            {"image_id": 42, "caption": "a hot dog"},
            {"image_id": 9, "caption": "Nothing to see"},
            {"image_id": 1000, "caption": "a zebra"},
        ]
    }


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "instances.json", instances()), write(tmp_path / "captions.json", captions())


def test_union_of_instances_and_captions(files: tuple[Path, Path]) -> None:
    found = load_coco_objects(*files, COCO)
    assert found == {
        42: CocoImage(42, "COCO_val2014_000000000042.jpg", frozenset({"dog", "cell phone", "couch", "hot dog"})),
        7: CocoImage(7, "COCO_val2014_000000000007.jpg", frozenset({"person"})),
        9: CocoImage(9, "COCO_val2014_000000000009.jpg", frozenset()),
    }
    assert list(found) == [42, 7, 9]


def test_instances_alone(files: tuple[Path, Path]) -> None:
    found = load_coco_objects(files[0], None, COCO)
    assert found[42].objects == {"dog", "cell phone"}


def test_categories_become_canonical_names(files: tuple[Path, Path]) -> None:
    words = ObjectWords({"animal": ["dog"], "human": ["person"], "phone": ["cell phones"]})
    found = load_coco_objects(files[0], None, words)
    assert found[42].objects == {"animal", "phone"}
    assert found[7].objects == {"human"}


def test_a_subset_may_keep_all_annotations(tmp_path: Path, files: tuple[Path, Path]) -> None:
    data = instances()
    data["images"] = data["images"][:1]
    found = load_coco_objects(write(tmp_path / "some.json", data), files[1], COCO)
    assert list(found) == [42]
    assert "zebra" not in found[42].objects


def test_no_images(tmp_path: Path, files: tuple[Path, Path]) -> None:
    data = {**instances(), "images": []}
    assert load_coco_objects(write(tmp_path / "none.json", data), files[1], COCO) == {}


def test_byte_order_mark(tmp_path: Path) -> None:
    assert len(load_coco_objects(write(tmp_path / "i.json", "\ufeff" + json.dumps(instances())), None, COCO)) == 3


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(COCO.names)), max_size=20))
def test_annotations_are_collected_by_image(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, str]]
) -> None:
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(6)],
        "annotations": [{"image_id": i, "category_id": COCO.names.index(name)} for i, name in pairs],
        "categories": [{"id": i, "name": name} for i, name in enumerate(COCO.names)],
    }
    folder = tmp_path_factory.mktemp("coco")
    by_instance = load_coco_objects(write(folder / "i.json", data), None, COCO)
    said = {
        "annotations": [{"image_id": i, "caption": f"a {name}"} for i, name in pairs]
        or [{"image_id": 0, "caption": ""}]
    }
    by_caption = load_coco_objects(
        write(folder / "bare.json", {**data, "annotations": []}), write(folder / "c.json", said), COCO
    )
    expected = {i: {name for j, name in pairs if j == i} for i in range(6)}
    assert {i: image.objects for i, image in by_instance.items()} == expected
    assert by_caption == by_instance


def change(data: dict[str, Any], *path: Any, to: Any = None) -> dict[str, Any]:
    """``data`` with the value at ``path`` replaced, or removed when ``to`` is None."""
    *way, last = path
    place: Any = data
    for step in way:
        place = place[step]
    if to is None:
        del place[last]
    else:
        place[last] = to
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"images": [],\n "annotations": [\n}', ":3: not valid JSON ("),
        ("", ":1: not valid JSON ("),
        ("[1]", ": not a COCO annotation file, it holds a list"),
        ("[" * 100_000, ": lists and objects are nested too deeply; take it from"),
        (captions(), ": has no 'images' (its keys: annotations); "),
        ({}, ": has no 'images' (its keys: none); "),
        (change(instances(), "annotations"), ": has no 'annotations' (its keys: info, images, categories); "),
        (change(instances(), "categories"), ": has no 'categories'"),
        (change(instances(), "images", to={"id": 1}), ": has no list in 'images'"),
        (change(instances(), "images", 1, to=5), ": images[1] is not an object; it needs id and file_name"),
        (change(instances(), "images", 1, "file_name"), ": images[1] has no 'file_name'; it must be a text"),
        (change(instances(), "images", 2, "id", to="9"), ": images[2] has '9' as 'id'; it must be a whole number"),
        (change(instances(), "annotations", 3, "image_id"), ": annotations[3] has no 'image_id'"),
        (change(instances(), "annotations", 0, "category_id"), ": annotations[0] has no 'category_id'"),
        (change(instances(), "annotations", 2, "category_id", to=5), ": annotations[2] has category_id 5, which 'categories' lacks"),
        (change(instances(), "categories", 1, "name"), ": categories[1] has no 'name'"),
        (change(instances(), "categories", 1, "name", to="dragon"), ": the object words have no category 'dragon'; add a line"),
    ],
)  # fmt: skip
def test_bad_instances(tmp_path: Path, data: Any, message: str) -> None:
    path = write(tmp_path / "instances.json", data)
    with pytest.raises(InputError) as caught:
        load_coco_objects(path, None, COCO)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{'annotations': []}", ":1: not valid JSON ("),
        ({"images": []}, ": has no 'annotations'"),
        (change(captions(), "annotations", 1, "caption"), ": annotations[1] has no 'caption'; it must be a text"),
        (change(captions(), "annotations", 1, "caption", to=["x"]), ": annotations[1] has ['x'] as 'caption'"),
        (instances(), ": annotations[0] has no 'caption'"),
        ({"annotations": [{"image_id": 5, "caption": "a dog"}]}, ": none of its 1 captions is of an image in the instances file"),
        ({"annotations": []}, ": none of its 0 captions"),
    ],
)  # fmt: skip
def test_bad_captions(tmp_path: Path, files: tuple[Path, Path], data: Any, message: str) -> None:
    path = write(tmp_path / "other.json", data)
    with pytest.raises(InputError) as caught:
        load_coco_objects(files[0], path, COCO)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path, files: tuple[Path, Path]) -> None:
    missing = tmp_path / "instances_val2014.json"
    with pytest.raises(InputError, match=r"No such file or directory; take it from annotations_trainval2014\.zip"):
        load_coco_objects(missing, None, COCO)
    with pytest.raises(InputError, match=r"cannot read .*missing\.json.*take it from"):
        load_coco_objects(files[0], tmp_path / "missing.json", COCO)
    with pytest.raises(InputError, match="cannot read"):
        load_coco_objects(tmp_path, None, COCO)
    missing.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(InputError, match=r"not a text file in UTF-8.*take it from"):
        load_coco_objects(missing, None, COCO)


def test_a_tenth_of_val2014_takes_no_time(tmp_path: Path) -> None:
    images = 4000
    outline = [[round(0.37 * k, 2) for k in range(60)]]
    data = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(images)],
        "annotations": [
            {"image_id": i % images, "category_id": i % 80, "segmentation": outline} for i in range(7 * images)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(COCO.names)],
    }
    said = {
        "annotations": [
            {"image_id": i % images, "caption": f"A man rides horse {i} past a red bus."} for i in range(5 * images)
        ]
    }
    paths = write(tmp_path / "i.json", data), write(tmp_path / "c.json", said)
    start = time.process_time()
    found = load_coco_objects(*paths, COCO)
    assert time.process_time() - start < 10  # well under a second, however busy the machine is
    assert len(found) == images
    assert all({"person", "horse", "bus"} <= image.objects for image in found.values())
