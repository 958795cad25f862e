"""Training-free edits of attention: one method, one file, one frozen dataclass."""

from vlmattn.interventions.base import Intervention, LogitEdit
from vlmattn.interventions.bidirectional import Bidirectional
from vlmattn.interventions.calibration import Calibration
from vlmattn.interventions.directions import Directions, load_directions
from vlmattn.interventions.focus import FocusDirections
from vlmattn.interventions.gift import GIFT
from vlmattn.interventions.guided import HeadsGuided
from vlmattn.interventions.heads import Heads
from vlmattn.interventions.isolation import Isolation
from vlmattn.interventions.knockout import Knockout
from vlmattn.interventions.mma import MMA
from vlmattn.interventions.nullu import Nullu
from vlmattn.interventions.pai import PAI
from vlmattn.interventions.paint import PAINT
from vlmattn.interventions.profiles import HeadProfile, SinkProfile
from vlmattn.interventions.pruning import (
    AVL,
    DART,
    H2O,
    TOVA,
    CDPruner,
    DivPrune,
    DuoAttention,
    EarlyPruning,
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
    TowerPruning,
    VisionZip,
    VisPruner,
    VLCache,
)
from vlmattn.interventions.sink_knockout import SinkKnockout
from vlmattn.interventions.sofa import SoFA
from vlmattn.interventions.steer import Steer
from vlmattn.interventions.steering import Steering
from vlmattn.interventions.vaf import VAF
from vlmattn.interventions.var import VAR
from vlmattn.interventions.vhr import VHR
from vlmattn.interventions.vista import VISTA
from vlmattn.interventions.vti import VTI

__all__ = [
    "AVL",
    "DART",
    "GIFT",
    "H2O",
    "MMA",
    "PAI",
    "PAINT",
    "TOVA",
    "VAF",
    "VAR",
    "VHR",
    "VISTA",
    "VTI",
    "Bidirectional",
    "CDPruner",
    "Calibration",
    "Directions",
    "DivPrune",
    "DuoAttention",
    "EarlyPruning",
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
    "Nullu",
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
    "Steer",
    "Steering",
    "StreamingLLM",
    "TowerPruning",
    "VLCache",
    "VisPruner",
    "VisionZip",
    "load_directions",
]
