"""What one generate() call knows: the request on its cache, the step in hand, and the scope that a method sees."""

from vlmattn.request.beside import Stream
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
from vlmattn.request.scope import (
    Choice,
    Eviction,
    HeadSplit,
    Image,
    Parts,
    Preparation,
    Scope,
    Sight,
    Stage,
    Step,
    Steps,
)
from vlmattn.request.slots import Ledger, Slots
from vlmattn.request.tokens import Kept, TokenMap, closed_up

__all__ = [
    "ANSWER",
    "IMAGE",
    "MARKER",
    "SYSTEM",
    "TEXT",
    "USER",
    "VIDEO",
    "Choice",
    "Compare",
    "Eviction",
    "HeadSplit",
    "Image",
    "Kept",
    "Ledger",
    "Looker",
    "Method",
    "Parts",
    "Plan",
    "Policy",
    "Preparation",
    "Request",
    "RoleFinder",
    "Scope",
    "Sight",
    "Slots",
    "Stage",
    "Step",
    "Steps",
    "Stream",
    "TokenMap",
    "Watch",
    "Watcher",
    "Weights",
    "closed_up",
    "number_images",
]
