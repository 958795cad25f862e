"""``model.vlmattn``: what users see of a wrapped model, and nothing of the engine."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from tiny import build, generate, prompt

import vlmattn
from vlmattn.wrapping import record_of


class Cells(HTMLParser):
    """Text of the cells of a table, row by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        self.rows[-1].append(data)


def test_users_see_their_methods_only():
    handle = vlmattn.wrap(build("llava"), "var").vlmattn
    assert {name for name in dir(handle) if not name.startswith("_")} == {
        "disable", "enable", "enabled", "recipe", "report", "set",
    }  # fmt: skip
    assert repr(handle) == "<vlmattn 'var' on llava, enabled>"
    handle.disable()
    assert repr(handle) == "<vlmattn 'var' on llava, disabled>"


def test_what_notebooks_show():
    model, inputs = vlmattn.wrap(build("llava"), "pai+vcd"), prompt("llava")
    generate(model, inputs)
    report, cells = model.vlmattn.report(), dict(Cells(model.vlmattn._repr_html_()).rows)
    assert cells["recipe"] == "pai+vcd on llava, enabled"
    assert int(cells["fired: pai"].replace(",", "")) == report["fired"]["pai"] > 0
    assert all(name in cells["decode"] for name in report["backends"]["decode"])


def test_what_people_wrote_is_no_markup():
    recipe = vlmattn.Recipe("<b>mine</b>", (vlmattn.VAR(),))
    shown = vlmattn.wrap(build("llava"), recipe).vlmattn._repr_html_()
    assert "<b>" not in shown
    assert ["recipe", "<b>mine</b> on llava, enabled"] in Cells(shown).rows


@pytest.mark.parametrize("name", ["anatomy", "family", "now", "plan_of", "temporarily", "hooks"])
def test_the_engine_has_a_record_of_its_own(name):
    model = vlmattn.wrap(build("llava"), "var")
    assert hasattr(record_of(model), name)
    assert not hasattr(model.vlmattn, name)
    assert record_of(vlmattn.unwrap(model)) is None
