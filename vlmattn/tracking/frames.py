"""Frames: from pictures, arrays, folders and videos to what a network takes."""

from __future__ import annotations

import importlib.util
import math
import numbers
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmattn.errors import InputError, VlmattnError
from vlmattn.pictures import SUFFIXES, MovingPicture, check_size, open_picture, upright
from vlmattn.texts import lines_of, read_text

_MOVING = (*SUFFIXES, ".gif", ".apng", ".avif")  # what Pillow reads; all else is a video
_PICTURE = (str, os.PathLike, Image.Image)
_FRAME = "a PIL image, a path, or numbers: uint8 [height, width, 3] or float [3, height, width]"
_LIST = "rgb.txt"  # of a TUM RGB-D sequence: time and file name per line
_RATE = 30.0  # frames per second where nothing says otherwise
_RATES = (1e-6, 1e6)  # slower no clock goes, and trajectories are written in microseconds
_SINCE_1970 = {19: 1e-9, 16: 1e-6, 13: 1e-3}  # digits of nano-, micro- and milliseconds since 1970
_TURNS = {  # what a display matrix says, by the signs of (a, b, c, d): x' = a x + c y, y' = b x + d y
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}


def to_tensor(image: Any) -> Tensor:
    """A frame, or a batch of frames, as float ``[..., 3, height, width]`` in [0, 1].

    Args:
        image: a PIL image or a path, or a list of them; uint8 ``[..., height, width, 3]``; or float ``[..., 3, height,
            width]`` in [0, 1].

    Raises:
        InputError: another type or shape, values outside of [0, 1], NaN.
    """
    if isinstance(image, (list, tuple)) and image and all(isinstance(one, _PICTURE) for one in image):
        frames = [to_tensor(one) for one in image]
        if len(sizes := {f"{frame.shape[-2]}x{frame.shape[-1]}" for frame in frames}) > 1:
            given = ", ".join(sorted(sizes))
            raise InputError(f"pictures of a batch are of one size, got {given}; tracking.fit resizes them")
        return torch.stack(frames)
    if isinstance(image, _PICTURE):
        image = np.array(upright(image) if isinstance(image, Image.Image) else open_picture(image))
    return _scaled(_tensor(image, f"a frame is {_FRAME}"))


def _scaled(x: Tensor) -> Tensor:
    """Numbers of a frame in [0, 1], channels first."""
    if x.dtype == torch.uint8 and x.dim() > 2 and x.shape[-1] == 3:
        return x.movedim(-1, -3).float() / 255
    if not x.is_floating_point() or x.dim() < 3 or x.shape[-3] != 3:
        raise InputError(f"a frame is {_FRAME}; got {x.dtype} {list(x.shape)}")
    low, high = (float(x.amin()), float(x.amax())) if x.numel() else (0.0, 0.0)
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # false for NaN too
        raise InputError(f"a frame holds values from {low:g} to {high:g}; they must be finite and within [0, 1]")
    return x


def to_mask(mask: Any, size: tuple[int, ...]) -> Tensor:
    """A mask of the object as bool ``[height, width]``, True on it.

    Raises:
        InputError: it is no mask, not of the frame's size, holds NaN, or is empty.
    """
    if isinstance(mask, Image.Image):
        mask = np.array(upright(mask).convert("L")) > 127
    x = _tensor(mask, "a mask is a PIL image or numbers [height, width]")
    if tuple(x.shape) != size:
        raise InputError(f"the mask must be [height, width] = {list(size)} as its frame, got {list(x.shape)}")
    if bool((x != x).any()):
        raise InputError("the mask holds NaN; 0 is off the object, anything else on it")
    x = x != 0
    if not bool(x.any()):
        raise InputError("the mask is empty; leave it out to use the whole frame")
    return x


def _tensor(values: Any, what: str) -> Tensor:
    """Numbers of a caller; what is neither array, tensor nor list of numbers is refused by ``what`` they must be."""
    try:
        if isinstance(values, Tensor):
            if values.is_meta or values.layout != torch.strided:
                raise TypeError
            return values.detach()
        # torch takes neither flipped views nor foreign byte orders
        array = np.array(values)
        return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{what}; got {type(values).__name__}") from None


def fit(picture: Image.Image, longest: int | None, multiple: int) -> Image.Image:
    """Resize so that the longer side is ``longest`` (None: as it is) and both are whole multiples of ``multiple``.

    Raises:
        InputError: ``longest`` or ``multiple`` is no whole number of 1 or more, or the result would have too many
            pixels.
    """
    if not isinstance(picture, Image.Image):
        raise InputError(f"a picture is a PIL image, got {type(picture).__name__}; open it with PIL.Image.open")
    for name, value in (("longest", 1 if longest is None else longest), ("multiple", multiple)):
        if not _whole(value):
            raise InputError(f"{name} must be at least 1 and a whole number of pixels, got {value!r}")
    picture = upright(picture)
    scale = 1.0 if longest is None else longest / max(picture.size)
    wide, high = (max(multiple, round(side * scale / multiple) * multiple) for side in picture.size)
    check_size(wide, high)
    return picture if (wide, high) == picture.size else picture.resize((wide, high), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Frame:
    """One picture of a sequence.

    Attributes:
        name: of its file, or its number.
        seconds: 0 or more, and more than the frame before.
        picture: upright, in RGB.
    """

    name: str
    seconds: float
    picture: Image.Image


class Frames:
    """The frames of a folder of pictures, a video or an animated picture, one at a time.

    Times are those of the source:

    - a video's presentation times; of an animation the sum of the delays before;
    - in a TUM RGB-D sequence (a folder with ``rgb.txt``) those of that list;
    - in a folder whose files are named by numbers with a decimal point, as in TUM RGB-D, or by nano-, micro- or
    milliseconds
      since 1970 (19, 16, 13 digits), those of the names. Other folders say none.

    Where the source says none, frames follow at ``rate``. A time that is not after the one before, and a delay of 0,
    say none; times that begin below 0 are moved to 0. A warning, one for a ``Frames``, tells when times are not the
    source's or the caller's.

    A folder without times is read in natural order (frame2 before frame10). Pictures and videos come upright.

    Args:
        source: folder, video or animated picture.
        every: take each ``every``-th frame.
        rate: frames per second where the source does not say; default: what the header of a video says, else 30.

    Raises:
        InputError: nothing there, no picture in the folder, names of which only some are times, a rate that is none, a
            damaged animation, or a video without PyAV installed.
    """

    def __init__(self, source: str | os.PathLike[str], every: int = 1, rate: float | None = None) -> None:
        if not _whole(every):
            raise InputError(f"every must be at least 1 and a whole number, got {every!r}")
        if rate is not None and not (_number(rate) and _RATES[0] <= rate <= _RATES[1]):
            raise InputError(f"rate must be from {_RATES[0]:g} to {_RATES[1]:g} frames per second, got {rate!r}")
        if not isinstance(source, (str, os.PathLike)):
            raise InputError(f"frames come from the path of a folder or video, got {type(source).__name__}")
        self._source, self._every, self._rate = Path(source), every, rate
        self._told = False
        self._files: list[tuple[Path, float | None]] = []
        self._moving: MovingPicture | None = None
        if not os.path.exists(self._source):
            raise InputError(f"no such folder or video: {source}")
        if os.path.isdir(self._source):
            listed = os.path.exists(self._source / _LIST)
            self._files = _listed(self._source) if listed else _named(self._source)
        elif not os.path.isfile(self._source):  # a pipe or a device would hang
            raise InputError(f"neither a folder nor a regular file: {source}")
        elif self._source.suffix.lower() in _MOVING:
            self._moving = MovingPicture(self._source)
        elif importlib.util.find_spec("av") is None:
            raise InputError(
                f"reading {self._source.name} needs PyAV; run: pip install av   (or give a folder of frames)"
            )

    def __len__(self) -> int:
        """Number of frames; 0 where the video does not tell."""
        if self._files:
            count = len(self._files)
        elif self._moving is not None:
            count = len(self._moving)
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
        return self._video() if self._moving is None else self._animated(self._moving)

    def _folder(self) -> Iterator[Frame]:
        clock = _Clock(self)
        for file, said in self._files:
            yield Frame(file.name, clock.at(said), open_picture(file))

    def _animated(self, moving: MovingPicture) -> Iterator[Frame]:
        clock = _Clock(self)
        said: float | None = 0.0
        for number, (picture, shown) in enumerate(moving):
            seconds = clock.at(said)
            yield Frame(f"{number}", seconds, picture)
            said = None if shown is None else seconds + shown

    def _video(self) -> Iterator[Frame]:
        with self._opened() as container:
            clock = _Clock(self, container.streams.video[0].average_rate)
            for number, frame in enumerate(container.decode(video=0)):
                check_size(frame.width, frame.height)
                yield Frame(f"{number}", clock.at(frame.time), _displayed(frame))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import av

        try:
            with av.open(str(self._source)) as container:
                yield container
        except VlmattnError as error:
            raise InputError(f"cannot read the video {self._source}: {error}") from None
        except Warning:  # of ours, where the caller makes them errors
            raise
        except Exception as error:  # FFmpegError and, from damaged files, many others
            raise InputError(f"cannot read the video {self._source}: {error or type(error).__name__}") from error


class _Clock:
    """The one owner of times of frames: those that the source says, as far as they go on, else steps of a rate.

    Args:
        frames: whose times they are.
        header: frames per second that the source says on the whole, if it does.
    """

    def __init__(self, frames: Frames, header: Any = None) -> None:
        self._frames = frames
        known = _number(header) and _RATES[0] <= header <= _RATES[1]
        self._rate = float(frames._rate or (header if known else _RATE))
        self._moved = 0.0  # what brings a first time below 0 to 0
        self._last = -math.inf
        self._known, self._since = 0.0, 0  # last time that the source said, and frames since

    def at(self, said: float | None) -> float:
        """The time of the next frame, in seconds."""
        if said is not None and math.isfinite(said):
            if said < 0 and self._last < 0:
                self._moved = -said
                self._tell(f"times begin at {said:g} s; they are moved to begin at 0")
            if said + self._moved > self._last:
                self._known = self._last = said + self._moved
                self._since = 0
                return self._last
            self._tell(
                f"a time of {said:g} s is not after the one before; such frames follow at {self._rate:g} per second"
            )
        elif self._frames._rate is None:
            self._tell(
                f"it does not say the times of all frames; those without follow at {self._rate:g} per second (rate"
                " sets it)"
            )
        if self._last >= 0:
            self._since += 1
        self._last = self._known + self._since / self._rate
        return self._last

    def _tell(self, what: str) -> None:
        if not self._frames._told:
            self._frames._told = True
            warnings.warn(f"{self._frames._source.name}: {what}", stacklevel=2)


def _listed(folder: Path) -> list[tuple[Path, float | None]]:
    """Pictures and times of a TUM RGB-D sequence, by time."""
    found: list[tuple[float, Path]] = []
    for number, line in enumerate(lines_of(read_text(folder / _LIST)), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        time, name = [*line.split(maxsplit=1), ""][:2]
        try:
            seconds = float(time)
        except ValueError:
            seconds = math.nan
        name = name.strip()
        inside = name != "" and not os.path.isabs(name) and ".." not in Path(name).parts
        if not math.isfinite(seconds) or not inside:
            raise InputError(
                f"{folder / _LIST}:{number}: a line is 'time file' with a file in this folder, got '{line[:60]}'"
            )
        found.append((seconds, folder / name))
    if not found:
        raise InputError(f"{folder / _LIST} names no picture")
    return [(file, seconds) for seconds, file in sorted(found)]


def _named(folder: Path) -> list[tuple[Path, float | None]]:
    """The pictures of a folder, by time if their names say it, else in natural order."""
    try:
        files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES]
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from None
    if not files:
        raise InputError(f"no pictures in {folder}; known: {', '.join(SUFFIXES)}")
    times = _times_of([file.stem for file in files])
    without = sorted(file.name for file, time in zip(files, times, strict=True) if time is None)
    if 0 < len(without) < len(files):
        raise InputError(
            f"{folder}: {without[0]} has no time in its name, as {len(files) - len(without)} others have"
            f" ({len(without)} of {len(files)} have none); move such files elsewhere"
        )
    return sorted(zip(files, times, strict=True), key=lambda pair: (pair[1] or 0.0, _natural(pair[0])))


def _times_of(stems: list[str]) -> list[float | None]:
    """Seconds that file names say: with a decimal point, or in nano-, micro- or milliseconds since 1970."""
    if any(re.fullmatch(r"\d+\.\d+", stem) for stem in stems):
        return [float(stem) if re.fullmatch(r"\d+(\.\d+)?", stem) else None for stem in stems]
    unit = _SINCE_1970.get(len(stems[0]))
    same = len(set(map(len, stems))) == 1 and all(re.fullmatch(r"[1-9]\d*", stem) for stem in stems)
    return [int(stem) * unit if same and unit else None for stem in stems]


def _displayed(frame: Any) -> Image.Image:
    """A frame of a video, turned as the file says: phones store pictures as the sensor has them."""
    picture: Image.Image = frame.to_image()
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(float)
    most = max(abs(a), abs(b), abs(c), abs(d))
    turn = _TURNS.get(tuple(round(value / most) for value in (a, b, c, d))) if most else None  # to whole quarter turns
    return picture if turn is None else picture.transpose(turn)


def _natural(file: Path) -> list[tuple[int, float, str]]:
    words = re.split(r"(\d+(?:\.\d+)?)", file.stem)
    return [(0, float(word), "") if number % 2 else (1, 0.0, word) for number, word in enumerate(words)]


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def _number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
