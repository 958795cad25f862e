"""Evaluation suites."""

from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.chair import Chair
from vlmattn.evals.suites.pope import Pope
from vlmattn.evals.suites.pqa import PQA
from vlmattn.evals.suites.which import Which
from vlmattn.evals.suites.world import World

__all__ = ["PQA", "Chair", "Pope", "Sample", "Suite", "Which", "World"]
