"""The bundled model is what its card says, and the card says what was measured."""

from __future__ import annotations

import json

import pytest

import vlmattn
from tools.bundled.card_tiny import CHECK_SCENES, card
from vlmattn.embedded import FOLDER
from vlmattn.evals.runner import evaluate
from vlmattn.evals.suites import Pope, World


@pytest.fixture(scope="module")
def figures():
    return json.loads((FOLDER / "figures.json").read_text())


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
