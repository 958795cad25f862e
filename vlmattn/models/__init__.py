"""Model-specific patchers: one small file per family."""

from vlmattn.models import llava, qwen2_5_vl  # noqa: F401  (they register themselves)
from vlmattn.models.base import Anatomy, Family, find_family, register_family, supported_families

__all__ = ["Anatomy", "Family", "find_family", "register_family", "supported_families"]
