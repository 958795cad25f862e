"""docs/howto-decoding.md: its examples run, and a method in ten lines is a whole method."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "howto-decoding.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
AFTER = """
from vlmattn.recipe import Recipe
recipe = Recipe.of("pai+blind")
assert Recipe.from_text(recipe.to_yaml()) == recipe
assert "blind" in vlmattn.presets()
try:
    Recipe.of("blind", alpha=11)
except vlmattn.OptionError as error:
    print("refused:", error)
"""


def test_the_examples_run():
    done = subprocess.run([sys.executable, "-c", "\n".join([*BLOCKS, AFTER])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("describe the image" in line for line in lines) == 3
    assert re.search(r"\{'vcd': [1-9]\d*\}", done.stdout)
    assert "refused: blind.alpha must be a number within 0..10" in done.stdout


def test_ten_lines():
    (block,) = [block for block in BLOCKS if "@register" in block]
    body = block[block.index("@register") : block.index("print(")]
    lines = [line for line in body.splitlines() if line.strip() and not line.strip().startswith('"""')]
    assert len(lines) <= 10
