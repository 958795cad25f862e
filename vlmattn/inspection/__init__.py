"""Measuring a model (its sinks, what its heads do), looking at one answer, and prompts that need measuring."""

from vlmattn.inspection.directions import fit_directions
from vlmattn.inspection.flow import attention_flow, rollout
from vlmattn.inspection.heads import Conflict, find_heads, score_heads
from vlmattn.inspection.importance import ablate_heads
from vlmattn.inspection.looking import look
from vlmattn.inspection.maps import image_attention
from vlmattn.inspection.measures import (
    distances,
    entropy,
    group_masses,
    head_distances,
    image_maps,
    influence,
    logit_difference,
    sink_levels,
    sink_scores,
    sink_tokens,
    split_heads,
)
from vlmattn.inspection.multipath import MultiPath, multi_path
from vlmattn.inspection.named import Named
from vlmattn.inspection.needles import needle_prompts, retrieve_images
from vlmattn.inspection.page import inspect_page
from vlmattn.inspection.prompt_spans import Span
from vlmattn.inspection.recipes_compared import Side, compare_answers
from vlmattn.inspection.repeats import score_repeats
from vlmattn.inspection.sinks import find_sinks
from vlmattn.inspection.sorting import Sorted, sort_context
from vlmattn.inspection.steering import Pair, fit_steering
from vlmattn.inspection.trace import GROUPS, Trace

__all__ = [
    "GROUPS",
    "Conflict",
    "MultiPath",
    "Named",
    "Pair",
    "Side",
    "Sorted",
    "Span",
    "Trace",
    "ablate_heads",
    "attention_flow",
    "compare_answers",
    "distances",
    "entropy",
    "find_heads",
    "find_sinks",
    "fit_directions",
    "fit_steering",
    "group_masses",
    "head_distances",
    "image_attention",
    "image_maps",
    "influence",
    "inspect_page",
    "logit_difference",
    "look",
    "multi_path",
    "needle_prompts",
    "retrieve_images",
    "rollout",
    "score_heads",
    "score_repeats",
    "sink_levels",
    "sink_scores",
    "sink_tokens",
    "sort_context",
    "split_heads",
]
