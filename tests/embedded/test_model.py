"""The bundled model: it loads in every way, and looks at the image."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmattn
from vlmattn.embedded import FOLDER
from vlmattn.embedded.scenes import make_scene
from vlmattn.evals.prompts import answer


def test_the_folder_is_small_and_plain():
    names = {path.name for path in FOLDER.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
    } <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12e6
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_plain_from_pretrained_gives_the_same_model():
    model, processor = vlmattn.load("embedded")
    plain = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)
    assert type(plain) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert type(AutoProcessor.from_pretrained(FOLDER)) is type(processor)


def test_unknown_bundled_models_are_named():
    with pytest.raises(vlmattn.UnknownNameError, match="embedded"):
        vlmattn.load("embeded")


def test_half_precision_on_disk_changes_no_answer():
    """Weights are stored in float16; computing in float32 and float16 must agree on clear questions."""
    scenes = [make_scene(12, i, "clear", count=3) for i in range(20)]
    prompts = [f"Is there a {scene.things[0].category} in the image?" for scene, _ in scenes]
    pictures = [[Image.fromarray(picture)] for _, picture in scenes]
    texts = [answer(*vlmattn.load("embedded", dtype=dtype), prompts, pictures, 4) for dtype in ("float32", "bfloat16")]
    assert sum(a == b for a, b in zip(*texts, strict=True)) >= 19
    assert texts[0].count("yes") >= 18
