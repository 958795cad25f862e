"""Judges of free text: how good an answer is, and whether it says what is not so.

The papers ask GPT-4. Here a judge is any function of your own, named as ``package.module:function``; the rule that
stands in for it is offline and experimental.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

from vlmattn.errors import InputError, quoted
from vlmattn.evals.words import ENGLISH, ObjectWords, singular

BEST = 6.0
#: Ratings below this are of answers with a hallucination (MMHal-Bench, arXiv 2309.14525).
CLEAN = 3.0


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer.

    Attributes:
        rating: 0..6 on MMHal-Bench's scale; 3 and more is free of hallucination.
        hallucinated: whether the answer says what is not so.

    Raises:
        InputError: a rating outside 0..6.
    """

    rating: float
    hallucinated: bool

    def __post_init__(self) -> None:
        if not (isinstance(self.rating, Real) and 0 <= self.rating <= BEST):
            raise InputError(f"a judge's rating must be a number within 0..{BEST:.0f}, got {quoted(self.rating)}")


class Judge(Protocol):
    """Rates an answer.

    Args:
        question: what was asked.
        reference: a right answer.
        known: what is known to be in the image: names of things, or sentences about it.
        answer: the answer to rate.
    """

    def __call__(self, question: str, reference: str, known: Sequence[str], answer: str) -> Verdict: ...


_FILLERS = frozenset(ENGLISH["fillers"].split())
_NEGATIONS = frozenset({"no", "not", "none", "nothing", "never", "without", "cannot"})


class RuleJudge:
    """An offline stand-in for a judge (experimental): it compares words, not meanings.

    1. The content words of a text are its words in lower case and singular, without fillers (articles, pronouns,
       auxiliaries, prepositions, question words); every negation is the word "no".
    2. recall = share of the reference's content words that the answer has. Words of the question do not count, unless
       the reference has no others.
    3. Things are COCO's 80 classes. A thing that the answer names is unknown if the question, the reference and what is
       known of the image all do not name it.
    4. rating = 6 x recall, at most 2 if the answer names an unknown thing. A rating below 3 is a hallucination.

    So a paraphrase rates too low, "I cannot tell" rates like a wrong answer (like a right one where the reference is a
    denial), and a wrong thing outside COCO's classes goes unnoticed if the rest is right. Compare its ratings with each
    other only, never with published ones.
    """

    def __init__(self) -> None:
        self._things = ObjectWords.coco()

    def __call__(self, question: str, reference: str, known: Sequence[str], answer: str) -> Verdict:
        wanted = content_words(reference)
        wanted = (wanted - content_words(question)) or wanted
        recall = len(wanted & content_words(answer)) / len(wanted) if wanted else 0.0
        seen = {thing for text in (question, reference, *known) for thing in self._things.mentions(text)}
        unknown = set(self._things.mentions(answer)) - seen
        rating = min(BEST * recall, 2.0 if unknown else BEST)
        return Verdict(rating, rating < CLEAN)


def content_words(text: str) -> set[str]:
    """The words of a text that carry meaning, as ``RuleJudge`` compares them."""
    found = set(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))) - _FILLERS
    return {"no" if word in _NEGATIONS or word.endswith("n't") else singular(word.removesuffix("'s")) for word in found}


class Ratings:
    """Verdicts of a judge, each asked for once: answers are scored again for every table.

    Args:
        judge: as ``load_judge`` takes it.
    """

    def __init__(self, judge: Judge | str = "rule") -> None:
        self._judge = load_judge(judge)
        self._known: dict[tuple[str, str], Verdict] = {}

    @property
    def name(self) -> str:
        """The judge's name, for the settings of a run."""
        if isinstance(self._judge, RuleJudge):
            return "rule (experimental)"
        of = self._judge if hasattr(self._judge, "__qualname__") else type(self._judge)
        return f"{of.__module__}:{of.__qualname__}"

    def of(self, key: str, question: str, reference: str, known: Sequence[str], answer: str) -> Verdict:
        """The verdict on an answer to the sample ``key``.

        Raises:
            InputError: the judge returned something else.
        """
        if (key, answer) not in self._known:
            verdict = self._judge(question, reference, known, answer)
            if not isinstance(verdict, Verdict):
                raise InputError(
                    f"the judge {self.name} returned {quoted(verdict)}; it must return"
                    " vlmattn.evals.judges.Verdict(...)"
                )
            self._known[key, answer] = verdict
        return self._known[key, answer]


def load_judge(name: Judge | str) -> Judge:
    """The judge called ``rule``, or a function of yours, itself or by ``package.module:function``.

    Raises:
        InputError: no such module or function.
    """
    if not isinstance(name, str):
        return name
    if name == "rule":
        return RuleJudge()
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise InputError(f"unknown judge '{name}'; it is rule, or a function of yours as package.module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, TypeError, ValueError) as error:  # of names like ".x"
        raise InputError(f"judge {name}: cannot import {module} ({error}); run where Python finds it") from None
    except AttributeError:
        raise InputError(f"judge {name}: {module} has no '{function}'") from None
    if not callable(found):
        raise InputError(f"judge {name}: {function} is no function")
    judge: Judge = found
    return judge
