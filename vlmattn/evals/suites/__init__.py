"""Evaluation suites."""

from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.captions import Captions
from vlmattn.evals.suites.chair import Chair
from vlmattn.evals.suites.llava_bench import LlavaBench
from vlmattn.evals.suites.making import make_suite
from vlmattn.evals.suites.mmhal import MMHal
from vlmattn.evals.suites.pope import Pope
from vlmattn.evals.suites.pqa import PQA
from vlmattn.evals.suites.registry import all_suites, find_suite, suite
from vlmattn.evals.suites.which import Which
from vlmattn.evals.suites.world import World

__all__ = [
    "PQA", "Captions", "Chair", "LlavaBench", "MMHal", "Pope", "Sample", "Suite", "Which", "World", "all_suites",
    "find_suite", "make_suite", "suite",
]  # fmt: skip
