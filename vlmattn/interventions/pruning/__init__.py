"""Methods that drop image tokens: one method, one file, one frozen dataclass."""

from vlmattn.interventions.pruning.avl import AVL
from vlmattn.interventions.pruning.base import Pruning, ScorerPruning
from vlmattn.interventions.pruning.budget import AttentionBudget, BudgetPolicy
from vlmattn.interventions.pruning.duo import DuoAttention
from vlmattn.interventions.pruning.fastv import FastV
from vlmattn.interventions.pruning.h2o import H2O
from vlmattn.interventions.pruning.kv_random import KVRandom
from vlmattn.interventions.pruning.longheads import LongHeads
from vlmattn.interventions.pruning.lookm import LookM
from vlmattn.interventions.pruning.policy import KVPolicy, ScorerPolicy
from vlmattn.interventions.pruning.pyramiddrop import PyramidDrop
from vlmattn.interventions.pruning.pyramidkv import PyramidKV
from vlmattn.interventions.pruning.razor import RazorAttention
from vlmattn.interventions.pruning.recycled import RecycledAttention
from vlmattn.interventions.pruning.rounds import Rounds
from vlmattn.interventions.pruning.snapkv import SnapKV
from vlmattn.interventions.pruning.sparsevlm import SparseVLM
from vlmattn.interventions.pruning.streaming import StreamingLLM
from vlmattn.interventions.pruning.tova import TOVA
from vlmattn.interventions.pruning.visionzip import VisionZip
from vlmattn.interventions.pruning.vlcache import VLCache

__all__ = [
    "AVL",
    "H2O",
    "TOVA",
    "AttentionBudget",
    "BudgetPolicy",
    "DuoAttention",
    "FastV",
    "KVPolicy",
    "KVRandom",
    "LongHeads",
    "LookM",
    "Pruning",
    "PyramidDrop",
    "PyramidKV",
    "RazorAttention",
    "RecycledAttention",
    "Rounds",
    "ScorerPolicy",
    "ScorerPruning",
    "SnapKV",
    "SparseVLM",
    "StreamingLLM",
    "VLCache",
    "VisionZip",
]
