"""What one generate() call knows: the request on its cache, the step in hand, and the scope that a method sees."""

from vlmattn.request.beside import Stream
from vlmattn.request.plan import Compare, Directions, Method, Plan, RoleFinder, Watch, Weights
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
from vlmattn.request.scope import Preparation, Scope, Sight, Step, Steps
from vlmattn.request.slots import Ledger, Slots

__all__ = [
    "ANSWER",
    "IMAGE",
    "MARKER",
    "SYSTEM",
    "TEXT",
    "USER",
    "VIDEO",
    "Compare",
    "Directions",
    "Ledger",
    "Method",
    "Plan",
    "Preparation",
    "Request",
    "RoleFinder",
    "Scope",
    "Sight",
    "Slots",
    "Step",
    "Steps",
    "Stream",
    "Watch",
    "Weights",
    "number_images",
]
