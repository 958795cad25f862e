"""AMBER (arXiv 2311.07397) on its published files: captions against annotated words, and yes/no questions.

Ours without spaCy and NLTK ("lite"): a word of a caption counts if its singular is in the vocabulary of the association
file, whatever its part of speech; it is safe by exact or associated match only, where the released code also takes
words whose vectors are alike. Both raise CHAIR and Hal above published figures: compare runs of this suite with each
other. Words are runs of letters, where the released tokenizer keeps hyphens ("air-conditioning"). All else is the
released rule, capitals included: "TV" is in the vocabulary, "Trees" is not. Yes/no questions: the first "yes" or "no"
among the words, where the released code takes "Yes" and "No" alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmattn.errors import InputError, quoted
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFolder, Item, first_of_each, read_items
from vlmattn.evals.suites.registry import suite
from vlmattn.evals.suites.yesno import ACCURACY, YES_RATIO, YesNo
from vlmattn.evals.words import singular
from vlmattn.texts import read_json, read_text

_SPLITS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}


@dataclass(frozen=True)
class Words:
    """What a caption may and may not name."""

    truth: tuple[str, ...]
    traps: tuple[str, ...]


@suite(
    "amber",
    "captions: words that are not in the image",
    "AMBER's data folder (annotations.json, relation.json, safe_words.txt, query_generative.json, here or in query)",
    "arXiv 2311.07397",
)
class AmberCaptions(Suite):
    """The generative half: what captions name that is not there, and how much of what is there.

    Args:
        near: the vocabulary: each word and those that stand for it.
        skipped: words that count for nothing.
    """

    title = "AMBER, captions: words that are not in the image (lite: no word vectors)"
    fields = ("words", "unsafe", "truth", "covered", "captions", "unsafe_captions", "traps", "fallen_for")
    metrics = (
        Metric("chair", {"unsafe": 1}, {"words": 1}, "named things that are not in the image", better="lower"),
        Metric("cover", {"covered": 1}, {"truth": 1}, "annotated things that the caption names"),
        Metric("hal", {"unsafe_captions": 1}, {"captions": 1}, "captions with at least one such thing", better="lower"),
        Metric(
            "cog",
            {"fallen_for": 1},
            {"traps": 1},
            "things one would expect there, named although absent",
            better="lower",
        ),
    )

    def __init__(
        self,
        samples: Iterable[Sample],
        settings: Mapping[str, Any],
        near: Mapping[str, Sequence[str]],
        skipped: Iterable[str],
        max_new_tokens: int,
    ) -> None:
        super().__init__(samples, settings, max_new_tokens)
        self._near, self._skipped = near, set(skipped)
        self._vocabulary = {*near, *(word for words in near.values() for word in words)}

    @classmethod
    def on_files(
        cls, data: Path, images: Path, limit: int | None = None, max_new_tokens: int = 512, allow_outside: bool = False
    ) -> AmberCaptions:
        """The published files.

        Args:
            data: the folder ``data`` of the release.

        Raises:
            InputError: a file that is not there, or not in the published form.
        """
        near, skipped = _associations(data / "relation.json"), read_text(data / "safe_words.txt").split()
        known, pictures = _annotations(data), ImageFolder(images, allow_outside)
        samples = []
        for query in _queries(data, "query_generative.json")[:limit]:
            entry = known.get(query.key("id"))
            if entry is None or entry.text("type") != "generative":
                raise InputError(
                    f"{query.where}: query {query.key('id')} has no generative annotation in"
                    f" {data.name}/annotations.json"
                )
            truth = Words(_known(entry, "truth", near), _known(entry, "hallu", near))
            samples.append(_sample(query, pictures, "captions", truth))
        settings = {"folder": data.name, "limit": limit, "max_new_tokens": max_new_tokens}
        return cls(samples, settings, near, skipped, max_new_tokens)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        named = [word for word in map(singular, re.findall(r"[^\W\d_]+", answer)) if word in self._vocabulary]
        safe, risky = self._stand_for(sample.truth.truth), self._stand_for(sample.truth.traps)
        asked = [word for word in named if word not in self._skipped]
        unsafe = [word for word in asked if word not in safe]
        covered, fallen = (
            {safe[word] for word in asked if word in safe},
            {risky[word] for word in unsafe if word in risky},
        )
        values = (
            len(named), len(unsafe), len(sample.truth.truth), len(covered), 1, bool(unsafe), len(sample.truth.traps),
            len(fallen),
        )  # fmt: skip
        return {name: float(value) for name, value in zip(self.fields, values, strict=True)}

    def _stand_for(self, words: Sequence[str]) -> dict[str, int]:
        """Which annotated word a word stands for: associated words first, then themselves; the first one wins."""
        found: dict[str, int] = {}
        for index, word in enumerate(words):
            for near in self._near[word]:
                found.setdefault(near, index)
        for index, word in enumerate(words):
            found.setdefault(word, index)
        return found

    def right(self, record: Mapping[str, float]) -> bool:
        return record["unsafe_captions"] == 0

    def expected(self, sample: Sample) -> str:
        return ", ".join(sample.truth.truth)


@suite(
    "amber_questions",
    "yes/no questions about existence, attributes, relations",
    "AMBER's data folder (annotations.json, query_all.json, here or in query)",
    "arXiv 2311.07397",
)
class AmberQuestions(YesNo):
    """The discriminative half; *no* is the positive class, as published."""

    title = "AMBER, questions: existence, attributes, relations"
    fields = ("right", "wrong", "yes", "tp", "said_no", "is_no")
    metrics = (
        ACCURACY,
        Metric("precision", {"tp": 1}, {"said_no": 1}, "share of no answers that are right", label="prec"),
        Metric("recall", {"tp": 1}, {"is_no": 1}, "share of absent things that are denied"),
        Metric("f1", {"tp": 2}, {"said_no": 1, "is_no": 1}, "harmonic mean of precision and recall"),
        YES_RATIO,
    )

    @classmethod
    def on_files(
        cls, data: Path, images: Path, limit: int | None = None, allow_outside: bool = False
    ) -> AmberQuestions:
        """The published files; arguments and errors as of ``AmberCaptions.on_files``, the limit is of each split."""
        known, pictures = _annotations(data), ImageFolder(images, allow_outside)
        asked = []
        for query in _queries(data, "query_all.json"):
            entry = known.get(query.key("id"))
            if entry is None:
                raise InputError(
                    f"{query.where}: query {query.key('id')} has no annotation in {data.name}/annotations.json"
                )
            if entry.text("type") != "generative":
                asked.append((_SPLITS[entry.text("type")], query, entry))
        chosen = first_of_each(asked, lambda one: one[0], limit)
        samples = [_sample(query, pictures, split, entry.yes("truth")) for split, query, entry in chosen]
        return cls(samples, {"folder": data.name, "limit": limit})

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        no, is_no = self.read(answer) is False, not sample.truth
        more = {"tp": float(no and is_no), "said_no": float(no), "is_no": float(is_no)}
        return {**super().score(sample, answer), **more}


def _sample(query: Item, pictures: ImageFolder, split: str, truth: Any) -> Sample:
    return Sample(
        id=query.key("id"),
        image_id=query.text("image"),
        condition="amber",
        splits=(split,),
        prompt=query.text("query"),
        images=pictures.files(query.where, [query.text("image")]),
        truth=truth,
    )


def _known(entry: Item, part: str, near: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    words = entry.texts(part)
    for word in words:
        if word not in near:
            raise InputError(
                f"{entry.where}: {quoted(word)} of {part} is not in relation.json; take both from one release"
            )
    return tuple(words)


def _queries(folder: Path, name: str) -> list[Item]:
    """Queries beside the annotations, or in the folder ``query``, where the release has them."""
    released = folder / "query" / name
    return read_items(released if released.exists() else folder / name, ("id", "image", "query"), "an AMBER query")


def _annotations(folder: Path) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for item in read_items(folder / "annotations.json", ("id", "type", "truth"), "an AMBER annotation"):
        key, kind = item.key("id"), item.text("type")
        if kind != "generative" and kind not in _SPLITS:
            raise InputError(f"{item.where}: unknown type {quoted(kind)}")
        if key in found:
            raise InputError(f"{item.where}: id {key} is there twice")
        if kind != "generative":
            item.yes("truth")
        elif "hallu" not in item.values:
            raise InputError(f"{item.where}: a generative annotation needs hallu")
        found[key] = item
    return found


def _associations(path: Path) -> dict[str, list[str]]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: AMBER's relation.json is an object of words and their associated words")
    known = Item(str(path), data)
    return {word: known.texts(word) for word in data}
