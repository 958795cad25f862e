"""PQA: the same question about each of several images, wherever it stands (after arXiv 2503.13792).

Every set of n images is shown in its n rotations and each image is asked about, so every image meets every position
once. Accuracy by position shows a favourite place; inconsistency shows answers that change although only the order did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlmattn.embedded.scenes import CATEGORIES
from vlmattn.embedded.text import with_article
from vlmattn.errors import InputError
from vlmattn.evals.stats import Metric
from vlmattn.evals.suites.base import Sample
from vlmattn.evals.suites.files import ImageFolder
from vlmattn.evals.suites.pope import read_questions
from vlmattn.evals.suites.registry import suite
from vlmattn.evals.suites.world import World, check_sizes
from vlmattn.evals.suites.yesno import ACCURACY, YES_RATIO, YesNo

_IN_THE_IMAGE = "in the image"  # in POPE's questions
_SETS = 50  # of files, per number of images
SIZES = (2, 4)


@dataclass(frozen=True)
class _Set:
    """Images that are asked the same, some of which show it.

    Attributes:
        key: its id; ``condition``: the data it is of.
        show: the pictures of some of its images in an order.
        truths: of each image.
        ask: the question about the image at a position from 1.
    """

    key: str
    condition: str
    show: Callable[[tuple[int, ...]], Callable[[], list[Image.Image]]]
    truths: tuple[bool, ...]
    ask: Callable[[int], str]

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """The image asked about, and the question, for every rotation and position."""
        size = len(self.truths)
        for turn in range(size):
            order = tuple((turn + place) % size for place in range(size))
            for place, which in enumerate(order):
                asked = f"{self.condition}/{self.key}/{which}"
                yield (
                    asked,
                    Sample(
                        id=f"{asked}/{place}",
                        image_id=self.key,
                        condition=self.condition,
                        splits=(f"{size} images", f"{size} images, position {place + 1}"),
                        prompt=self.ask(place + 1),
                        images=self.show(order),
                        truth=self.truths[which],
                        image_count=size,
                    ),
                )


@suite(
    "pqa", "is there an X in image i? for every image at every position", "POPE's question files", "arXiv 2503.13792"
)
class PQA(YesNo):
    """Is there a ... in image i? A split is a number of images, and each position in them.

    inconsistency = images whose n answers, one from each position, are not all alike / images asked about.
    """

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

    def __init__(self, sets: Iterable[_Set], settings: Mapping[str, object]) -> None:
        pairs = [pair for each in sets for pair in each.samples()]
        super().__init__((sample for _, sample in pairs), settings)
        self._asked = {sample.id: asked for asked, sample in pairs}  # the image asked about, by sample

    @classmethod
    def on_scenes(cls, world: World, sizes: Sequence[int] = SIZES, sets: int | None = None) -> PQA:
        """Groups of scenes, and a thing that some of them show.

        Args:
            sizes: numbers of images per prompt.
            sets: groups of images per number; default a quarter of the scenes.

        Raises:
            OptionError: fewer scenes than images, or a number of images below 2.
        """
        check_sizes("pqa", sizes, world.count)
        count = max(1, world.count // 4) if sets is None else sets
        drawn = (_of_scenes(world, size, number) for size in sizes for number in range(count))
        return cls(drawn, {"scenes": world.settings(), "images": list(sizes), "sets": count})

    @classmethod
    def on_files(
        cls,
        data: Sequence[Path],
        images: Path,
        sizes: Sequence[int] = SIZES,
        sets: int = _SETS,
        seed: int = 0,
        allow_outside: bool = False,
    ) -> PQA:
        """Groups of images of POPE's question files for which the same question has both answers.

        Questions about an image that the files answer by both yes and no are left out.

        Args:
            data: files as ``Pope.on_files`` reads them.
            sizes: numbers of images per prompt.
            sets: groups of images per number, drawn with ``seed``.

        Raises:
            InputError: as ``Pope.on_files``; no question has both answers for as many images.
        """
        check_sizes("pqa", sizes)
        folder = ImageFolder(images, allow_outside)
        said: dict[str, dict[str, set[bool]]] = {}  # question -> image -> truths
        for path in data:
            for item in read_questions(path):
                image, text, truth = item.text("image"), item.text("text"), item.yes("label")
                if _IN_THE_IMAGE in text:
                    said.setdefault(text, {}).setdefault(image, set()).add(truth)
        known = {text: {name: True in of for name, of in by.items() if len(of) == 1} for text, by in said.items()}
        drawn = [_of_files(known, folder, size, number, seed) for size in sizes for number in range(sets)]
        names = [path.name for path in data]
        return cls(drawn, {"questions": names, "images": list(sizes), "sets": sets, "seed": seed})

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


def _of_scenes(world: World, size: int, number: int) -> _Set:
    """About half of the images show the thing that is asked for."""
    rng = np.random.default_rng([world.seed, size, number])
    while True:
        chosen = [int(index) for index in rng.choice(world.count, size, replace=False)]
        showing = {name: [name in world.scene(i).categories for i in chosen] for name in CATEGORIES}
        mixed = [name for name, there in showing.items() if 0 < sum(there) < size]
        if mixed:
            break
    name = mixed[int(rng.integers(len(mixed)))]
    return _Set(
        key=f"{size}/{number}",
        condition=world.name,
        show=lambda order: lambda: [world.image(chosen[place])[0] for place in order],
        truths=tuple(showing[name]),
        ask=lambda place: f"Is there {with_article(name)} in image {place}?",
    )


def _of_files(known: Mapping[str, Mapping[str, bool]], folder: ImageFolder, size: int, number: int, seed: int) -> _Set:
    """Half of the images, as far as there are such, have the answer yes."""
    rng = np.random.default_rng([seed, size, number])
    fitting = sorted(text for text, of in known.items() if len(of) >= size and len(set(of.values())) == 2)
    if not fitting:
        raise InputError(f"pqa: no question of the files has both answers for {size} images; give more question files")
    text = fitting[int(rng.integers(len(fitting)))]
    there, not_there = (
        sorted(name for name, truth in known[text].items() if truth is value) for value in (True, False)
    )
    shown = min(max(size // 2, size - len(not_there)), len(there))
    names = [*rng.permutation(there)[:shown], *rng.permutation(not_there)[: size - shown]]
    names = [str(name) for name in rng.permutation(names)]
    return _Set(
        key=f"{size}/{number}",
        condition="questions",
        show=lambda order: folder.files("pqa", [names[place] for place in order]),
        truths=tuple(known[text][name] for name in names),
        ask=lambda place: text.replace(_IN_THE_IMAGE, f"in image {place}"),
    )
