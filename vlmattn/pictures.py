"""Pictures from files: one reader with one manner for everything that users give.

A picture comes out upright, in RGB with 8 bits a channel, as from ``transformers.image_utils.load_image``: alpha is
dropped and the colours beneath stay. Unlike there, more than 8 bits are scaled to 8 instead of cut off at 255.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlmattn.errors import InputError, VlmattnError
from vlmattn.files import path_text
from vlmattn.texts import read_bytes

#: How files of pictures end.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
MOST_PIXELS = 2**30 // 12  # a quarter of a GiB in RGB, where Pillow warns of a decompression bomb
_WHAT = "the picture"
_ORIENTATION = 0x0112  # tag of EXIF
_TURNS = {  # what brings a picture of this orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DRAWINGS = ("EPS", "WMF")  # Pillow starts other programs to draw them
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # one channel of more than 8 bits
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
_OPENING = threading.Lock()  # what warnings become is a matter of the whole process


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file, upright, in RGB; of an animation the first frame.

    Raises:
        InputError: there is no such file, it is no picture, damaged, or has more than ``MOST_PIXELS`` pixels.
    """
    content = read_bytes(path, what=_WHAT)
    with _named(path):
        return decode_picture(content)


def decode_picture(content: bytes) -> Image.Image:
    """The picture in the bytes of a file; as ``open_picture``."""
    with _refusing(), _opened(content) as picture:
        return upright(picture)


def upright(picture: Image.Image) -> Image.Image:
    """A Pillow picture as ``open_picture`` gives it: turned by its EXIF orientation once and for all, in RGB.

    Raises:
        InputError: it is damaged, too large, or has values without a known white.
    """
    with _refusing():
        check_size(*picture.size)
        if picture.format in _DRAWINGS:
            raise InputError(f"{picture.format} is a drawing, not a picture; save it as PNG first")
        picture.load()
        turn = _TURNS.get(_orientation(picture))  # after loading: some formats turn themselves, and then say so no more
        colours = _grey(picture) if picture.mode in _DEEP else picture
        if colours.mode == "La":
            colours = colours.convert("LA")
        colours = colours.convert("RGB")
        if turn is not None:
            colours = colours.transpose(turn)
        colours.info = {}
        return colours


def check_size(width: int, height: int) -> None:
    """
    Raises:
        InputError: no pixels, or more than ``MOST_PIXELS``.
    """
    if width * height == 0:
        raise InputError("it has no pixels")
    if width * height > MOST_PIXELS:
        raise InputError(f"{width}x{height} pixels are more than {MOST_PIXELS}; make it smaller first")


class MovingPicture:
    """The frames of an animated picture (GIF, APNG, WebP, AVIF) or of the pages of a TIFF; one of a still picture.

    Args:
        path: of the file.

    Raises:
        InputError: as for ``open_picture``, here or at the frame that is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path, self._content = path, read_bytes(path, what=_WHAT)
        with _named(path), _refusing(), _opened(self._content) as moving:
            self._count = int(getattr(moving, "n_frames", 1))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Image.Image, float | None]]:
        """Frames, and how many seconds each is shown; None where the file does not say, or says none."""
        with _named(self._path), _refusing(), _opened(self._content) as moving:
            for number in range(self._count):
                moving.seek(number)
                frame = upright(moving)
                milliseconds: Any = moving.info.get("duration")
                told = isinstance(milliseconds, (int, float)) and 0 < milliseconds < float("inf")
                yield frame, float(milliseconds) / 1000 if told else None


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """Only the header is read here."""
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = Image.open(io.BytesIO(content))
    with picture:
        check_size(*picture.size)
        yield picture


@contextmanager
def _refusing() -> Iterator[None]:
    """What Pillow raises at a damaged or hostile file, nearly every kind of exception, as one line."""
    try:
        yield
    except VlmattnError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"it has more than {MOST_PIXELS} pixels; make it smaller first") from None
    except UnidentifiedImageError:
        raise InputError("it is no picture of a known kind") from None
    except MemoryError:
        raise InputError("memory is short for it") from None
    except Exception as error:
        raise InputError(f"it is damaged, or of a kind that cannot be read ({error or type(error).__name__})") from None


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"cannot read {_WHAT} {path_text(path)}: {error}") from None


def _orientation(picture: Image.Image) -> Any:
    try:
        return picture.getexif().get(_ORIENTATION)
    except Exception:  # damaged metadata say nothing of the picture
        return None


def _grey(picture: Image.Image) -> Image.Image:
    """A channel of more than 8 bits, in 8."""
    values = np.asarray(picture)
    tags = getattr(picture, "tag_v2", {})
    inverted = tags.get(_PHOTOMETRIC) == 0  # 0 is white
    if picture.mode.startswith("I;16"):
        levels = np.arange(65536)  # a table is several times faster than arithmetic on every pixel
        return Image.fromarray(_scaled(levels, 2.0 ** tags.get(_BITS, (16,))[0] - 1, inverted)[values])
    if picture.format in ("PNG", "PPM"):  # they have at most 16 bits, which some versions of Pillow call "I"
        white = 65535.0
    else:
        white = _white(float(values.min()), float(values.max()), picture.mode == "F")
    return Image.fromarray(_scaled(values, white, inverted))


def _scaled(values: Any, white: float, inverted: bool) -> Any:
    share = values.astype(np.float32).clip(0, white) / np.float32(white)
    return ((1 - share if inverted else share) * 255 + 0.5).astype(np.uint8)


def _white(low: float, high: float, real: bool) -> float:
    """Of a picture whose kind does not say: the first of 1 (real numbers only), 255 and 65535 that no value exceeds."""
    if np.isfinite([low, high]).all():
        for white in (1.0, 255.0, 65535.0):
            if high <= white and (real or white > 1):
                return white
    raise InputError(
        f"it holds values from {low:g} to {high:g}, of which none is known to be white; save it in 8 or 16 bits"
    )
