"""The procedural world of the bundled model: 16 kinds of things in 4 contexts, drawn on 56 x 56 pixels.

Two dials make it a test-bed for hallucination. *Visibility* sets opacity and size of the things (they stay in the
ground truth however faint they are); *prior* sets which share of the scenes breaks the co-occurrences that the model
was trained on. Everything about scene ``i`` follows from ``(seed, i)`` alone, so a scene does not depend on how many
were drawn before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw

IMAGE_SIZE = 56
PATCH_SIZE = 8
_CANVAS = 72  # of the drawings in sprites.yaml

CONTEXTS: dict[str, tuple[str, ...]] = {
    "kitchen": ("cup", "plate", "fork", "apple"),
    "park": ("dog", "ball", "tree", "bird"),
    "street": ("car", "bus", "sign", "bike"),
    "room": ("cat", "lamp", "book", "clock"),
}
CATEGORIES: tuple[str, ...] = tuple(name for group in CONTEXTS.values() for name in group)
SYNONYMS: dict[str, tuple[str, ...]] = {
    "cup": ("mug",),
    "dog": ("puppy",),
    "cat": ("kitten",),
    "bike": ("bicycle",),
    "bus": ("coach",),
    "car": ("auto",),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 220, 50),
    "green": (45, 165, 60),
    "blue": (45, 85, 215),
    "purple": (145, 55, 185),
    "white": (242, 242, 242),
    "brown": (125, 75, 35),
}

# The prior: what goes with what.
_CONTEXT_P = (0.34, 0.30, 0.21, 0.15)
_IN_CONTEXT_P = (0.40, 0.30, 0.18, 0.12)
_COUNT_P = (0.08, 0.22, 0.30, 0.25, 0.15)  # 1..5 things
_P_CATEGORY_FROM_CONTEXT = 0.87
_P_PARTNER = 0.75
_P_BACKGROUND_FROM_CONTEXT = 0.85
_P_PREFERRED_COLOUR = 0.40
_P_PREFERRED_PLACE = 0.70
_P_STRIPED = 0.20
_PAIRS = (
    ("cup", "plate"),
    ("fork", "apple"),
    ("dog", "ball"),
    ("tree", "bird"),
    ("car", "sign"),
    ("bus", "bike"),
    ("cat", "book"),
    ("lamp", "clock"),
)
PARTNER: dict[str, str] = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
PREFERRED_COLOUR: dict[str, str] = {
    "cup": "white", "plate": "white", "fork": "blue", "apple": "red", "dog": "brown", "ball": "red", "tree": "green",
    "bird": "blue", "car": "blue", "bus": "yellow", "sign": "red", "bike": "purple", "cat": "orange", "lamp": "yellow",
    "book": "purple", "clock": "white",
}  # fmt: skip
_PREFERRED_PLACE: dict[str, tuple[Literal["x", "y"], float]] = {
    "lamp": ("y", 0.25), "clock": ("y", 0.25), "bird": ("y", 0.25), "sign": ("y", 0.35), "tree": ("x", 0.25),
    "plate": ("y", 0.75), "dog": ("y", 0.75),
}  # fmt: skip
_BACKGROUND = {"kitchen": (200, 190, 170), "park": (120, 170, 110), "street": (130, 130, 140), "room": (180, 150, 150)}

#: Opacity range (0..1) and size range in pixels (both ends included) of the things, by name of the visibility.
VISIBILITY: dict[str, tuple[tuple[float, float], tuple[int, int]]] = {
    "clear": ((0.55, 1.0), (14, 22)),
    "dim": ((0.30, 0.60), (14, 22)),
    "faint": ((0.10, 0.30), (12, 19)),
    "tiny": ((0.30, 0.60), (8, 11)),
}
# In training scenes a share of the things cannot be resolved, yet is named in the answers: the model can only get
# them from the prior. That is what teaches it to say what is likely rather than what is seen.
HARD_SHARE = 0.38
_HARD_OPACITY = (0.04, 0.30)
_HARD_SIZE = (6, 8)
_HARD_IS_FAINT = 0.60


@dataclass(frozen=True)
class Thing:
    """One object: category and colour by name, centre ``x, y`` and ``size`` in pixels, ``opacity`` 0..1."""

    category: str
    colour: str
    striped: bool
    x: float
    y: float
    size: int
    opacity: float

    @property
    def corner(self) -> tuple[int, int]:
        """Top-left pixel of the drawn sprite, kept inside the image."""
        limit = IMAGE_SIZE - self.size
        return tuple(min(max(round(v - self.size / 2), 0), limit) for v in (self.x, self.y))  # type: ignore[return-value]


@dataclass(frozen=True)
class Scene:
    """What is in a picture. ``things`` are in the order of ``CATEGORIES``; categories are distinct."""

    things: tuple[Thing, ...]
    background: str
    prior_broken: bool

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(thing.category for thing in self.things)


def _categories_by_prior(rng: np.random.Generator, context: str, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        if rng.random() < _P_CATEGORY_FROM_CONTEXT:
            new = str(rng.choice(CONTEXTS[context], p=_IN_CONTEXT_P))
            if new in found and rng.random() < 0.3:  # a context has four categories: let crowded scenes go on
                new = str(rng.choice(CATEGORIES))
        else:
            new = str(rng.choice(CATEGORIES))
        if new in found:
            continue
        found.append(new)
        if PARTNER[new] not in found and len(found) < count and rng.random() < _P_PARTNER:
            found.append(PARTNER[new])
    return found


def _categories_against_prior(rng: np.random.Generator, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        new = str(rng.choice(CATEGORIES))
        if new not in found and PARTNER[new] not in found:
            found.append(new)
    return found


def sample_scene(
    rng: np.random.Generator, visibility: str | None = None, prior_broken: bool = False, count: int | None = None
) -> Scene:
    """Draw a scene.

    Args:
        visibility: a key of ``VISIBILITY``, or None for the training mixture: full opacity, except that a share
            ``HARD_SHARE`` of the things is nearly invisible (opacity .04-.30) or 6-8 pixels small.
        prior_broken: categories uniform and without any partner pair, colours, places and background uniform.
        count: number of things (1..5); drawn when None.
    """
    context = str(rng.choice(list(CONTEXTS), p=_CONTEXT_P))
    count = count or int(rng.choice(np.arange(1, 6), p=_COUNT_P))
    if prior_broken:
        names = _categories_against_prior(rng, count)
        background = str(rng.choice(list(CONTEXTS)))
    else:
        names = _categories_by_prior(rng, context, count)
        background = context if rng.random() < _P_BACKGROUND_FROM_CONTEXT else str(rng.choice(list(CONTEXTS)))
    things: list[Thing] = []
    for name in names:
        size, opacity = _size_and_opacity(rng, visibility)
        x, y = _place(rng, name, size, things, prior_broken)
        colour = (
            PREFERRED_COLOUR[name]
            if not prior_broken and rng.random() < _P_PREFERRED_COLOUR
            else str(rng.choice(list(COLOURS)))
        )
        things.append(Thing(name, colour, bool(rng.random() < _P_STRIPED), x, y, size, opacity))
    things.sort(key=lambda thing: CATEGORIES.index(thing.category))
    return Scene(tuple(things), background, prior_broken)


def _size_and_opacity(rng: np.random.Generator, visibility: str | None) -> tuple[int, float]:
    if visibility is None:
        if rng.random() >= HARD_SHARE:
            return int(rng.integers(14, 23)), 1.0
        if rng.random() < _HARD_IS_FAINT:
            return int(rng.integers(14, 21)), float(rng.uniform(*_HARD_OPACITY))
        return int(rng.integers(_HARD_SIZE[0], _HARD_SIZE[1] + 1)), 1.0
    opacity, size = VISIBILITY[visibility]
    return int(rng.integers(size[0], size[1] + 1)), float(rng.uniform(*opacity))


def _place(rng: np.random.Generator, name: str, size: int, others: list[Thing], uniform: bool) -> tuple[float, float]:
    x = y = IMAGE_SIZE / 2
    for _ in range(30):  # a crowded scene may overlap after thirty tries
        x, y = rng.uniform(size / 2, IMAGE_SIZE - size / 2, 2)
        if not uniform and name in _PREFERRED_PLACE and rng.random() < _P_PREFERRED_PLACE:
            axis, where = _PREFERRED_PLACE[name]
            wanted = float(np.clip((where + rng.normal() * 0.1) * IMAGE_SIZE, size / 2, IMAGE_SIZE - size / 2))
            x, y = (wanted, y) if axis == "x" else (x, wanted)
        if all(max(abs(x - o.x), abs(y - o.y)) > 0.425 * (size + o.size) for o in others):
            break
    return float(x), float(y)


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a scene on a noisy background: uint8 ``[56, 56, 3]``."""
    base = np.array(_BACKGROUND[scene.background], np.float32) * rng.uniform(0.75, 1.2)
    coarse = Image.fromarray(rng.normal(0, 16, (6, 6)).astype(np.float32))
    shade = np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))[..., None]
    canvas = base + shade + rng.normal(0, 6, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)
    for thing in scene.things:
        x, y = thing.corner
        rgb, alpha = _sprite(thing.category, thing.colour, thing.striped, thing.size)
        part = canvas[y : y + thing.size, x : x + thing.size]
        part += (rgb - part) * alpha * thing.opacity
    canvas += rng.normal(0, 3, canvas.shape).astype(np.float32)
    picture: NDArray[np.uint8] = np.clip(canvas, 0, 255).astype(np.uint8)
    return picture


def make_scene(
    seed: int, index: int, visibility: str | None = "clear", prior_broken: float = 0.0, count: int | None = None
) -> tuple[Scene, NDArray[np.uint8]]:
    """Scene ``index`` of the stream ``seed`` and its picture; ``prior_broken`` (0..1) of them break the prior."""
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng, visibility, prior_broken=bool(rng.random() < prior_broken), count=count)
    return scene, render(scene, rng)


@cache
def _drawings() -> dict[str, Any]:
    drawings: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("sprites.yaml").read_text(encoding="utf-8"))
    return drawings


def draw_sprite(category: str, colour: str, striped: bool) -> Image.Image:
    """One thing at full size, RGBA ``72 x 72``."""
    body = COLOURS[colour]
    paints = {"body": body, "dark": [int(v * 0.45) for v in body], "light": [int(v * 0.5 + 127) for v in body]}
    paints |= _drawings()["paints"]
    image = Image.new("RGBA", (_CANVAS, _CANVAS), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    for shape, points, paint, width in _drawings()["sprites"][category]:
        ink = (*paints[paint], 255)
        if shape == "arc":
            pen.arc(points[:4], points[4], points[5], fill=ink, width=width)
        elif shape == "line":
            pen.line(points, fill=ink, width=width)
        elif width:
            pen.ellipse(points, outline=ink, width=width)
        else:
            getattr(pen, shape)(points, fill=ink)
    if not striped:
        return image
    pixels = np.asarray(image).copy()
    rows, columns = np.indices((_CANVAS, _CANVAS))
    stripe = ((rows + columns) // 9 % 2 == 0) & (pixels[..., 3] > 0)
    pixels[stripe, :3] = (pixels[stripe, :3] * 0.25 + 15).astype(np.uint8)
    return Image.fromarray(pixels)


@cache
def _sprite(category: str, colour: str, striped: bool, size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    pixels = np.asarray(draw_sprite(category, colour, striped).resize((size, size), Image.Resampling.BOX), np.float32)
    return pixels[..., :3], pixels[..., 3:] / np.float32(255)


def patch_labels(scene: Scene) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Category and colour of every image patch, ``[49]`` each: 0 is background, 1.. index ``CATEGORIES`` / ``COLOURS``.

    A patch belongs to a thing that covers a quarter of it (or that lies in it with a quarter of its own area).
    """
    side = IMAGE_SIZE // PATCH_SIZE
    starts = np.arange(side) * PATCH_SIZE
    category = np.zeros((side, side), np.int64)
    colour = np.zeros((side, side), np.int64)
    for thing in scene.things:
        x, y = thing.corner
        wide = np.clip(np.minimum(x + thing.size, starts + PATCH_SIZE) - np.maximum(x, starts), 0, None)
        high = np.clip(np.minimum(y + thing.size, starts + PATCH_SIZE) - np.maximum(y, starts), 0, None)
        covered = np.outer(high, wide) >= 0.25 * min(PATCH_SIZE**2, thing.size**2)
        category[covered] = CATEGORIES.index(thing.category) + 1
        colour[covered] = list(COLOURS).index(thing.colour) + 1
    return category.ravel(), colour.ravel()
