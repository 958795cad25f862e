"""Contrastive and re-balancing decoding: branches and rules as data, one method, one file, one frozen dataclass."""

from vlmattn.decoding.agla import AGLA
from vlmattn.decoding.avisc import AvisC
from vlmattn.decoding.buckets import Buckets
from vlmattn.decoding.contrast import Branch, ContrastiveDecoding, Decoding, Gaze, Instead, TokenChoice
from vlmattn.decoding.deco import DeCo
from vlmattn.decoding.dola import DoLa
from vlmattn.decoding.guidance import PAIGuidance
from vlmattn.decoding.icd import ICD
from vlmattn.decoding.m3id import M3ID
from vlmattn.decoding.noise import Noise
from vlmattn.decoding.opera import OPERA
from vlmattn.decoding.rbd import RBD
from vlmattn.decoding.rules import Contrast, Growth, Mixture, Rule, plausible
from vlmattn.decoding.search import Search
from vlmattn.decoding.sla import SLA
from vlmattn.decoding.tokens import BlindTokens, TopAttended
from vlmattn.decoding.vcd import VCD
from vlmattn.options import option
from vlmattn.registry import register

__all__ = [
    "AGLA", "ICD", "M3ID", "OPERA", "RBD", "SLA", "VCD", "AvisC", "BlindTokens", "Branch", "Buckets", "Contrast",
    "ContrastiveDecoding", "DeCo", "Decoding", "DoLa", "Gaze", "Growth", "Instead", "Mixture", "Noise", "PAIGuidance",
    "Rule", "Search", "TokenChoice", "TopAttended", "option", "plausible", "register",
]  # fmt: skip
