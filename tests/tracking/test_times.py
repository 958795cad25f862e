"""The times of frames: the source's where it says them; made up in the open, and always going on, where it does not."""

from __future__ import annotations

import math
import os
import struct
import warnings
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmattn.errors import InputError
from vlmattn.tracking import Frames

BLACK = Image.new("RGB", (4, 4))


def times(source, **options):
    """Times of all frames, and what was said about them."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        frames = Frames(source, **options)
        found = [frame.seconds for frame in frames]
        assert [frame.seconds for frame in frames] == found  # and nothing is said twice
    return found, [str(warning.message) for warning in heard]


@contextmanager
def video_of(stamps, rate, path):
    """A stand-in for PyAV whose frames have these presentation times, which no writer would write."""
    path.touch()
    frames = [SimpleNamespace(time=t, width=4, height=4, side_data=(), to_image=lambda: BLACK) for t in stamps]

    @contextmanager
    def opened(_):
        stream = SimpleNamespace(average_rate=rate, frames=len(frames))
        yield SimpleNamespace(streams=SimpleNamespace(video=[stream]), decode=lambda video: iter(frames))

    with mock.patch("av.open", opened):
        yield path


STAMPS = st.one_of(st.none(), st.sampled_from([0.0, 0.04, 0.08, -0.04, math.nan, math.inf]), st.floats(-1, 3))
GOING_ON = st.lists(st.floats(0, 1e9), min_size=1, max_size=12, unique=True).map(sorted)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.lists(STAMPS, min_size=1, max_size=12), GOING_ON),
    st.sampled_from([None, 12.5, 0, math.nan]),
    st.sampled_from([None, 10.0]),
)
def test_times_of_videos(tmp_path_factory, stamps, header, rate):
    pytest.importorskip("av")
    with video_of(stamps, header, tmp_path_factory.mktemp("video") / "a.mp4") as path:
        found, said = times(path, rate=rate)
    assert len(found) == len(stamps)
    assert found[0] >= 0
    assert all(math.isfinite(time) for time in found)
    assert all(after > before for before, after in pairwise(found))
    given_ = [stamp is not None and math.isfinite(stamp) for stamp in stamps]
    numbers = [stamp for stamp, known in zip(stamps, given_, strict=True) if known]
    goes_on = all(after > before for before, after in pairwise(numbers))
    if all(given_) and goes_on:
        moved = max(0.0, -stamps[0])
        assert found == [stamp + moved for stamp in stamps]
        assert len(said) == (moved > 0)
    elif not any(given_):
        step = 1 / (rate or (12.5 if header == 12.5 else 30))
        assert found == pytest.approx([number * step for number in range(len(found))])
        assert len(said) == (rate is None)
    else:
        assert len(said) <= 1
        if not goes_on or rate is None:
            assert len(said) == 1
    if numbers and given_[0] and stamps[0] >= 0:  # known times stay wherever they can
        before = -1.0
        for stamp, known, time in zip(stamps, given_, found, strict=True):
            if known and stamp > before:
                assert time == stamp
            before = time


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.sampled_from([None, 5.0]))
def test_a_delay_of_none_is_not_a_time(tmp_path_factory, delays, rate):
    """Delays of GIFs are hundredths of a second; 0 means that the file does not say."""
    path = tmp_path_factory.mktemp("gif") / "a.gif"
    pictures = [Image.new("RGB", (4, 4), (9 * number, 200, 0)) for number in range(len(delays))]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[10 * delay for delay in delays])
    found, said = times(path, rate=rate)
    steps = [delay / 100 if delay else 1 / (rate or 30) for delay in delays]
    assert found == pytest.approx(np.cumsum([0.0, *steps[:-1]]).tolist())
    assert len(said) == (rate is None and 0 in delays[:-1])


def test_a_variable_rate_is_kept(tmp_path):
    av = pytest.importorskip("av")
    stamps = [0, 33, 66, 500, 900, 1000]
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for stamp in stamps:
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for rate in (None, 10):
        found, said = times(tmp_path / "a.mp4", rate=rate)
        assert found == pytest.approx([stamp / 1000 for stamp in stamps], abs=1e-3)
        assert not said


_ONE = 1 << 16
MATRICES = {  # (a, b, c, d) of a display matrix, and the corners as shown: upper left, upper right, lower left, lower right
    (1, 0, 0, 1): "rgbw",
    (-1, 0, 0, 1): "grwb",
    (-1, 0, 0, -1): "wbgr",
    (1, 0, 0, -1): "bwrg",
    (0, 1, -1, 0): "brwg",
    (0, -1, 1, 0): "gwrb",
    (0, 1, 1, 0): "rbgw",
    (0, -1, -1, 0): "wgbr",
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_videos_come_upright(tmp_path, matrix):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:], picture[24:, :32], picture[24:][:, 32:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        255,
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    header = content.find(b"tkhd") + 4  # version, flags, then times, track, duration, and 16 bytes up to the matrix
    place = header + (40 if content[header] == 0 else 52)
    a, b, c, d = (_ONE * value for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    (frame,) = Frames(path)
    wide, high = frame.picture.size
    assert (wide, high) == ((64, 48) if matrix[0] else (48, 64))
    corners = [(8, 8), (wide - 8, 8), (8, high - 8), (wide - 8, high - 8)]
    names = {(True, False, False): "r", (False, True, False): "g", (False, False, True): "b", (True,) * 3: "w"}
    assert "".join(names[tuple(v > 128 for v in frame.picture.getpixel(at))] for at in corners) == MATRICES[matrix]


def folder_of(folder, names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        BLACK.save(folder / name)
    return folder


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1_000_000_000_000_000, 1_999_999_999_999_999), min_size=2, max_size=6, unique=True))
def test_times_in_names_are_kept(tmp_path_factory, microseconds):
    """As in TUM RGB-D (seconds, a whole one without its zeros too) and EuRoC (nanoseconds)."""
    wanted = [number / 1e6 for number in sorted(microseconds)]
    root = tmp_path_factory.mktemp("names")
    forms = {
        "tum": [f"{number // 10**6}.{number % 10**6:06}" for number in microseconds],
        "short": [f"{number / 10**6:.6f}".rstrip("0").rstrip(".") for number in microseconds] + ["2500000000.5"],
        "nano": [f"{number}000" for number in microseconds],
        "micro": [str(number) for number in microseconds],
    }
    for form, stems in forms.items():
        found, said = times(folder_of(root / form, [f"{stem}.png" for stem in stems]), rate=7)
        assert found == pytest.approx([*wanted, *([2500000000.5] if form == "short" else [])], abs=1e-6)
        assert not said


def test_one_name_without_a_time_does_not_take_it_from_the_others(tmp_path):
    folder_of(tmp_path, ["1305031102.175304.png", "1305031102.211214.png", "cover.png"])
    with pytest.raises(InputError, match=r"cover\.png has no time in its name, as 2 others have"):
        Frames(tmp_path)


def test_numbers_of_frames_are_not_times(tmp_path):
    folder = folder_of(tmp_path / "a", ["1.png", "2.png", "10.png"])
    assert times(folder, rate=10) == (pytest.approx([0, 0.1, 0.2]), [])
    found, said = times(folder)
    assert found == pytest.approx([0, 1 / 30, 2 / 30])
    assert len(said) == 1
    assert "no times" in said[0]
    assert "30 per second" in said[0]
    found, said = times(folder_of(tmp_path / "b", ["1.5.png", "1.50.png", "1.75.png"]))
    assert found == pytest.approx([1.5, 1.5 + 1 / 30, 1.75])
    assert "not after the one before" in said[0]


def test_a_tum_sequence_has_a_list(tmp_path):
    folder_of(tmp_path, ["rgb/b.png", "rgb/a.png", "other.png"])
    (tmp_path / "rgb.txt").write_text(
        "# time file\r\n1305031102.25 rgb/a.png\r\n1305031102.175304  rgb/b.png\r\n", "utf-8-sig"
    )
    assert times(tmp_path, rate=3) == ([1305031102.175304, 1305031102.25], [])
    assert [frame.name for frame in Frames(tmp_path)] == ["b.png", "a.png"]
    for line in ("1.0 ../a.png", "1.0 /etc/a.png", "x rgb/a.png", "nan rgb/a.png", "1.0"):
        (tmp_path / "rgb.txt").write_text(f"0.5 rgb/b.png\n{line}\n")
        with pytest.raises(InputError, match=r"rgb\.txt:2"):
            Frames(tmp_path)
    (tmp_path / "rgb.txt").write_text("# nothing\n")
    with pytest.raises(InputError, match="names no picture"):
        Frames(tmp_path)


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf, 1e-9, 1e9, "30", True, [30]])
def test_odd_rates_are_refused(tmp_path, rate):
    folder_of(tmp_path, ["1.png"])
    with pytest.raises(InputError, match="rate must be"):
        Frames(tmp_path, rate=rate)


def test_odd_sources_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for source in (tmp_path / "pipe.mp4", "/dev/zero", "n\0l", 5, None):
        with pytest.raises(InputError):
            Frames(source)
    (tmp_path / "empty.gif").touch()
    pictures = [Image.new("RGB", (20, 20), (60 * number, 0, 0)) for number in range(4)]
    pictures[0].save(tmp_path / "whole.gif", save_all=True, append_images=pictures[1:], duration=100)
    whole = (tmp_path / "whole.gif").read_bytes()
    for length in range(0, len(whole) - 1, 7):
        (tmp_path / "cut.gif").write_bytes(whole[:length])
        with suppress(InputError):
            frames = Frames(tmp_path / "cut.gif")
            assert len(list(frames)) == len(frames) <= 4
    for every in (0, 1.5, "2"):
        with pytest.raises(InputError, match="every must be"):
            Frames(tmp_path, every=every)


def test_a_damaged_video_is_one_line(tmp_path):
    av = pytest.importorskip("av")
    (tmp_path / "sound.mp4").write_bytes(
        b"RIFF"
        + struct.pack("<I4s4sIHHIIHH4sI", 44, b"WAVE", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8, b"data", 8)
        + bytes(8)
    )
    for use in (len, list):
        with pytest.raises(InputError, match="cannot read the video"):
            use(Frames(tmp_path / "sound.mp4"))
    for raised in (ValueError("x"), EOFError(), MemoryError(), av.FFmpegError(1, "x"), OverflowError("x")):
        with mock.patch("av.open", side_effect=raised), pytest.raises(InputError, match="cannot read the video"):
            list(Frames(tmp_path / "sound.mp4"))
