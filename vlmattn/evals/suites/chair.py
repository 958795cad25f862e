"""CHAIR: which objects of a caption are not in the image (arXiv 1809.02156), on generated scenes or COCO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmattn.embedded.scenes import CATEGORIES, SYNONYMS
from vlmattn.embedded.text import DESCRIBE
from vlmattn.evals.coco import load_coco_objects
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFolder
from vlmattn.evals.suites.questions import sample_of
from vlmattn.evals.suites.registry import suite
from vlmattn.evals.suites.world import World, settings_of
from vlmattn.evals.words import ObjectWords

COCO_PROMPT = "Please describe this image in detail."  # what the papers ask


@dataclass(frozen=True)
class _Truth:
    objects: frozenset[str]


@suite(
    "chair",
    "objects in captions that are not there",
    "a COCO instances file (instances_val2014.json)",
    "arXiv 1809.02156",
)
class Chair(Suite):
    """Captions against the objects of the image. Mentions count, not distinct objects, as in the reference."""

    title = "CHAIR: objects in captions that are not there"
    fields = ("captions", "wrong_captions", "mentions", "wrong_mentions", "objects", "found", "words", "repeating")
    metrics = (
        Metric(
            "chair_i",
            {"wrong_mentions": 1},
            {"mentions": 1},
            "mentioned objects that are not in the image",
            better="lower",
        ),
        Metric(
            "chair_s", {"wrong_captions": 1}, {"captions": 1}, "captions with at least one such object", better="lower"
        ),
        Metric("recall", {"found": 1}, {"objects": 1}, "objects of the image that the caption names (cover)"),
        Metric("length", {"words": 1}, {"captions": 1}, "words per caption", scale=1.0, better="", label="words"),
        Metric(
            "repeats",
            {"repeating": 1},
            {"captions": 1},
            "captions that name an object twice",
            better="lower",
            label="twice",
        ),
    )

    def __init__(
        self,
        samples: Iterable[Sample],
        words: ObjectWords,
        settings: Mapping[str, Any],
        max_new_tokens: int,
        drop_cut: bool = False,
    ) -> None:
        super().__init__(samples, settings, max_new_tokens)
        self._words, self._drop_cut = words, drop_cut

    @classmethod
    def on_scenes(cls, worlds: Sequence[World], max_new_tokens: int = 48) -> Chair:
        samples = [
            sample_of(
                world, index, str(index), ("captions",), DESCRIBE, _Truth(frozenset(world.scene(index).categories))
            )
            for world in worlds
            for index in range(world.count)
        ]
        words = ObjectWords({name: SYNONYMS.get(name, ()) for name in CATEGORIES})
        return cls(samples, words, settings_of(worlds), max_new_tokens)

    @classmethod
    def on_files(
        cls,
        data: Path,
        images: Path,
        captions: Path | None = None,
        synonyms: Path | None = None,
        limit: int = 500,
        seed: int = 0,
        max_new_tokens: int = 512,
        drop_cut: bool = False,
        allow_outside: bool = False,
    ) -> Chair:
        """COCO's instances file; ``limit`` images drawn with ``seed`` (the papers take 500 of val2014).

        Args:
            captions: ground-truth captions, whose objects count as present too; None leaves them out.
            synonyms: word list in the published format; None takes our own list.
            drop_cut: leave out what follows the last full stop: a sentence that was cut off by the length (as OPERA
                does).
        """
        words = ObjectWords.from_file(synonyms) if synonyms else ObjectWords.coco()
        known = load_coco_objects(data, captions, words)
        pictures = ImageFolder(images, allow_outside)
        order = np.random.default_rng(seed).permutation(sorted(known))[:limit]
        samples = []
        for key in order:
            entry = known[int(key)]
            samples.append(
                Sample(
                    id=str(entry.id),
                    image_id=str(entry.id),
                    condition="coco",
                    splits=("captions",),
                    prompt=COCO_PROMPT,
                    images=pictures.files(str(data), [entry.file_name]),
                    truth=_Truth(entry.objects),
                )
            )
        settings = {
            "instances": data.name,
            "captions": captions.name if captions else None,
            "synonyms": synonyms.name if synonyms else "vlmattn",
            "limit": limit,
            "seed": seed,
            "max_new_tokens": max_new_tokens,
            "drop_cut": drop_cut,
        }
        return cls(samples, words, settings, max_new_tokens, drop_cut)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        answer = whole_sentences(answer) if self._drop_cut else answer
        mentioned = self._words.mentions(answer)
        present: frozenset[str] = sample.truth.objects
        wrong = [name for name in mentioned if name not in present]
        values = (
            1, bool(wrong), len(mentioned), len(wrong), len(present), len(present & set(mentioned)),
            len(answer.split()), len(set(mentioned)) < len(mentioned),
        )  # fmt: skip
        return {name: float(value) for name, value in zip(self.fields, values, strict=True)}

    def right(self, record: Mapping[str, float]) -> bool:
        return record["wrong_captions"] == 0

    def expected(self, sample: Sample) -> str:
        return ", ".join(sorted(sample.truth.objects))


def whole_sentences(text: str) -> str:
    """A caption up to its last full stop, question or exclamation mark; one without any stays as it is."""
    end = max(text.rfind(mark) for mark in ".!?")
    return text[: end + 1] if end >= 0 else text
