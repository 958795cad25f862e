"""The decode kernels compile for real cards, and groups cost next to nothing there. In a process that does not
interpret."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.slow
TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "kernel_resources.csv"
COMPILED = [(1, 1), (1, 3), (1, 4), (4, 1), (4, 4), (7, 1), (7, 4)]  # repeat, groups; at head dimension 128
PROGRAM = f"""
import json
from benchmarks.static import TARGETS, Case, resources
cases = [Case(128, repeat, groups) for repeat, groups in {COMPILED}] + [Case(128, tokens=256), Case(128, groups=4, lift=True)]
for target in TARGETS:
    for case in cases:
        print(json.dumps(resources(case, target)), flush=True)
"""


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def committed():
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def check(rows, targets):
    """Grouped <= plain + 16 registers (the compiler of triton 3.6 needs up to 29 more) and as many matrix instructions,
    at equal tile; nothing spills at D = 128."""
    compared = 0
    for row in rows:
        if row["target"] not in targets or int(row["dim"]) != 128:
            continue
        assert int(row["spills"]) == 0, row
        assert int(row["shared"]) <= 164 * 1024, "more than a multiprocessor of sm_80 has"
        same = [
            plain for plain in rows
            if int(plain["groups"]) == 1 and all(str(plain[key]) == str(row[key]) for key in row.keys() - {"groups", "repeat", "registers", "matrix", "shared", "spills", "triton"})
        ]  # fmt: skip
        if int(row["groups"]) > 1 and same:
            compared += 1
            more = 16 if triton.__version__ >= "3.9" else 32
            assert int(row["registers"]) <= max(int(plain["registers"]) for plain in same) + more, row
            assert {int(row["matrix"])} == {int(plain["matrix"]) for plain in same}, row
    return compared


def test_groups_cost_next_to_nothing(compiled):
    assert len(compiled) == 3 * (len(COMPILED) + 2)
    assert all(row["matrix"] > 0 for row in compiled), "tiles must run on matrix instructions"
    assert check(compiled, ("sm_80", "sm_90", "gfx942")) >= 9


def test_the_committed_table_is_of_this_code(compiled):
    """Exactly, under the version of triton it was made with."""
    import triton

    rows = committed()
    assert check(rows, ("sm_80", "sm_90")) >= 10
    if rows[0]["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {rows[0]['triton']}")
    by_case = {tuple(row[key] for key in list(compiled[0])[:12]): row for row in rows}
    for row in compiled:
        found = by_case[tuple(str(row[key]) for key in list(row)[:12])]
        assert {key: str(value) for key, value in row.items()}.items() <= found.items()


def test_the_page_is_of_this_code():
    from benchmarks.kernel_page import page

    assert page() == (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(), "python -m benchmarks.kernel_page"
