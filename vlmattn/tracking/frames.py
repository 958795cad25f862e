"""Frames: from pictures, arrays, folders and videos to what a network takes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from vlmattn.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_ANIMATED = (".gif", ".apng")
_RATE = 30.0  # frames per second where nothing says otherwise


def to_tensor(image: Any) -> Tensor:
    """A frame, or a batch of frames, as float ``[..., 3, height, width]`` in [0, 1].

    Args:
        image: a PIL image or a path; uint8 ``[..., height, width, 3]``; or float ``[..., 3, height, width]`` in [0, 1].

    Raises:
        InputError: another shape, values outside of [0, 1], NaN.
    """
    if isinstance(image, (str, Path)):
        image = open_picture(Path(image))
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    x = torch.as_tensor(image)
    if x.dtype == torch.uint8:
        if x.dim() < 3 or x.shape[-1] != 3:
            raise InputError(f"pictures in uint8 must be [height, width, 3], got {list(x.shape)}")
        x = x.movedim(-1, -3).float() / 255
    if not x.is_floating_point() or x.dim() < 3 or x.shape[-3] != 3:
        raise InputError(
            f"a frame is a PIL image, uint8 [height, width, 3] or float [3, height, width]; got {x.dtype} {list(x.shape)}"
        )
    low, high = (float(x.amin()), float(x.amax())) if x.numel() else (0.0, 0.0)
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # false for NaN too
        raise InputError(f"a frame holds values from {low:g} to {high:g}; they must be finite and within [0, 1]")
    return x


def to_mask(mask: Any, size: tuple[int, int]) -> Tensor:
    """A mask of the object as bool ``[height, width]``, True on it.

    Raises:
        InputError: it is not of the frame's size, or empty.
    """
    if isinstance(mask, Image.Image):
        mask = np.array(mask.convert("L")) > 127
    x = torch.as_tensor(mask)
    if tuple(x.shape) != size:
        raise InputError(f"the mask must be [height, width] = {list(size)} as its frame, got {list(x.shape)}")
    x = x != 0
    if not bool(x.any()):
        raise InputError("the mask is empty; leave it out to use the whole frame")
    return x


def fit(picture: Image.Image, longest: int | None, multiple: int) -> Image.Image:
    """Resize so that the longer side is ``longest`` (None: as it is) and both are whole multiples of ``multiple``."""
    scale = 1.0 if longest is None else longest / max(picture.size)
    wide, high = (max(multiple, round(side * scale / multiple) * multiple) for side in picture.size)
    picture = picture.convert("RGB")
    return picture if (wide, high) == picture.size else picture.resize((wide, high), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Frame:
    """One picture of a sequence."""

    name: str
    seconds: float
    picture: Image.Image


class Frames:
    """The frames of a folder of pictures or of a video, one at a time.

    A folder is read in natural order (frame2 before frame10). Files named by numbers with a decimal point, as in TUM RGB-D,
    carry their time in their name; others follow at ``rate``.

    Args:
        source: folder, video or animated picture.
        every: take each ``every``-th frame.
        rate: frames per second where the source does not say; default 30.

    Raises:
        InputError: nothing there, no picture in the folder, or a video without PyAV installed.
    """

    def __init__(self, source: str | Path, every: int = 1, rate: float | None = None) -> None:
        self._source, self._every, self._rate = Path(source), every, rate
        if every < 1:
            raise InputError(f"every must be at least 1, got {every}")
        if not self._source.exists():
            raise InputError(f"no such folder or video: {source}")
        self._files: list[Path] = []
        if self._source.is_dir():
            self._files = sorted(
                (file for file in self._source.iterdir() if file.suffix.lower() in PICTURES), key=_natural
            )
            if not self._files:
                raise InputError(f"no pictures in {source}; known: {', '.join(PICTURES)}")
        elif self._source.suffix.lower() not in _ANIMATED and importlib.util.find_spec("av") is None:
            raise InputError(
                f"reading {self._source.name} needs PyAV; run: pip install av   (or give a folder of frames)"
            )

    def __len__(self) -> int:
        """Number of frames; 0 where the video does not tell."""
        if self._files:
            count = len(self._files)
        elif self._source.suffix.lower() in _ANIMATED:
            with Image.open(self._source) as moving:
                count = int(getattr(moving, "n_frames", 1))
        else:
            with self._opened() as container:
                count = container.streams.video[0].frames
        return -(-count // self._every)

    def __iter__(self) -> Iterator[Frame]:
        for number, frame in enumerate(self._all()):
            if number % self._every == 0:
                yield frame

    def _all(self) -> Iterator[Frame]:
        if self._files:
            return self._folder()
        return self._animated() if self._source.suffix.lower() in _ANIMATED else self._video()

    def _folder(self) -> Iterator[Frame]:
        named = [_time(file) for file in self._files]
        timed = all(time is not None for time in named)
        for number, file in enumerate(self._files):
            seconds = named[number] if timed else None
            yield Frame(file.name, number / (self._rate or _RATE) if seconds is None else seconds, open_picture(file))

    def _animated(self) -> Iterator[Frame]:
        seconds = 0.0
        with Image.open(self._source) as moving:
            for number, frame in enumerate(ImageSequence.Iterator(moving)):
                yield Frame(f"{number}", number / self._rate if self._rate else seconds, frame.convert("RGB"))
                seconds += frame.info.get("duration", 1000 / _RATE) / 1000

    def _video(self) -> Iterator[Frame]:
        with self._opened() as container:
            for number, frame in enumerate(container.decode(video=0)):
                known = frame.time if frame.time is not None else number / _RATE
                yield Frame(f"{number}", number / self._rate if self._rate else float(known), frame.to_image())

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import av

        try:
            with av.open(str(self._source)) as container:
                yield container
        except (av.FFmpegError, IndexError) as error:
            raise InputError(f"cannot read the video {self._source}: {error}") from error


def open_picture(file: Path) -> Image.Image:
    """A picture, upright, in RGB.

    Raises:
        InputError: it cannot be read.
    """
    from PIL import ImageOps

    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"cannot read the picture {file}: {error}") from error


def _natural(file: Path) -> list[tuple[int, float, str]]:
    words = re.split(r"(\d+(?:\.\d+)?)", file.stem)
    return [(0, float(word), "") if number % 2 else (1, 0.0, word) for number, word in enumerate(words)]


def _time(file: Path) -> float | None:
    return float(file.stem) if re.fullmatch(r"\d+\.\d+", file.stem) else None
