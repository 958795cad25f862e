"""What the table says of families is so on their tiny models."""

from __future__ import annotations

from operator import attrgetter

import pytest
from zoo import ZOO

import vlmattn
from vlmattn import UnsupportedError
from vlmattn.inspection.looking import prompt_of
from vlmattn.models import find_family, registered
from vlmattn.models.paths import hook_points
from vlmattn.models.table import COLUMNS, short, verdict, verdicts

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore::UserWarning")]
SERVED = [name for name, family in registered().items() if not family.unsupported]
ELSEWHERE = ("instructblip", "instructblipvideo")  # Vicuna has no .decoder in its .model, OPT has
SOME = ("minicpmv4_6", "minicpm_ocr")  # their configs have none of the fields that their successor's has
BUILT = [name for name, tiny in ZOO.items() if not tiny.unbuildable and name not in (*ELSEWHERE, "florence2")]


@pytest.mark.parametrize("name", BUILT)
def test_hook_points_are_there(name):
    model = ZOO[name].build()
    family = find_family(model)
    if model.config.model_type not in registered():
        pytest.skip("of no family")
    found = hook_points(family)
    at = lambda path: attrgetter(path.removeprefix("model."))(model)  # noqa: E731
    assert at(found["decoder"]) is family.decoder(model)
    assert list(at(found["layers"])) == list(family.layers(model))
    names = [path.removeprefix("layer.") for path in found["attention"].split(", ")]
    for layer in family.layers(model):
        for attention in (family.attention(layer), family.cross_attention(layer)):
            assert attention is None or any(getattr(layer, one, None) is attention for one in names)
    fields = found["markers"].partition(" (what")[0].split(", ") if family.markers else []
    assert all(hasattr(model.config, field.removeprefix("model.config.")) for field in fields) != (name in SOME)
    if found["placeholders"].startswith("model.config.image_token_id"):
        assert model.config.image_token_id in family.placeholders(model)


@pytest.mark.parametrize("name", [*BUILT, *ELSEWHERE])
def test_what_looking_says_is_what_look_does(name):
    tiny = ZOO[name]
    model, inputs = tiny.build(), tiny.prompt(1).inputs
    said = verdicts().get(model.config.model_type)
    if said is None:
        pytest.skip("of no family")
    vlmattn.wrap(model, "none")
    try:
        prompt_of(model, inputs)
    except UnsupportedError:
        assert said["looking"] != "yes"
    else:
        assert said["looking"] == "yes"


@pytest.mark.parametrize("name", SERVED)
def test_a_verdict_has_every_column_and_hook_point(name):
    found = verdict(name)
    assert found.keys() >= {*COLUMNS, "checkpoint", "decoder", "layers", "attention", "placeholders", "markers"}
    refused = [column for column in COLUMNS if found[column] != "yes"]
    assert ("nearest" in found) == bool(refused)
    if refused:
        named = found["nearest"].rpartition("like ")[2].split(", ")
        assert named
        assert all(verdict(other)[column] == "yes" for other in named for column in refused)


def test_the_narrow_table_has_the_columns():
    rows, notes = short()
    assert all(len(row) == 1 + len(COLUMNS) for row in rows)
    (blip,) = (row for row in rows if row[0].startswith("blip-2,"))
    assert blip[-1].startswith("no (")
    assert "before the tokens" in notes[int(blip[-1][4:-1]) - 1]
