"""What one generate() call knows: the request on its cache, the step in hand, and the scope that a method sees."""

from vlmattn.request.beside import SideStream
from vlmattn.request.context import (
    Eviction,
    HeadSplit,
    Image,
    ImageFeatures,
    KeptTokens,
    LayerContext,
    Parts,
    Prefill,
    PruningStage,
    Step,
    Steps,
)
from vlmattn.request.plan import Compare, Looker, Method, Plan, Policy, RoleFinder, Watch, Watcher, Weights
from vlmattn.request.request import (
    ANSWER,
    IMAGE,
    MARKER,
    SYSTEM,
    TEXT,
    USER,
    VIDEO,
    Request,
    number_images,
)
from vlmattn.request.slots import Ledger, Slots
from vlmattn.request.token_map import Kept, TokenMap, compacted

__all__ = [
    "ANSWER",
    "IMAGE",
    "MARKER",
    "SYSTEM",
    "TEXT",
    "USER",
    "VIDEO",
    "Compare",
    "Eviction",
    "HeadSplit",
    "Image",
    "ImageFeatures",
    "Kept",
    "KeptTokens",
    "LayerContext",
    "Ledger",
    "Looker",
    "Method",
    "Parts",
    "Plan",
    "Policy",
    "Prefill",
    "PruningStage",
    "Request",
    "RoleFinder",
    "SideStream",
    "Slots",
    "Step",
    "Steps",
    "TokenMap",
    "Watch",
    "Watcher",
    "Weights",
    "compacted",
    "number_images",
]
