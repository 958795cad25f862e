"""Suites on published data, by name, with the options that the command line gives to all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmattn.evals.suites import Suite, make_suite


def published(
    name: str,
    path: Path,
    images: Path | None,
    limit: int | None,
    length: int,
    allow_outside: bool = False,
    **options: Any,
) -> Suite:
    usual = {"images": images, "limit": limit, "max_new_tokens": length, "allow_outside": allow_outside or None}
    return make_suite(name, data=path, usual=usual, **options)
