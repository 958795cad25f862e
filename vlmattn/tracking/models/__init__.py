"""Adapters: one small file per kind of multi-view network."""

from vlmattn.tracking.models import pi3, rooms, vggt  # noqa: F401  (they register themselves)
from vlmattn.tracking.models.base import Adapter, Views, find_adapter, register_adapter

__all__ = ["Adapter", "Views", "find_adapter", "register_adapter"]
