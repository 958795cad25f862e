"""Offline, one thread (or OMP_NUM_THREADS); ``tests/`` is importable (pytest puts this folder on the path): ``from tiny import build``."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("VLMATTN_BACKEND", None)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0]))
if importlib.util.find_spec("hypothesis"):  # a machine that is lent for its GPU may not have it
    from hypothesis import HealthCheck, settings

    # Whether a test passes must not depend on how fast a machine is, nor on luck. ``--hypothesis-profile=explore`` draws
    # new examples: those are for people to find.
    anywhere = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("explore", **anywhere)
    settings.register_profile("vlmattn", derandomize=True, **anywhere)
    settings.load_profile("vlmattn")

# What is computed by kernels, methods and rules: rounding differs between CPUs and thread counts (``make test-portable``).
NUMERIC = ("kernels", "interventions", "decoding", "test_laws.py", "test_running.py")
WORDS = ("refusals", "recipes", "howto", "triton")  # files of those folders that compare no sums of this CPU


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items):
    """Mark the numeric tests, and run those that need time last."""
    folder = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(folder) if item.path.is_relative_to(folder) else item.path
        if path.parts[0] in NUMERIC and not any(word in path.name for word in WORDS):
            item.add_marker("numeric")
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture
def no_grad():
    """For tests that run models; gradients stay on elsewhere."""
    with torch.no_grad():
        yield


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""
    from vlmattn import cli

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlmattn", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    monkeypatch.setattr(cli.common.console, "width", 200)
    return call
