"""Branches in language models with sliding windows equal an oracle that reads every view anew for every token."""

from __future__ import annotations

import pytest
import test_branches
from oracle import three
from test_branches import recipe_of, run, same
from tiny import left_padded, windowed

import vlmattn

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("name", ["vcd", "pai_guidance", "longer", "three", "dola", "pai+vcd", "var+vcd", "rbd"])
def test_equals_the_oracle_in_a_padded_batch(name, kind, monkeypatch):
    """Windows that are outgrown, by the prompts or by the answer; with rbd only by the answer."""
    window = 60 if name == "rbd" else 22
    monkeypatch.setattr(test_branches, "build", lambda family: windowed(window, kind, seed=1))
    model = vlmattn.wrap(windowed(window, kind, seed=1), "none")
    tokens, logits = run(model, left_padded(three("llava")), recipe_of(name))
    for row, (wanted, scores) in enumerate(test_branches.truth.__wrapped__("llava", name)):
        assert tokens[row].tolist() == wanted
        same(logits[row], scores)
