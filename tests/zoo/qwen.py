"""Families of later Qwen and GLM models and their kin."""

from __future__ import annotations

from zoo.parts import Tiny

MODELS: dict[str, Tiny] = {}
