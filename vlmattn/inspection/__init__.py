"""Measuring a language model: its sinks, what its heads do, and directions that steer them."""

from vlmattn.inspection.directions import Span, fit_directions
from vlmattn.inspection.heads import Conflict, find_heads, score_heads
from vlmattn.inspection.sinks import find_sinks

__all__ = ["Conflict", "Span", "find_heads", "find_sinks", "fit_directions", "score_heads"]
