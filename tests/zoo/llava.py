"""Families of later LLaVA-like and document models."""

from __future__ import annotations

from zoo.parts import Tiny

MODELS: dict[str, Tiny] = {}
