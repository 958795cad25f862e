"""The tests themselves: none depends on how fast a machine is, and those that need time run last."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent


def calls():
    """Every call in the tests: file and line, the name of what is called, and its keywords."""
    for path in sorted([*TESTS.rglob("*.py"), *(ROOT / "tools" / "tests").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                yield f"{path.relative_to(ROOT)}:{node.lineno}", name, {word.arg: word.value for word in node.keywords}


def test_no_property_test_has_a_deadline():
    hypothesis = pytest.importorskip("hypothesis")
    assert hypothesis.settings().deadline is None, "the profile of tests/conftest.py is in force"
    found = list(calls())
    assert sum(name == "given" for _, name, _ in found) > 40
    limited = [
        at
        for at, name, words in found
        if "deadline" in words and not (isinstance(words["deadline"], ast.Constant) and words["deadline"].value is None)
    ]
    assert limited == []


def test_every_collected_property_test_is_of_the_profile(request):
    """What hypothesis will really do, however a test came by its settings."""
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.given(hypothesis.strategies.none())
    def example(nothing):
        pass

    functions = [getattr(item, "function", None) for item in request.session.items]
    for function in [example, *(f for f in functions if getattr(f, "is_hypothesis_test", False))]:
        settings = function._hypothesis_internal_use_settings
        assert settings.deadline is None, function.__qualname__
        assert hypothesis.HealthCheck.too_slow in settings.suppress_health_check, function.__qualname__


def test_slow_tests_run_last(request):
    slow = [item.get_closest_marker("slow") is not None for item in request.session.items]
    assert slow == sorted(slow)
