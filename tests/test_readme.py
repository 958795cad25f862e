"""What the README shows is true: its example runs, its table is the one that was measured, its links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs():
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "make_scene" in block]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    assert re.search(r"is there a dog in the image \? (yes|no)", done.stdout)
    assert re.search(r"\{'vhr': [1-9]\d*\}", done.stdout)


def test_every_preset_is_in_the_readme():
    import vlmattn

    assert all(f"`{name}`" in README for name in vlmattn.presets())


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
