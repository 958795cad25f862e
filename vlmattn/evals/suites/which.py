"""In which image is the X? Several scenes in one prompt; the answer is the image's number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlmattn.errors import OptionError
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.questions import read_numbers
from vlmattn.evals.suites.world import World


class Which(Suite):
    """Position-balanced questions over 2..n images; a split is a number of images.

    An answer is the one number that it names, in digits or as a word: "2", "Image 2.", "two".
    """

    name = "which"
    title = "In which image is the ...?"
    fields = ("right", "asked")
    metrics = (Metric("accuracy", {"right": 1}, {"asked": 1}, "share of right image numbers"),)
    max_new_tokens = 4

    def __init__(self, world: World, images: Sequence[int] = (2, 3, 4)) -> None:
        if min(images) < 2 or world.count < max(images):
            raise OptionError(
                f"which asks about 2 images or more, and needs as many scenes; got {world.count} scenes for {max(images)}"
            )
        self.settings = {"scenes": world.settings(), "images": list(images)}
        self._samples: list[Sample] = []
        for count in images:
            for index in range(world.count):
                rng = np.random.default_rng([world.seed, count, index])
                gold = index % count
                while True:
                    chosen = [int(i) for i in rng.choice(world.count, count, replace=False)]
                    elsewhere = {name for k, i in enumerate(chosen) if k != gold for name in world.scene(i).categories}
                    unique = [name for name in world.scene(chosen[gold]).categories if name not in elsewhere]
                    if unique:
                        break
                self._samples.append(
                    Sample(
                        id=f"{world.name}/{count}/{index}",
                        image_id=f"{count}/{index}",
                        condition=world.name,
                        splits=(f"{count} images", f"{count} images, answer {gold + 1}"),
                        prompt=f"In which image is the {unique[int(rng.integers(len(unique)))]}?",
                        images=lambda chosen=chosen: [world.image(i)[0] for i in chosen],  # type: ignore[misc]
                        truth=str(gold + 1),
                        image_count=count,
                    )
                )

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return {"right": float(set(read_numbers(answer)) == {int(sample.truth)}), "asked": 1.0}

    def right(self, record: Mapping[str, float]) -> bool:
        return bool(record["right"])

    def expected(self, sample: Sample) -> str:
        return str(sample.truth)
