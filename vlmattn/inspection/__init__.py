"""Measuring a model, and answers that need measuring: its sinks, what its heads do, the order and the views of a prompt."""

from vlmattn.inspection.directions import Span, fit_directions
from vlmattn.inspection.heads import Conflict, find_heads, score_heads
from vlmattn.inspection.maps import image_attention
from vlmattn.inspection.multipath import MultiPath, multi_path
from vlmattn.inspection.sinks import find_sinks
from vlmattn.inspection.sorting import Sorted, sort_context

__all__ = [
    "Conflict",
    "MultiPath",
    "Sorted",
    "Span",
    "find_heads",
    "find_sinks",
    "fit_directions",
    "image_attention",
    "multi_path",
    "score_heads",
    "sort_context",
]
