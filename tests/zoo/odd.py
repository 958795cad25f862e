"""Families that read images in other ways: discrete codes, cross-attention, queries."""

from __future__ import annotations

from zoo.parts import Tiny

MODELS: dict[str, Tiny] = {}
