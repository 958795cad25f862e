"""Pairs of prompts that directions are measured on: true and untrue answers, a picture and none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad

from vlmattn.embedded.text import existence_question
from vlmattn.errors import InputError
from vlmattn.evals.prompts import encode
from vlmattn.evals.suites.world import World, absent_objects
from vlmattn.files import path_text
from vlmattn.inspection import Pair
from vlmattn.models import OF_TOKENS
from vlmattn.pictures import open_picture
from vlmattn.texts import read_json_lines

#: Scenes that neither training nor any evaluation draws from.
SEED = 32


def of_scenes(model: Any, processor: Any, scenes: int, said: tuple[str, str] = ("yes", "no")) -> Iterator[Pair]:
    """Is there a thing? The true answer and the other one, about a thing that is there and one that often goes with it.

    Half of the true answers are yes, so that what "yes" and "no" differ in cancels in a mean.
    """
    yes, no = said
    world = World("faint", 0.5, scenes, SEED)
    for index in range(scenes):
        scene = world.scene(index)
        absent = absent_objects(scene, "adversarial", np.random.default_rng([SEED, index]))[0]
        for thing, true, untrue in ((scene.categories[0], yes, no), (absent, no, yes)):
            yield _answered(model, processor, existence_question(thing), world.image(index), true, untrue)


def of_images(model: Any, processor: Any, images: Sequence[Path], question: str) -> Iterator[Pair]:
    """A question about each picture, and about one of its mean colour in its place."""
    for path in images:
        picture = open_picture(path).convert("RGB")
        colour = tuple(round(float(value)) for value in np.asarray(picture).mean((0, 1)))
        plain = Image.new("RGB", picture.size, colour)
        good, bad = (dict(encode(model, processor, [question], [[shown]])) for shown in (picture, plain))
        yield Pair(good, bad)


def of_file(model: Any, processor: Any, path: str | os.PathLike[str]) -> list[Pair]:
    """JSON lines with ``image`` (a path, from the file's folder), ``question``, ``good`` and ``bad`` answers.

    Raises:
        FileError: it cannot be read. InputError: a line without one of these.
    """
    found, folder = [], Path(path).parent
    for number, line in read_json_lines(path):
        names = ("image", "question", "good", "bad")
        if not isinstance(line, dict) or not all(isinstance(line.get(name), str) and line[name] for name in names):
            raise InputError(f"{path_text(path)}: line {number} needs {', '.join(names)}, each a text")
        picture = open_picture(folder / line["image"]).convert("RGB")
        found.append(_answered(model, processor, line["question"], [picture], line["good"], line["bad"]))
    return found


def _answered(model: Any, processor: Any, question: str, images: list[Any], good: str, bad: str) -> Pair:
    prompt = dict(encode(model, processor, [question], [images]))
    ids = [processor.tokenizer.encode(said, add_special_tokens=False) for said in (good, bad)]
    if not all(ids):
        raise InputError("an answer has no tokens")
    return Pair(_with(prompt, ids[0]), _with(prompt, ids[1]), rows=(len(ids[0]), len(ids[1])))


def _with(prompt: dict[str, Any], said: list[int]) -> dict[str, Any]:
    """A prompt with the tokens of an answer behind it."""
    device, count = prompt["input_ids"].device, len(said)
    found = dict(prompt, input_ids=torch.cat([prompt["input_ids"], torch.tensor([said], device=device)], 1))
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    return found | {name: pad(prompt[name], (0, count)) for name in OF_TOKENS if name in prompt}
