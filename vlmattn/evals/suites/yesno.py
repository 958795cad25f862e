"""Questions that are answered by yes or no: how answers are read, and what is counted."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite

_ALL = {"right": 1.0, "wrong": 1.0}
ACCURACY = Metric("accuracy", {"right": 1}, _ALL, "share of right answers")
YES_RATIO = Metric("yes_ratio", {"yes": 1}, _ALL, "share of yes among the answers", better="", label="yes")


def first_yes_or_no(answer: str) -> bool | None:
    """Whether the first "yes" or "no" among the words of an answer is yes; None where there is neither.

    "no-one" is another word, and "yes or no" says neither.
    """
    text = re.sub(r"\byes\s*(?:or|/)\s*no\b", "", answer.lower())
    found = re.search(r"(?<![\w'’-])(yes|no)(?![\w'’]|-\w)", text)
    return None if found is None else found.group() == "yes"


class YesNo(Suite):
    """A suite whose samples have the truth True (yes) or False (no). An answer that says neither is wrong."""

    fields: tuple[str, ...] = ("right", "wrong", "yes")
    metrics: tuple[Metric, ...] = (ACCURACY, YES_RATIO)
    max_new_tokens = 16

    def read(self, answer: str) -> bool | None:
        """The rule by which an answer is read."""
        return first_yes_or_no(answer)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        said = self.read(answer)
        return {
            "right": float(said is sample.truth),
            "wrong": float(said is not sample.truth),
            "yes": float(said is True),
        }

    def expected(self, sample: Sample) -> str:
        return "yes" if sample.truth else "no"


def all_right(records: Mapping[str, dict[str, float]], groups: Mapping[str, str], field: str) -> None:
    """Add ``field`` (is the whole group right?) and ``<field>_asked`` to the first record of each group; "" is none.

    ``groups`` by id of the sample; samples without a record have no part in their group.
    """
    whole: dict[str, float] = {}
    for key, record in records.items():
        whole[groups[key]] = min(whole.get(groups[key], 1.0), record["right"])
    seen = {""}
    for key, record in records.items():
        group = groups[key]
        first = group not in seen
        seen.add(group)
        record[field], record[f"{field}_asked"] = (whole[group] if first else 0.0), float(first)
