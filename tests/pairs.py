"""Fewer cases than a full product: every value of each axis occurs, and which ones meet changes from test to test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def rotated(first: str, few: Sequence[Any], second: str, many: Iterable[Any], shift: int = 0) -> pytest.MarkDecorator:
    """Parametrize a test by all of ``many``, each with one of ``few`` in turn; ``shift`` is where these begin.

    For tests beside one that has the full product: a method's own arithmetic is that one's to check, on every family.
    """
    cases = [(few[(number + shift) % len(few)], value) for number, value in enumerate(many)]
    return pytest.mark.parametrize((first, second), cases, ids=["-".join(map(str, case)) for case in cases])
