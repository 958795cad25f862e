"""Families of other models of 2026."""

from __future__ import annotations

from zoo.parts import Tiny

MODELS: dict[str, Tiny] = {}
