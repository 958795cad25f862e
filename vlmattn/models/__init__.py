"""Model-specific patchers: one small file per family."""

import pkgutil
from importlib import import_module

from vlmattn.models.base import Family, marker_ids_of
from vlmattn.models.generic import Generic
from vlmattn.models.image_layout import WHOLE, Box, Piece
from vlmattn.models.inputs import OF_ALL, OF_IMAGES, OF_PIXELS, OF_TOKENS, about_images
from vlmattn.models.reasons import KINDS
from vlmattn.models.registry import find_family, register_family, registered, supported_families
from vlmattn.models.turns import Turns

for _family in pkgutil.iter_modules(__path__):  # families register themselves
    import_module(f"{__name__}.{_family.name}")

__all__ = [
    "KINDS", "OF_ALL", "OF_IMAGES", "OF_PIXELS", "OF_TOKENS", "WHOLE", "Box", "Family", "Generic", "Piece", "Turns",
    "about_images", "find_family", "marker_ids_of", "register_family", "registered", "supported_families",
]  # fmt: skip
