"""A few samples of another suite, as one set: what a setting is chosen on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from vlmattn.errors import InputError, OptionError
from vlmattn.evals.suites.base import Sample, Suite


class Subset(Suite):
    """Some samples of a suite, in its order and with its scores.

    Args:
        suite: where the samples come from.
        ids: of the samples that stay.
        label: what they are; stands in the settings.
        whole: whether it stands also where condition and split stand otherwise: each question counts once then, and
            there is one figure per metric.

    Raises:
        InputError: the suite has no sample of that id.
    """

    def __init__(self, suite: Suite, ids: Sequence[str], label: str = "validation", whole: bool = True) -> None:
        wanted = set(ids)
        self._suite = suite
        chosen = [sample for sample in suite.samples() if sample.id in wanted]
        samples = [replace(s, condition=label, splits=(label,)) if whole else s for s in chosen]
        if missing := sorted(wanted - {sample.id for sample in samples}):
            raise InputError(f"the suite '{suite.name}' has no sample '{missing[0]}' ({len(missing)} of {len(wanted)})")
        for name in ("name", "title", "fields", "metrics", "mean_of_splits"):  # of the class elsewhere
            self.__dict__[name] = getattr(suite, name)
        super().__init__(samples, {**suite.settings, label: [s.id for s in samples]}, suite.max_new_tokens)

    @classmethod
    def draw(cls, suite: Suite, count: int, seed: int, label: str = "validation") -> Subset:
        """The first ``count`` samples of the suite in an order shuffled by ``seed``.

        Raises:
            OptionError: the suite has fewer samples, or a count below 1.
        """
        samples = suite.samples()
        if not 1 <= count <= len(samples):
            raise OptionError(
                f"the number of samples must be within 1..{len(samples)}, as many as '{suite.name}' has; got {count}"
            )
        order = np.random.default_rng(seed).permutation(len(samples))
        return cls(suite, [samples[int(i)].id for i in order[:count]], label)

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return self._suite.score(sample, answer)

    def records(self, answers: Mapping[str, str]) -> dict[str, dict[str, float]]:
        own = {sample.id for sample in self._samples}
        return self._suite.records({key: answer for key, answer in answers.items() if key in own})

    def right(self, record: Mapping[str, float]) -> bool:
        return self._suite.right(record)

    def expected(self, sample: Sample) -> str:
        return self._suite.expected(sample)
