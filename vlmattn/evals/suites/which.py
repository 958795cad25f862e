"""In which image is the X? Several scenes in one prompt; the answer is the image's number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample, Suite
from vlmattn.evals.suites.questions import read_numbers
from vlmattn.evals.suites.registry import suite
from vlmattn.evals.suites.world import World, check_sizes


@suite("which", "in which of several images is the X?")
class Which(Suite):
    """Position-balanced questions over 2..n images; a split is a number of images.

    An answer is the one number that it names, in digits or as a word: "2", "Image 2.", "two".
    """

    title = "In which image is the ...?"
    fields = ("right", "asked")
    metrics = (Metric("accuracy", {"right": 1}, {"asked": 1}, "share of right image numbers"),)
    max_new_tokens = 4

    def __init__(self, world: World, sizes: Sequence[int] = (2, 3, 4)) -> None:
        check_sizes("which", sizes, world.count)
        samples = []
        for count in sizes:
            for index in range(world.count):
                rng = np.random.default_rng([world.seed, count, index])
                gold = index % count
                while True:
                    chosen = [int(i) for i in rng.choice(world.count, count, replace=False)]
                    elsewhere = {name for k, i in enumerate(chosen) if k != gold for name in world.scene(i).categories}
                    unique = [name for name in world.scene(chosen[gold]).categories if name not in elsewhere]
                    if unique:
                        break
                samples.append(
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
        super().__init__(samples, {"scenes": world.settings(), "images": list(sizes)})

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        return {"right": float(set(read_numbers(answer)) == {int(sample.truth)}), "asked": 1.0}
