"""Generated scenes as evaluation data: which scenes, and what the model was taught to expect in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmattn.embedded.scenes import CATEGORIES, VISIBILITY, Scene, make_scene
from vlmattn.errors import OptionError

#: Streams of scenes that training never draws from.
EVAL_SEED = 12
_STATISTICS_SEED = 99
THINGS = 3
MOST_THINGS = 5
#: The most frequent number of things in a training scene.
USUAL_COUNT = 3


@dataclass(frozen=True)
class World:
    """A set of generated scenes.

    Attributes:
        visibility: ``clear``, ``dim``, ``faint`` or ``tiny``.
        prior_broken: share of the scenes (0..1) that break the co-occurrences of the training scenes.
        count: number of scenes.
        swapped: show the picture of another scene, for control: answers should be at chance.
        things: in each scene; None draws one to five, as in training.
    """

    visibility: str = "faint"
    prior_broken: float = 0.0
    count: int = 200
    seed: int = EVAL_SEED
    swapped: bool = False
    things: int | None = THINGS

    def __post_init__(self) -> None:
        if self.visibility not in VISIBILITY:
            raise OptionError(f"visibility must be one of {', '.join(VISIBILITY)}, got '{self.visibility}'")
        if not 0 <= self.prior_broken <= 1:
            raise OptionError(f"prior_broken must be within 0..1, got {self.prior_broken}")
        if self.count < 1:
            raise OptionError(f"the number of scenes must be at least 1, got {self.count}")
        if self.things is not None and not 1 <= self.things <= MOST_THINGS:
            raise OptionError(f"a scene has 1 to {MOST_THINGS} things, got {self.things}")

    @property
    def name(self) -> str:
        words = [self.visibility]
        if self.prior_broken:
            words.append(f"{self.prior_broken:.0%} prior broken")
        if self.swapped:
            words.append("another scene's image")
        return ", ".join(words)

    def scene(self, index: int) -> Scene:
        return make_scene(self.seed, index, self.visibility, self.prior_broken, self.things)[0]

    def image(self, index: int) -> list[Image.Image]:
        shown = (index + 1) % self.count if self.swapped else index
        return [Image.fromarray(make_scene(self.seed, shown, self.visibility, self.prior_broken, self.things)[1])]

    def settings(self) -> dict[str, object]:
        return asdict(self)


def check_sizes(suite: str, sizes: Sequence[int], scenes: int | None = None) -> None:
    """Refuse numbers of images in a prompt that a suite cannot ask about.

    Raises:
        OptionError: a number below 2, none at all, or more than there are scenes.
    """
    if min(sizes, default=0) < 2 or (scenes is not None and scenes < max(sizes)):
        of = "" if scenes is None else f", and needs as many scenes; got {scenes} scenes"
        raise OptionError(f"{suite} asks about 2 images or more{of} for {max(sizes, default=0)}")


def settings_of(worlds: Sequence[World]) -> dict[str, object]:
    """What a suite on some worlds writes with its results."""
    return {"scenes": [world.settings() for world in worlds]}


@lru_cache(maxsize=1)
def co_occurrence() -> NDArray[np.int64]:
    """How often two categories share a training scene, ``[16, 16]``; the diagonal holds how often each occurs.

    Counted on 6000 scenes of the training distribution, not on the evaluated ones.
    """
    counts = np.zeros((len(CATEGORIES), len(CATEGORIES)), np.int64)
    for index in range(6000):
        scene, _ = make_scene(_STATISTICS_SEED, index, None)
        present = [CATEGORIES.index(name) for name in scene.categories]
        counts[np.ix_(present, present)] += 1
    return counts


def absent_objects(scene: Scene, split: str, rng: np.random.Generator) -> Sequence[str]:
    """As many absent categories as the scene has things, by POPE's three rules.

    random: uniform; popular: the most frequent; adversarial: for each thing, the one that most often goes with it.
    """
    counts = co_occurrence()
    absent = [name for name in CATEGORIES if name not in scene.categories]
    if split == "random":
        return [str(name) for name in rng.permutation(absent)[: len(scene.things)]]
    if split == "popular":
        return sorted(absent, key=lambda name: -counts[CATEGORIES.index(name), CATEGORIES.index(name)])[
            : len(scene.things)
        ]
    chosen: list[str] = []
    for present in scene.categories:
        row = counts[CATEGORIES.index(present)]
        chosen.append(
            max((name for name in absent if name not in chosen), key=lambda name: row[CATEGORIES.index(name)])
        )
    return chosen
