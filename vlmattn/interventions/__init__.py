"""Training-free edits of attention: one method, one file, one frozen dataclass."""

from vlmattn.interventions.base import (
    Intervention,
    MethodInfo,
    PresetInfo,
    all_presets,
    find_method,
    make_method,
    register,
)
from vlmattn.interventions.pai import PAI
from vlmattn.interventions.var import VAR
from vlmattn.interventions.vhr import VHR

__all__ = [
    "PAI",
    "VAR",
    "VHR",
    "Intervention",
    "MethodInfo",
    "PresetInfo",
    "all_presets",
    "find_method",
    "make_method",
    "register",
]
