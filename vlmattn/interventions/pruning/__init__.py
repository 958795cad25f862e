"""Methods that drop image tokens: one method, one file, one frozen dataclass."""

from vlmattn.interventions.pruning.base import Pruning
from vlmattn.interventions.pruning.fastv import FastV
from vlmattn.interventions.pruning.pyramiddrop import PyramidDrop
from vlmattn.interventions.pruning.sparsevlm import SparseVLM

__all__ = ["FastV", "Pruning", "PyramidDrop", "SparseVLM"]
