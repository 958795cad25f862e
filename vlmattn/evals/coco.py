"""Which objects are in the images of COCO: the ground truth of CHAIR, from the annotation files as published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError, quoted
from vlmattn.evals.words import ObjectWords
from vlmattn.texts import read_json

_SOURCE = "take it from annotations_trainval2014.zip at https://cocodataset.org/#download"
_BULKY = ("segmentation", "counts", "bbox")


@dataclass(frozen=True)
class CocoImage:
    """An image and the objects in it (canonical names of the vocabulary it was read with)."""

    id: int
    file_name: str
    objects: frozenset[str]


def load_coco_objects(instances: Path, captions: Path | None, words: ObjectWords) -> dict[int, CocoImage]:
    """Read the objects of every image, as CHAIR counts them: annotated instances plus what the captions name.

    Args:
        instances: a file like ``instances_val2014.json``. Its images decide which images are returned, in its order;
            annotations of other images are passed over, so a subset may leave them in.
        captions: a file like ``captions_val2014.json`` for the same images, or None for the instances alone.
        words: the vocabulary; every category of ``instances`` must be one of its words.

    Raises:
        InputError: a file is missing, not valid JSON or in another format; a category is unknown; or the captions
            belong to other images.
    """
    data = _read(instances)
    images = _rows(instances, data, "images", {"id": int, "file_name": str})
    annotations = _rows(instances, data, "annotations", {"image_id": int, "category_id": int})
    categories = _categories(instances, data, words)
    objects: dict[int, set[str]] = {row["id"]: set() for row in images}
    for index, row in enumerate(annotations):
        name = categories.get(row["category_id"])
        if name is None:
            raise InputError(
                f"{instances}: annotations[{index}] has category_id {row['category_id']}, which 'categories'"
                f" lacks; {_SOURCE}"
            )
        if row["image_id"] in objects:
            objects[row["image_id"]].add(name)
    if captions is not None:
        _add_captions(captions, objects, words)
    return {row["id"]: CocoImage(row["id"], row["file_name"], frozenset(objects[row["id"]])) for row in images}


def load_coco_captions(path: Path) -> dict[int, tuple[str, list[str]]]:
    """File name and captions of every image of a file like ``captions_val2014.json``, in its order.

    Raises:
        InputError: the file is missing, not valid JSON or in another format; an image is there twice, or has no
            caption.
    """
    data = _read(path)
    found: dict[int, tuple[str, list[str]]] = {}
    for index, row in enumerate(_rows(path, data, "images", {"id": int, "file_name": str})):
        if row["id"] in found:
            raise InputError(f"{path}: images[{index}] has the id {row['id']} of an earlier one; {_SOURCE}")
        found[row["id"]] = (row["file_name"], [])
    for row in _rows(path, data, "annotations", {"image_id": int, "caption": str}):
        if row["image_id"] in found:  # a subset may leave the others in
            found[row["image_id"]][1].append(row["caption"])
    for key, (name, captions) in found.items():
        if not captions:
            raise InputError(f"{path}: image {key} ({name}) has no caption; give the captions file of these images")
    if not found:
        raise InputError(f"{path}: it holds no images; {_SOURCE}")
    return found


def _categories(path: Path, data: dict[str, Any], words: ObjectWords) -> dict[int, str]:
    names: dict[int, str] = {}
    for row in _rows(path, data, "categories", {"id": int, "name": str}):
        name = words.canonical(row["name"])
        if name is None:
            raise InputError(
                f"{path}: the object words have no category {quoted(row['name'])}; add a line that starts with"
                " it to the synonyms file"
            )
        names[row["id"]] = name
    return names


def _add_captions(path: Path, objects: dict[int, set[str]], words: ObjectWords) -> None:
    rows = _rows(path, _read(path), "annotations", {"image_id": int, "caption": str})
    of_ours = [row for row in rows if row["image_id"] in objects]
    if objects and not of_ours:
        raise InputError(
            f"{path}: none of its {len(rows)} captions is of an image in the instances file; give the captions"
            " of the same split"
        )
    for row in of_ours:
        objects[row["image_id"]].update(words.mentions(row["caption"]))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path, made=_slim)
    except InputError as error:
        raise InputError(f"{error}; {_SOURCE}") from None
    if not isinstance(data, dict):
        raise InputError(
            f"{path}: not a COCO annotation file, it holds a {type(data).__name__} instead of an object; {_SOURCE}"
        )
    return data


def _slim(row: dict[str, Any]) -> dict[str, Any]:
    # Outlines are nine tenths of the file: dropped while parsing, they never add up in memory.
    for key in _BULKY:
        row.pop(key, None)
    return row


def _rows(path: Path, data: dict[str, Any], part: str, needed: dict[str, type]) -> list[dict[str, Any]]:
    """The list ``data[part]``, checked to hold the ``needed`` keys with values of their types."""
    rows = data.get(part)
    if not isinstance(rows, list):
        what = "has no" if rows is None else "has no list in"
        raise InputError(f"{path}: {what} '{part}' (its keys: {', '.join(data) or 'none'}); {_SOURCE}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: {part}[{index}] is not an object; it needs {' and '.join(needed)}")
        for key, kind in needed.items():
            if not isinstance(row.get(key), kind) or isinstance(row[key], bool):
                has = "has no" if key not in row else f"has {quoted(row[key], 40)} as"
                expected = "a whole number" if kind is int else "a text"
                raise InputError(f"{path}: {part}[{index}] {has} '{key}'; it must be {expected}")
    return rows
