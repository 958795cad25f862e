"""Tracking a camera against the keys and values of a map, with multi-view networks."""

from vlmattn.tracking.bundled import load
from vlmattn.tracking.files import Trajectory, read_tum, write_ply, write_tum
from vlmattn.tracking.frames import Frames, fit
from vlmattn.tracking.gauge import Similarity, align
from vlmattn.tracking.keyframes import Angular, Azel, Interval, PoseChange, Released, Rule, Sight
from vlmattn.tracking.maps import Map
from vlmattn.tracking.models import Adapter, Views, find_adapter, register_adapter
from vlmattn.tracking.network import MultiViewNetwork, NetworkConfig
from vlmattn.tracking.tracker import Mapped, Track, Tracker

__all__ = [
    "Adapter",
    "Angular",
    "Azel",
    "Frames",
    "Interval",
    "Map",
    "Mapped",
    "MultiViewNetwork",
    "NetworkConfig",
    "PoseChange",
    "Released",
    "Rule",
    "Sight",
    "Similarity",
    "Track",
    "Tracker",
    "Trajectory",
    "Views",
    "align",
    "find_adapter",
    "fit",
    "load",
    "read_tum",
    "register_adapter",
    "write_ply",
    "write_tum",
]
