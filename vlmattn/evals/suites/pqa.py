"""PQA: the same question about each of several images, wherever it stands (after arXiv 2503.13792), on generated scenes.

Every set of n images is shown in its n rotations and each image is asked about, so every image meets every position once.
Accuracy by position shows a favourite place; inconsistency shows answers that change although only the order did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlmattn.embedded.scenes import CATEGORIES
from vlmattn.embedded.text import with_article
from vlmattn.errors import OptionError
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.world import World
from vlmattn.evals.suites.yesno import ACCURACY, YES_RATIO, YesNo


class PQA(YesNo):
    """Is there a ... in image i? A split is a number of images, and each position in them.

    inconsistency = images whose n answers, one from each position, are not all alike / images asked about.

    Args:
        world: its scenes, ``sets`` groups of them per number of images.
        images: numbers of images per prompt.
        sets: groups of images per number; default a quarter of the scenes.

    Raises:
        OptionError: fewer scenes than images, or a number of images below 2.
    """

    name = "pqa"
    title = "PQA: the same question about each image, at every position"
    fields = ("right", "wrong", "yes", "changed", "changed_asked")
    metrics = (
        ACCURACY,
        Metric(
            "inconsistency",
            {"changed": 1},
            {"changed_asked": 1},
            "images whose answer changes with their position",
            better="lower",
            label="incons.",
        ),
        YES_RATIO,
    )

    def __init__(self, world: World, images: Sequence[int] = (2, 4), sets: int | None = None) -> None:
        if min(images) < 2 or world.count < max(images):
            raise OptionError(
                f"pqa asks about 2 images or more, and needs as many scenes; got {world.count} scenes for {max(images)}"
            )
        count = max(1, world.count // 4) if sets is None else sets
        self.settings = {"scenes": world.settings(), "images": list(images), "sets": count}
        self._samples = []
        self._asked: dict[str, str] = {}  # the image asked about, by sample
        for size in images:
            for number in range(count):
                self._add(world, size, number)

    def _add(self, world: World, size: int, number: int) -> None:
        """One set of images: about half of them show the thing that is asked for."""
        rng = np.random.default_rng([world.seed, size, number])
        while True:
            chosen = [int(index) for index in rng.choice(world.count, size, replace=False)]
            showing = {name: [name in world.scene(i).categories for i in chosen] for name in CATEGORIES}
            mixed = [name for name, there in showing.items() if 0 < sum(there) < size]
            if mixed:
                break
        name = mixed[int(rng.integers(len(mixed)))]
        for turn in range(size):
            order = [*chosen[turn:], *chosen[:turn]]
            for place in range(size):
                which = (place + turn) % size
                asked = f"{world.name}/{size}/{number}/{which}"
                self._asked[f"{asked}/{place}"] = asked
                self._samples.append(
                    Sample(
                        id=f"{asked}/{place}",
                        image_id=f"{size}/{number}",
                        condition=world.name,
                        splits=(f"{size} images", f"{size} images, position {place + 1}"),
                        prompt=f"Is there {with_article(name)} in image {place + 1}?",
                        images=lambda order=order: [world.image(i)[0] for i in order],  # type: ignore[misc]
                        truth=showing[name][which],
                        image_count=size,
                    )
                )

    def records(self, answers: Mapping[str, str]) -> dict[str, dict[str, float]]:
        found = super().records(answers)
        said: dict[str, set[bool | None]] = {}
        for key in found:
            said.setdefault(self._asked[key], set()).add(self.read(answers[key]))
        first: set[str] = set()
        for key, record in found.items():
            asked = self._asked[key]
            counts = asked not in first
            first.add(asked)
            record["changed"] = float(counts and len(said[asked]) > 1)
            record["changed_asked"] = float(counts)
        return found
