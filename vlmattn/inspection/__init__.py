"""Measuring a model, and answers that need measuring: its sinks, what its heads do, the order and the views of a prompt."""

from vlmattn.inspection.directions import fit_directions
from vlmattn.inspection.heads import Conflict, find_heads, score_heads
from vlmattn.inspection.importance import ablate_heads
from vlmattn.inspection.maps import image_attention
from vlmattn.inspection.multipath import MultiPath, multi_path
from vlmattn.inspection.needles import needle_prompts, retrieve_images
from vlmattn.inspection.sinks import find_sinks
from vlmattn.inspection.sorting import Sorted, sort_context
from vlmattn.inspection.spans import Span

__all__ = [
    "Conflict",
    "MultiPath",
    "Sorted",
    "Span",
    "ablate_heads",
    "find_heads",
    "find_sinks",
    "fit_directions",
    "image_attention",
    "multi_path",
    "needle_prompts",
    "retrieve_images",
    "score_heads",
    "sort_context",
]
