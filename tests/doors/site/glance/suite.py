from collections.abc import Sequence

from vlmattn.evals.stats import Metric
from vlmattn.evals.suites import Sample, Suite, World, suite


@suite("glance", "a word about each scene; any answer is right")
class GlanceSuite(Suite):
    """One question about each scene; any answer is right."""

    title, fields = "A glance", ("said", "asked")
    metrics = (Metric("answers", {"said": 1}, {"asked": 1}, "share of answers with a word"),)

    def __init__(self, worlds: Sequence[World]):
        self.settings = {"scenes": [world.settings() for world in worlds]}
        self._samples = [
            Sample(f"{world.name}/{n}", str(n), world.name, ("all",), "Describe the image.",
                   lambda world=world, n=n: [world.image(n)[0]], "a word")
            for world in worlds for n in range(world.count)
        ]  # fmt: skip

    def samples(self):
        return self._samples

    def score(self, sample, answer):
        return {"said": float(bool(answer.strip())), "asked": 1.0}

    def right(self, record):
        return bool(record["said"])

    def expected(self, sample):
        return sample.truth
