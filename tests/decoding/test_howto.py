"""docs/howto-decoding.md: its example runs; docs/extend/rule.md: a rule in ten lines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_example_runs():
    page = "\n".join(blocks(DOCS / "howto-decoding.md"))
    done = subprocess.run([sys.executable, "-c", page], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum("describe the image" in line for line in done.stdout.splitlines()) == 1
    assert re.search(r"\{'vcd': [1-9]\d*\}", done.stdout)


def test_ten_lines():
    (block,) = (block for block in blocks(DOCS / "extend" / "rule.md") if "@register" in block)
    body = block[block.index("@register") : block.index("print(")]
    lines = [line for line in body.splitlines() if line.strip() and not line.strip().startswith('"""')]
    assert len(lines) <= 10
