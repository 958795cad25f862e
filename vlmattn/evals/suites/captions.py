"""Captions against people's: CIDEr (arXiv 1411.5726) and BLEU-4 on a COCO captions file.

Published figures cut captions into words by the Penn Treebank tokenizer, which needs Java. Here words are runs of
letters and digits in lower case, an apostrophe stays inside, all other punctuation is dropped. So "child's" is one word
and not two, and figures differ a little from published ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmattn.errors import InputError
from vlmattn.evals.coco import load_coco_captions
from vlmattn.evals.stats import Array, Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.files import ImageFolder
from vlmattn.evals.suites.registry import suite

PROMPT = "Provide a one-sentence caption for the provided image."
_ORDERS = (1, 2, 3, 4)
_GOOD = 1.0  # CIDEr of an answer that counts as right


def words(text: str) -> list[str]:
    """The words of a caption."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))


class CorpusBleu(Metric):
    """BLEU-4 = 100 x brevity x (product of the four n-gram precisions)^(1/4), all from sums over the captions.

    brevity = exp(min(0, 1 - reference words / words)); 0 without a match of every length. A function of sums like the
    other metrics, so the bootstrap resamples it.
    """

    def value(self, fields: Sequence[str], sums: Array) -> Array:
        def total(name: str) -> Array:
            return np.asarray(sums, float)[..., list(fields).index(name)]

        matches = np.stack([total(f"match{order}") for order in _ORDERS])
        ngrams = np.stack([total(f"ngrams{order}") for order in _ORDERS])
        some = np.all((matches > 0) & (ngrams > 0), axis=0)
        mean = np.mean(np.log(np.where(some, matches, 1) / np.where(some, ngrams, 1)), axis=0)
        brevity = np.minimum(0, 1 - total("reference_words") / np.maximum(total("words"), 1))
        return np.asarray(np.where(some, self.scale * np.exp(mean + brevity), 0.0))


@suite(
    "captions",
    "captions against people's: CIDEr, BLEU-4; `pip install vlmattn[captions]`",
    "a COCO captions file (captions_val2014.json)",
    "arXiv 1411.5726",
)
class Captions(Suite):
    """CIDEr: mean over images, times 100 as usual. BLEU-4: over the whole corpus. length: words per caption.

    Rare words are weighed by the captions of all images in the suite, so CIDEr figures of different limits do not
    compare. An answer counts as right if its own CIDEr is at least 100.
    """

    title = "Captions against people's: CIDEr, BLEU-4"
    fields = (
        "cider", "captions", "words", "reference_words",
        *(f"match{order}" for order in _ORDERS), *(f"ngrams{order}" for order in _ORDERS),
    )  # fmt: skip
    metrics = (
        Metric("cider", {"cider": 1}, {"captions": 1}, "likeness to people's captions, rare words count more"),
        CorpusBleu("bleu4", {}, {}, "share of n-grams that people's captions have, whole corpus"),
        Metric("length", {"words": 1}, {"captions": 1}, "words per caption", scale=1.0, better="", label="words"),
    )

    def __init__(self, samples: Iterable[Sample], settings: Mapping[str, Any], max_new_tokens: int) -> None:
        super().__init__(samples, settings, max_new_tokens)
        self._cider: Any = _scorer()
        for sample in self._samples:
            self._cider.cook_append(None, [" ".join(reference) for reference in sample.truth[1]])
        self._cider.compute_doc_freq()

    @classmethod
    def on_files(
        cls, data: Path, images: Path, limit: int | None = None, max_new_tokens: int = 64, allow_outside: bool = False
    ) -> Captions:
        """A file like ``captions_val2014.json``.

        Raises:
            InputError: a file that is not in COCO's form; an image without caption; pycocoevalcap is missing.
        """
        _scorer()  # before the file is read
        pictures = ImageFolder(images, allow_outside)
        samples = [
            Sample(
                id=str(key),
                image_id=str(key),
                condition="captions",
                splits=("captions",),
                prompt=PROMPT,
                images=pictures.files(str(data), [name]),
                truth=(texts[0], [words(text) for text in texts]),
            )
            for key, (name, texts) in list(load_coco_captions(data).items())[:limit]
        ]
        settings = {"captions": data.name, "limit": limit, "max_new_tokens": max_new_tokens}
        return cls(samples, settings, max_new_tokens)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return self.records({sample.id: answer})[sample.id]

    def records(self, answers: Mapping[str, str]) -> dict[str, dict[str, float]]:
        from pycocoevalcap.cider.cider_scorer import cook_test

        # an empty answer stands where there is none: the scorer wants one for every image
        self._cider.ctest = [cook_test(" ".join(words(answers.get(sample.id, "")))) for sample in self._samples]
        found = {}
        for sample, cider in zip(self._samples, self._cider.compute_cider(), strict=True):
            if sample.id in answers:
                counts = bleu_counts(words(answers[sample.id]), sample.truth[1])
                found[sample.id] = {"cider": float(cider), "captions": 1.0, **counts}
        return found

    def right(self, record: Mapping[str, float]) -> bool:
        return record["cider"] >= _GOOD

    def expected(self, sample: Sample) -> str:
        return str(sample.truth[0])


def bleu_counts(answer: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """What BLEU sums up: n-grams, those that a reference has too, words, words of the reference nearest in length."""
    nearest = min((abs(len(reference) - len(answer)), len(reference)) for reference in references)[1]
    counts = {"words": float(len(answer)), "reference_words": float(nearest)}
    for order in _ORDERS:
        said = _ngrams(answer, order)
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= _ngrams(reference, order)  # the larger count of each
        counts[f"match{order}"] = float((said & most).total())
        counts[f"ngrams{order}"] = float(said.total())
    return counts


def _ngrams(text: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))


def _scorer() -> Any:
    try:
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError:
        raise InputError(
            "suite captions needs pycocoevalcap for CIDEr; run: pip install pycocoevalcap   (no Java is needed)"
        ) from None
    return CiderScorer()
