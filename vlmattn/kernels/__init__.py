"""Attention kernels. They know tensors only: no models, no methods."""

from vlmattn.kernels.dispatch import BACKENDS, attend
from vlmattn.kernels.eager import weights
from vlmattn.kernels.edit import (
    NO_EDIT,
    AttentionEdit,
    GainPart,
    HeadPart,
    LogitPart,
    MaskPart,
    Rows,
    scale_heads,
)
from vlmattn.kernels.plans import BoostPlan, GainPlan, LevelPlan, MassGate
from vlmattn.kernels.problem import Problem
from vlmattn.kernels.residual import Add, Near, Project, ResidualPart, Scale, Turn, steered
from vlmattn.kernels.split import SplitStates
from vlmattn.kernels.visibility import Mask, Visibility, additive, hide, visible

__all__ = [
    "BACKENDS",
    "NO_EDIT",
    "Add",
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
    "Near",
    "Problem",
    "Project",
    "ResidualPart",
    "Rows",
    "Scale",
    "SplitStates",
    "Turn",
    "Visibility",
    "additive",
    "attend",
    "hide",
    "scale_heads",
    "steered",
    "visible",
    "weights",
]
