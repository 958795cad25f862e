"""Model-specific patchers: one small file per family."""

from vlmattn.models import llava, qwen2_5_vl, qwen3_vl  # noqa: F401  (they register themselves)
from vlmattn.models.base import Anatomy, Family, find_family, register_family, supported_families
from vlmattn.models.turns import Turns

__all__ = ["Anatomy", "Family", "Turns", "find_family", "register_family", "supported_families"]
