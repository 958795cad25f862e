"""What an answer was made from: its question and the files of its images, as short hashes that a resume compares."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFiles
from vlmattn.files import file_sha256

LENGTH = 16  # hex digits of a hash


def short_hash(data: bytes | str) -> str:
    """The first hex digits of a sha256."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:LENGTH]


def question_hash(sample: Sample) -> str:
    """Of what is asked and what is true."""
    paths = [path.name for path in sample.images.paths] if isinstance(sample.images, ImageFiles) else []
    return short_hash(json.dumps([sample.id, sample.prompt, paths, sample.image_count, _plain(sample.truth)]))


def questions_hash(suite: Suite) -> str:
    """Of all samples of a suite, in their order."""
    return short_hash("".join(question_hash(sample) for sample in suite.samples()))


def image_hash(sample: Sample, of_file: Callable[[Path], str] | None = None) -> str:
    """Of the bytes of the image files; "" where images are no files but follow from the settings.

    Args:
        of_file: hash of one file; for callers that remember them.
    """
    if not isinstance(sample.images, ImageFiles):
        return ""
    return short_hash("".join((of_file or file_hash)(path) for path in sample.images.paths))


def file_hash(path: Path) -> str:
    """Of the bytes of a file; "missing" where there is none that can be read."""
    try:
        return file_sha256(path)[:LENGTH]
    except OSError:
        return "missing"


def image_names(sample: Sample) -> str:
    """The files of a sample's images, for messages."""
    return ", ".join(map(str, sample.images.paths)) if isinstance(sample.images, ImageFiles) else "its images"


def _plain(value: Any) -> Any:
    """A suite's truth as JSON that is the same in every process."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {spec.name: _plain(getattr(value, spec.name)) for spec in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return sorted(([str(key), _plain(each)] for key, each in value.items()), key=json.dumps)
    if isinstance(value, Set):
        return sorted((_plain(each) for each in value), key=json.dumps)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float)) or value is None else type(value).__qualname__
