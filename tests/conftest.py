"""Offline, one thread; ``tests/`` is importable (pytest puts this folder on the path): ``from tiny import build``."""

import importlib.util
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("VLMATTN_BACKEND", None)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

torch.set_num_threads(1)
if importlib.util.find_spec("hypothesis"):  # a machine that is lent for its GPU may not have it
    from hypothesis import settings

    settings.register_profile("ci", derandomize=True)  # CI checks a change; new examples are for people to find
    if os.environ.get("CI"):
        settings.load_profile("ci")


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
