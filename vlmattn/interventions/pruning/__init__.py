"""Methods that drop image tokens: one method, one file, one frozen dataclass."""

from vlmattn.interventions.pruning.avl import AVL
from vlmattn.interventions.pruning.base import Pruning, ScorerPruning
from vlmattn.interventions.pruning.budget import AttentionBudget, BudgetPolicy
from vlmattn.interventions.pruning.cdpruner import CDPruner
from vlmattn.interventions.pruning.controls import FirstTokens, GridTokens, LastTokens, PooledTokens, RandomTokens
from vlmattn.interventions.pruning.dart import DART
from vlmattn.interventions.pruning.divprune import DivPrune
from vlmattn.interventions.pruning.duo import DuoAttention
from vlmattn.interventions.pruning.early import EarlyPruning, TowerPruning
from vlmattn.interventions.pruning.evs import EVS
from vlmattn.interventions.pruning.fastv import FastV
from vlmattn.interventions.pruning.h2o import H2O
from vlmattn.interventions.pruning.hired import HiRED
from vlmattn.interventions.pruning.kv_random import KVRandom
from vlmattn.interventions.pruning.longheads import LongHeads
from vlmattn.interventions.pruning.lookm import LookM
from vlmattn.interventions.pruning.policy import KVPolicy, ScorerPolicy
from vlmattn.interventions.pruning.prumerge import PruMerge
from vlmattn.interventions.pruning.pyramiddrop import PyramidDrop
from vlmattn.interventions.pruning.pyramidkv import PyramidKV
from vlmattn.interventions.pruning.razor import RazorAttention
from vlmattn.interventions.pruning.recycled import RecycledAttention
from vlmattn.interventions.pruning.rounds import Rounds
from vlmattn.interventions.pruning.snapkv import SnapKV
from vlmattn.interventions.pruning.sparsevlm import SparseVLM
from vlmattn.interventions.pruning.streaming import StreamingLLM
from vlmattn.interventions.pruning.tova import TOVA
from vlmattn.interventions.pruning.vidcom2 import VidCom2
from vlmattn.interventions.pruning.video import VideoPruning
from vlmattn.interventions.pruning.visionzip import VisionZip
from vlmattn.interventions.pruning.vispruner import VisPruner
from vlmattn.interventions.pruning.vlcache import VLCache
from vlmattn.interventions.pruning.vscan import VScan

__all__ = [
    "AVL",
    "DART",
    "EVS",
    "H2O",
    "TOVA",
    "AttentionBudget",
    "BudgetPolicy",
    "CDPruner",
    "DivPrune",
    "DuoAttention",
    "EarlyPruning",
    "FastV",
    "FirstTokens",
    "GridTokens",
    "HiRED",
    "KVPolicy",
    "KVRandom",
    "LastTokens",
    "LongHeads",
    "LookM",
    "PooledTokens",
    "PruMerge",
    "Pruning",
    "PyramidDrop",
    "PyramidKV",
    "RandomTokens",
    "RazorAttention",
    "RecycledAttention",
    "Rounds",
    "ScorerPolicy",
    "ScorerPruning",
    "SnapKV",
    "SparseVLM",
    "StreamingLLM",
    "TowerPruning",
    "VLCache",
    "VScan",
    "VidCom2",
    "VideoPruning",
    "VisPruner",
    "VisionZip",
]
