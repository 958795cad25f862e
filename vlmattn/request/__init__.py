"""What one generate() call knows: the request on its cache, the step in hand, and what a method sees of a layer."""

from vlmattn.request.callbacks import Compare, Watch, Weights
from vlmattn.request.forward import BARE, Forward, Part
from vlmattn.request.layer_context import ImageContext, LayerContext
from vlmattn.request.methods import Looker, Method, Policy, Watcher
from vlmattn.request.numbering import IMAGE, TEXT, VIDEO, number_frames, number_images, video_runs
from vlmattn.request.plan import NO_PLAN, Plan
from vlmattn.request.prefill import Prefill, SideStream
from vlmattn.request.pruning import Eviction, HeadSplit, KeptTokens, PruningStage
from vlmattn.request.request import ANSWER, MARKER, SYSTEM, USER, Request, RoleFinder
from vlmattn.request.slots import Ledger, Slots
from vlmattn.request.step import Step
from vlmattn.request.store import Store
from vlmattn.request.token_map import Kept, TokenMap, compacted
from vlmattn.request.vision import Image, ImageFeatures

__all__ = [
    "ANSWER",
    "BARE",
    "IMAGE",
    "MARKER",
    "NO_PLAN",
    "SYSTEM",
    "TEXT",
    "USER",
    "VIDEO",
    "Compare",
    "Eviction",
    "Forward",
    "HeadSplit",
    "Image",
    "ImageContext",
    "ImageFeatures",
    "Kept",
    "KeptTokens",
    "LayerContext",
    "Ledger",
    "Looker",
    "Method",
    "Part",
    "Plan",
    "Policy",
    "Prefill",
    "PruningStage",
    "Request",
    "RoleFinder",
    "SideStream",
    "Slots",
    "Step",
    "Store",
    "TokenMap",
    "Watch",
    "Watcher",
    "Weights",
    "compacted",
    "number_frames",
    "number_images",
    "video_runs",
]
