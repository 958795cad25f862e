"""Training-free edits of attention: one method, one file, one frozen dataclass."""

from vlmattn.interventions.base import Intervention, LogitEdit
from vlmattn.interventions.bidirectional import Bidirectional
from vlmattn.interventions.calibration import Calibration
from vlmattn.interventions.focus import FocusDirections
from vlmattn.interventions.gift import GIFT
from vlmattn.interventions.guided import HeadsGuided
from vlmattn.interventions.heads import Heads
from vlmattn.interventions.isolation import Isolation
from vlmattn.interventions.knockout import Knockout
from vlmattn.interventions.mma import MMA
from vlmattn.interventions.pai import PAI
from vlmattn.interventions.paint import PAINT
from vlmattn.interventions.profiles import HeadProfile, SinkProfile
from vlmattn.interventions.pruning import (
    AVL,
    H2O,
    TOVA,
    DuoAttention,
    FastV,
    KVPolicy,
    KVRandom,
    LongHeads,
    LookM,
    Pruning,
    PyramidDrop,
    PyramidKV,
    RazorAttention,
    RecycledAttention,
    Rounds,
    ScorerPolicy,
    ScorerPruning,
    SnapKV,
    SparseVLM,
    StreamingLLM,
    VisionZip,
    VLCache,
)
from vlmattn.interventions.sink_knockout import SinkKnockout
from vlmattn.interventions.sofa import SoFA
from vlmattn.interventions.vaf import VAF
from vlmattn.interventions.var import VAR
from vlmattn.interventions.vhr import VHR

__all__ = [
    "AVL",
    "GIFT",
    "H2O",
    "MMA",
    "PAI",
    "PAINT",
    "TOVA",
    "VAF",
    "VAR",
    "VHR",
    "Bidirectional",
    "Calibration",
    "DuoAttention",
    "FastV",
    "FocusDirections",
    "HeadProfile",
    "Heads",
    "HeadsGuided",
    "Intervention",
    "Isolation",
    "KVPolicy",
    "KVRandom",
    "Knockout",
    "LogitEdit",
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
    "SinkKnockout",
    "SinkProfile",
    "SnapKV",
    "SoFA",
    "SparseVLM",
    "StreamingLLM",
    "VLCache",
    "VisionZip",
]
