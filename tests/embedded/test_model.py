"""The bundled model: it loads in every way, is what its card says, and looks at the image."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmattn
from vlmattn.embedded import FOLDER
from vlmattn.embedded.scenes import make_scene
from vlmattn.evals.card import CHECK_SCENES, card
from vlmattn.evals.prompts import answer
from vlmattn.evals.runner import evaluate
from vlmattn.evals.suites import Pope, World


@pytest.fixture(scope="module")
def figures():
    return json.loads((FOLDER / "figures.json").read_text())


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


def test_the_weights_have_the_accuracy_of_the_card(figures, tmp_path):
    """On the card's small set; another CPU may flip a few of its questions."""
    suite = Pope.on_scenes([World("faint", 0.0, CHECK_SCENES)])
    result = evaluate(*vlmattn.load("embedded"), [suite], ["none"], tmp_path, "embedded", say=lambda _: None)
    for table in result.summary["tables"]:
        measured = table["rows"]["none"]["metrics"]["accuracy"]["value"]
        assert measured == pytest.approx(figures["check"][table["split"]], abs=0.6)


def test_the_card_shows_the_measured_figures(figures):
    log = json.loads((FOLDER / "training_log.json").read_text())
    assert (FOLDER / "README.md").read_text() == card(figures, log)
    gates = {gate["name"]: gate for gate in figures["gates"]}
    assert len(gates) == 13
    assert all(gate["passed"] == (gate["low"] <= gate["value"] <= gate["high"]) for gate in gates.values())


def test_half_precision_on_disk_changes_no_answer():
    """Weights are stored in float16; computing in float32 and float16 must agree on clear questions."""
    scenes = [make_scene(12, i, "clear", count=3) for i in range(20)]
    prompts = [f"Is there a {scene.things[0].category} in the image?" for scene, _ in scenes]
    pictures = [[Image.fromarray(picture)] for _, picture in scenes]
    texts = [answer(*vlmattn.load("embedded", dtype=dtype), prompts, pictures, 4) for dtype in ("float32", "bfloat16")]
    assert sum(a == b for a, b in zip(*texts, strict=True)) >= 19
    assert texts[0].count("yes") >= 18
