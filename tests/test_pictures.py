"""One reader of pictures: upright, RGB, 8 bits; whatever is wrong with a file is one line."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError, features
from transformers.image_utils import load_image

from vlmattn.cli.inspection import _open
from vlmattn.errors import InputError
from vlmattn.evals.suites.files import ImageFiles
from vlmattn.pictures import MOST_PIXELS, MovingPicture, decode_picture, open_picture, upright
from vlmattn.tracking import Frames
from vlmattn.tracking.frames import to_tensor

FORMATS = {  # and the modes of 8 bits that each can hold
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"],
    "JPEG": ["L", "RGB", "CMYK"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "GIF": ["L", "P", "RGB", "RGBA"],
    "PPM": ["1", "L", "RGB"],
}
if features.check("webp"):
    FORMATS["WEBP"] = ["RGB", "RGBA"]
WITH_EXIF = ("PNG", "TIFF", "JPEG", "WEBP")
SEEDS, SIDES, ORIENTATIONS = st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(0, 9)


def drawn(mode, width, height, seed):
    """A picture of random pixels, and of random transparency where the mode has some."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), np.uint8)
    picture = Image.fromarray(pixels, "RGBA")
    if mode in ("RGBA", "LA"):
        return picture.convert(mode)
    picture = picture.convert("RGB").convert(mode)
    if mode == "P" and seed % 2:
        picture.info["transparency"] = 3
    return picture


def stored(picture, kind, orientation=0):
    options = {}
    if kind in WITH_EXIF and orientation:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([(kind, mode) for kind in FORMATS for mode in FORMATS[kind]]), SIDES, SIDES, SEEDS, ORIENTATIONS)
def test_eight_bits_are_read_as_transformers_reads_them(kind, width, height, seed, orientation):
    content = stored(drawn(kind[1], width, height, seed), kind[0], orientation)
    found = decode_picture(content)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(load_image(Image.open(io.BytesIO(content)))))
    np.testing.assert_array_equal(np.asarray(upright(found)), np.asarray(found))  # nothing is turned twice


TURNED = {  # where the first pixel of the first row and the last of it come to lie: (row, column), -1 the last
    1: ((0, 0), (0, -1)),
    2: ((0, -1), (0, 0)),
    3: ((-1, -1), (-1, 0)),
    4: ((-1, 0), (-1, -1)),
    5: ((0, 0), (-1, 0)),
    6: ((0, -1), (-1, -1)),
    7: ((-1, -1), (0, -1)),
    8: ((-1, 0), (0, 0)),
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "TIFF", "PPM"]), SIDES, SIDES, SEEDS, st.sampled_from(sorted(TURNED)))
def test_sixteen_bits_become_eight(kind, width, height, seed, orientation):
    deep = np.random.default_rng(seed).integers(0, 65536, (height, width), np.uint16)
    deep[0, 0], deep[0, -1] = 65535, 0 if width > 1 else 65535
    found = np.asarray(decode_picture(stored(Image.fromarray(deep), kind, orientation)))
    if kind not in WITH_EXIF:
        orientation = 1
    assert found.shape == ((height, width, 3) if orientation < 5 else (width, height, 3))
    assert (found[..., 0] == found[..., 1]).all()
    assert np.array_equal(np.sort(found[..., 0], None), np.sort(np.floor(deep / 257 + 0.5).astype(np.uint8), None))
    first, last = TURNED[orientation]
    assert found[first][0] == 255
    assert found[last][0] == (0 if width > 1 else 255)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16)),
        Image.frombytes("I;16B", (60, 40), np.linspace(0, 65535, 2400).astype(">u2").tobytes()),
        Image.fromarray(np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.int32)),
        Image.fromarray(np.linspace(0, 255, 2400).reshape(40, 60).astype(np.int32)),
        Image.fromarray(np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.float32)),
        Image.fromarray(np.linspace(0, 255, 2400).reshape(40, 60).astype(np.float32)),
        Image.fromarray(np.linspace(0, 1, 2400).reshape(40, 60).astype(np.float32)),
    ],
    ids=["I;16", "I;16B", "I-16", "I-8", "F-16", "F-8", "F-1"],
)
def test_a_ramp_from_black_to_white_is_one(picture):
    found = np.asarray(upright(picture))
    assert found.mean() == pytest.approx(127.5, abs=0.6)
    assert (found.min(), found.max()) == (0, 255)


def test_a_dark_picture_of_sixteen_bits_stays_dark():
    for kind in ("PNG", "PPM", "TIFF"):
        assert np.asarray(decode_picture(stored(Image.fromarray(np.full((4, 4), 200, np.uint16)), kind))).max() == 1


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_becomes_rgb(mode):
    assert upright(Image.new(mode, (3, 2))).mode == "RGB"


@pytest.mark.parametrize("values", [[0, 1e6], [0, np.inf], [np.nan, 0]])
def test_values_without_a_white_are_refused(values):
    with pytest.raises(InputError, match="none is known to be white"):
        upright(Image.fromarray(np.array([values], np.float32)))


def test_alpha_is_dropped_and_the_colour_beneath_stays():
    clear = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
    assert upright(clear).getpixel((0, 0)) == (200, 100, 50)


def test_every_reader_turns_a_photo_and_keeps_its_depth(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30, 0] = 255
    (tmp_path / "1.jpg").write_bytes(stored(Image.fromarray(pixels), "JPEG", 6))
    ramp = np.linspace(0, 65535, 2400).reshape(40, 60).astype(np.uint16)
    (tmp_path / "2.png").write_bytes(stored(Image.fromarray(ramp), "PNG", 6))
    names = ("1.jpg", "2.png")
    readers = {
        "reader": [open_picture(tmp_path / name) for name in names],
        "suites": ImageFiles(tuple(tmp_path / name for name in names))(),
        "inspect": [_open(tmp_path / name) for name in names],
        "track": [frame.picture for frame in Frames(tmp_path, rate=1)],
    }
    for pictures in readers.values():
        assert [picture.size for picture in pictures] == [(40, 60)] * 2
        photo, deep = map(np.asarray, pictures)
        assert photo[:29, :, 0].min() > 240  # its left half is above
        assert photo[32:].max() < 15
        assert deep.mean() == pytest.approx(127.5, abs=0.5)
    for name in names:  # a path, and the picture itself
        assert to_tensor(str(tmp_path / name)).equal(to_tensor(Image.open(tmp_path / name)))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([*FORMATS, "ICO", "PCX", "TGA", "SGI", "JPEG2000", "DDS", "QOI", "AVIF"]),
    SEEDS,
    st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), max_size=6),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_a_damaged_file_is_a_picture_or_one_line(kind, seed, changes, length, cut):
    try:
        content = bytearray(stored(drawn("RGB", 20, 12, seed), kind))
    except (KeyError, OSError):  # this Pillow cannot write it
        return
    for place, value in changes:
        content[place % len(content)] = value
    if cut:
        del content[length % len(content) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(InputError):
            assert decode_picture(bytes(content)).mode == "RGB"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["GIF", "PNG", "TIFF", "WEBP"]),
    st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), max_size=4),
)
def test_a_damaged_animation_is_frames_or_one_line(tmp_path_factory, kind, changes):
    if kind == "WEBP" and not features.check("webp"):
        return
    first, *others = (drawn("RGB", 9, 7, seed) for seed in range(3))
    whole = io.BytesIO()
    first.save(whole, kind, save_all=True, append_images=others)
    content = bytearray(whole.getvalue())
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path_factory.mktemp("moving") / "a"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(InputError):
            moving = MovingPicture(path)
            assert len(list(moving)) == len(moving)


@pytest.mark.parametrize(
    "raised",
    [
        UnidentifiedImageError("x"),
        IndexError("x"),
        SyntaxError("x"),
        struct.error("x"),
        EOFError(),
        OverflowError("x"),
        MemoryError(),
        zlib.error("x"),
        RuntimeError("x"),
        NotImplementedError(),
        RecursionError("x"),
        UnicodeDecodeError("ascii", b"x", 0, 1, "x"),
        KeyError("x"),
        ZeroDivisionError("x"),
        AssertionError(),
        Image.DecompressionBombError("x"),
        Image.DecompressionBombWarning("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_pillow_raises_is_one_line(tmp_path, monkeypatch, raised):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")

    def breaks(*_):
        raise raised

    for method in ("load", "seek"):
        with monkeypatch.context() as patch:
            patch.setattr("PIL.GifImagePlugin.GifImageFile." + method, breaks)
            with pytest.raises(InputError, match=r"cannot read the picture .*a\.gif: \w"):
                list(MovingPicture(tmp_path / "a.gif"))
    monkeypatch.setattr("PIL.Image.open", breaks)
    with pytest.raises(InputError, match=r"cannot read the picture .*a\.gif: \w"):
        open_picture(tmp_path / "a.gif")


def claiming(kind, width, height):
    """A small file whose header claims a size."""
    if kind == "GIF":
        return (
            b"GIF89a"
            + struct.pack("<HH", width, height)
            + b"\0\0\0,"
            + struct.pack("<HHHH", 0, 0, width, height)
            + b"\0\2"
        )
    if kind == "BMP":
        return (
            b"BM"
            + struct.pack("<IHHI", 54, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
        )
    if kind == "PPM":
        return f"P6 {width} {height} 255\n".encode()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )


@pytest.mark.parametrize("limit", [None, 2**26])
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["PNG", "BMP", "PPM", "GIF"]), st.floats(1.001, 20))
def test_a_size_bomb_is_refused_before_memory_is_spent(limit, kind, times):
    side = min(int((MOST_PIXELS * times) ** 0.5) + 1, 65535)
    was, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limit  # another library may have set Pillow's own limit
    tracemalloc.start()
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            with pytest.raises(InputError, match=rf"more than {MOST_PIXELS}"):
                decode_picture(claiming(kind, side, side))
        assert not heard
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
        Image.MAX_IMAGE_PIXELS = was


def test_files_that_are_none_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    (tmp_path / "drawing.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    odd = ["pipe.png", "folder.png", "empty.png", "drawing.png", "none.png", "n\0l.png", "a" * 5_000, "\ud800.png"]
    for name in [*(tmp_path / name for name in odd), "/dev/zero", "/dev/null"]:
        for read in (open_picture, MovingPicture):
            with pytest.raises(InputError, match="cannot read the picture"):
                list(read(name))
    for name in odd:
        with pytest.raises(InputError):
            ImageFiles((tmp_path / name,))()


def test_damaged_metadata_do_not_hide_a_picture():
    content = stored(drawn("RGB", 8, 8, 1), "JPEG", 6)
    start = content.index(b"Exif\0\0") + 6
    damaged = content[:start] + b"\xff" * 8 + content[start + 8 :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode_picture(damaged).size == (8, 8)


def test_the_first_frame_of_an_animation_is_its_picture(tmp_path):
    for kind in ("GIF", "PNG", "TIFF", "WEBP", "AVIF"):
        if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
            continue
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
        frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:], duration=70)
        moving = MovingPicture(tmp_path / "a")
        assert len(moving) == 3
        pictures, shown = zip(*moving, strict=True)
        told = [np.asarray(picture)[4, 4].astype(int) for picture in (open_picture(tmp_path / "a"), *pictures)]
        for found, wanted in zip(told, [(255, 0, 0), (255, 0, 0), (0, 0, 255), (0, 255, 0)], strict=True):
            assert np.abs(found - wanted).max() < 8
        assert shown == ((None,) * 3 if kind == "TIFF" else pytest.approx((0.07,) * 3))
