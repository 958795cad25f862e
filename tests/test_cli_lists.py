"""Lists of presets on the command line."""

from __future__ import annotations

import pytest

from vlmattn.cli.common import listed
from vlmattn.errors import OptionError


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("var, vhr,,pai", ["var", "vhr", "pai"]),
        ("fastv@{.5,.25}", ["fastv@.5", "fastv@.25"]),
        ("none,fastv@{.5, .25},divprune@{.1}", ["none", "fastv@.5", "fastv@.25", "divprune@.1"]),
        ("{fastv,random}@{.5,.1}+vhr", ["fastv@.5+vhr", "fastv@.1+vhr", "random@.5+vhr", "random@.1+vhr"]),
        ("", []),
    ],
)
def test_braces_stand_for_each_of_their_parts(text, names):
    assert listed(text) == names


@pytest.mark.parametrize("text", ["fastv@{.5,.25", "fastv@.5}", "fastv@{.5,{.25}}"])
def test_braces_must_be_closed(text):
    with pytest.raises(OptionError, match="braces must be closed"):
        listed(text)
