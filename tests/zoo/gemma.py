"""Families of Gemma 4, Mistral 4 and hybrid language models."""

from __future__ import annotations

from zoo.parts import Tiny

MODELS: dict[str, Tiny] = {}
