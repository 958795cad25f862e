"""Attention kernels. They know tensors only: no models, no methods."""

from vlmattn.kernels.dispatch import BACKENDS, attend, weights
from vlmattn.kernels.edit import (
    NO_EDIT,
    AttentionEdit,
    BoostPlan,
    GainPart,
    GainPlan,
    HeadPart,
    LevelPlan,
    LogitPart,
    MaskPart,
    MassGate,
    Rows,
    scale_heads,
)
from vlmattn.kernels.split import SplitStates
from vlmattn.kernels.visibility import Mask, Visibility

__all__ = [
    "BACKENDS",
    "NO_EDIT",
    "AttentionEdit",
    "BoostPlan",
    "GainPart",
    "GainPlan",
    "HeadPart",
    "LevelPlan",
    "LogitPart",
    "Mask",
    "MaskPart",
    "MassGate",
    "Rows",
    "SplitStates",
    "Visibility",
    "attend",
    "scale_heads",
    "weights",
]
