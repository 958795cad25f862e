"""Umeyama, ATE and RPE against evo; TUM and PLY files; frames from folders and videos."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from true_poses import walk

from vlmattn.errors import InputError, OptionError
from vlmattn.tracking import Frames, Trajectory, fit, metrics, read_tum, write_ply, write_tum
from vlmattn.tracking.files import quaternions, rotations
from vlmattn.tracking.rooms import rotation


def pair(seed=0, frames=40, noise=0.05):
    """A true walk, and a noisy one in another world."""
    draw = torch.Generator().manual_seed(seed)
    real = walk(frames, seed)
    turn = rotation(*torch.randn(3, generator=draw, dtype=torch.float64))
    told = real.clone()
    told[:, :3, 3] = 0.4 * (real[:, :3, 3] + noise * torch.randn(frames, 3, generator=draw).double()) @ turn.T + 2
    wobble = rotation(*(noise * torch.randn(3, frames, generator=draw, dtype=torch.float64)))
    told[:, :3, :3] = turn @ real[:, :3, :3] @ wobble
    return told.numpy(), real.numpy()


def evo_paths(told, real):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        core = pytest.importorskip("evo.core.metrics")
        trajectory = pytest.importorskip("evo.core.trajectory")
    return core, trajectory.PosePath3D(poses_se3=list(told)), trajectory.PosePath3D(poses_se3=list(real))


@pytest.mark.parametrize("align", ["sim3", "se3", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_ate_and_rpe_equal_evo(align, seed):
    told, real = pair(seed)
    core, ours, theirs = evo_paths(told, real)
    if align != "none":
        ours.align(theirs, correct_scale=align == "sim3")
    evo = core.APE(core.PoseRelation.translation_part)
    evo.process_data((theirs, ours))
    found = metrics.ate(told, real, align)
    np.testing.assert_allclose(found.values, evo.error, rtol=0, atol=1e-9)
    for name in ("rmse", "mean", "median", "max"):
        assert getattr(found, name) == pytest.approx(evo.get_statistic(core.StatisticsType[name]), abs=1e-9)
    for delta in (1, 3):
        for every_pair in (False, True):
            for part, relation in (("translation", "translation_part"), ("rotation", "rotation_angle_deg")):
                evo = core.RPE(core.PoseRelation[relation], delta, core.Unit.frames, all_pairs=every_pair)
                evo.process_data((theirs, ours))
                found = metrics.rpe(told, real, delta, part, align, every_pair)
                np.testing.assert_allclose(found.values, evo.error, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [True, False])
def test_umeyama_equals_evo(scale):
    geometry = pytest.importorskip("evo.core.geometry")
    told, real = pair(7)
    turn, shift, size = geometry.umeyama_alignment(told[:, :3, 3].T, real[:, :3, 3].T, scale)
    found = metrics.umeyama(told[:, :3, 3], real[:, :3, 3], scale)
    assert found[0] == pytest.approx(size, abs=1e-9)
    np.testing.assert_allclose(found[1], turn, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found[2], shift, rtol=0, atol=1e-9)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.integers(4, 30))
def test_umeyama_undoes_any_similarity(seed, scale, count):
    draw = np.random.default_rng(seed)
    points = draw.normal(size=(count, 3))
    turn = rotation(*torch.from_numpy(draw.normal(size=3))).numpy()
    moved = scale * points @ turn.T + draw.normal(size=3)
    size, back, shift = metrics.umeyama(moved, points)
    assert size == pytest.approx(1 / scale, rel=1e-6)
    np.testing.assert_allclose(size * moved @ back.T + shift, points, atol=1e-6)
    np.testing.assert_allclose(back, turn.T, atol=1e-6)


def test_a_mirrored_path_is_not_matched_by_a_reflection():
    told, _ = pair()
    mirrored = told.copy()[:, :3, 3] * [1, 1, -1]
    _, turn, _ = metrics.umeyama(told[:, :3, 3], mirrored)
    assert np.linalg.det(turn) == pytest.approx(1)


@pytest.mark.parametrize(
    "points",
    [
        np.zeros((5, 3)),
        np.linspace(0, 1, 6)[:, None] * [1.0, 2.0, 3.0],
        np.linspace(3, 4, 9)[:, None] * [0.3, 0.1, 7.0] + 5,
    ],
)
def test_straight_lines_are_refused(points):
    with pytest.raises(InputError, match=r"straight line.*align='none'"):
        metrics.umeyama(points, points)


def test_bad_trajectories():
    told, real = pair()
    with pytest.raises(InputError, match="40 and 39 poses"):
        metrics.ate(told, real[1:])
    with pytest.raises(InputError, match="3 points or more"):
        metrics.ate(told[:2], real[:2])
    with pytest.raises(InputError, match="NaN"):
        metrics.ate(told * np.nan, real)
    with pytest.raises(InputError, match="poses must be"):
        metrics.ate(told[:, :3], real)
    with pytest.raises(OptionError, match="sim3, se3 or none"):
        metrics.ate(told, real, "sim")
    with pytest.raises(InputError, match="delta must be 1 to 39"):
        metrics.rpe(told, real, 40)


def test_associate():
    here, there = metrics.associate([0.0, 0.1, 0.2, 5.0], [0.105, 0.0, 0.3])
    assert here.tolist() == [1, 0]  # in the order of the shorter one
    assert there.tolist() == [0, 1]
    with pytest.raises(InputError, match=r"within 0.02 s"):
        metrics.associate([0.0], [1.0])


def test_tum_round_trip(tmp_path):
    told, _ = pair()
    write_tum(tmp_path / "deep" / "path.txt", Trajectory(np.arange(40) / 30, told))
    lines = (tmp_path / "deep" / "path.txt").read_text().splitlines()
    assert lines[0].startswith("#")
    assert len(lines[1].split()) == 8
    back = read_tum(tmp_path / "deep" / "path.txt")
    np.testing.assert_allclose(back.poses, told, atol=1e-8)
    np.testing.assert_allclose(back.times, np.arange(40) / 30, atol=1e-6)
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["path.txt"]  # nothing half-written


def test_tum_is_read_by_evo(tmp_path):
    interface = pytest.importorskip("evo.tools.file_interface")
    told, _ = pair()
    write_tum(tmp_path / "path.txt", Trajectory(np.arange(40.0), told))
    read = interface.read_tum_trajectory_file(str(tmp_path / "path.txt"))
    np.testing.assert_allclose(np.stack(read.poses_se3), told, atol=1e-8)


@pytest.mark.parametrize("line", ["1 2 3", "0 0 0 0 0 0 0 0", "0 0 0 nan 0 0 0 1", "a b c d e f g h"])
def test_bad_tum_lines_are_named(tmp_path, line):
    (tmp_path / "path.txt").write_text(f"# ok\n0 0 0 0 0 0 0 1\n{line}\n")
    with pytest.raises(InputError, match=r"path.txt:3: a TUM line"):
        read_tum(tmp_path / "path.txt")
    with pytest.raises(InputError, match="cannot read"):
        read_tum(tmp_path / "none.txt")


@settings(max_examples=60)
@given(st.lists(st.floats(-4, 4), min_size=3, max_size=3))
def test_quaternions_are_the_rotations(angles):
    turn = rotation(*torch.tensor(angles, dtype=torch.float64)[:, None]).numpy()
    pose = np.eye(4)[None].copy()
    pose[:, :3, :3] = turn
    q = quaternions(pose)
    assert np.linalg.norm(q) == pytest.approx(1)
    assert q[0, 3] >= 0
    np.testing.assert_allclose(rotations(q), turn, atol=1e-9)


def test_half_turns_have_quaternions():
    for axis in range(3):
        turn = -np.eye(3)
        turn[axis, axis] = 1
        pose = np.eye(4)[None].copy()
        pose[:, :3, :3] = turn
        np.testing.assert_allclose(rotations(quaternions(pose))[0], turn, atol=1e-12)


def test_ply(tmp_path):
    points = np.arange(12.0).reshape(4, 3)
    write_ply(tmp_path / "cloud.ply", points, np.tile([0.0, 0.5, 1.0], (4, 1)))
    header, body = (tmp_path / "cloud.ply").read_bytes().split(b"end_header\n")
    assert b"element vertex 4" in header
    table = np.frombuffer(body, dtype=[("place", "<f4", 3), ("colour", "u1", 3)])
    np.testing.assert_allclose(table["place"], points)
    assert table["colour"][0].tolist() == [0, 128, 255]
    with pytest.raises(InputError, match="both be"):
        write_ply(tmp_path / "cloud.ply", points, points[:2])


def grey(number):
    return Image.fromarray(np.full((12, 16, 3), number * 20, np.uint8))


def test_folders_are_read_in_natural_order(tmp_path):
    for number in (1, 2, 10):
        grey(number).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    frames = Frames(tmp_path, rate=10)
    assert len(frames) == 3
    assert [frame.name for frame in frames] == ["frame1.png", "frame2.png", "frame10.png"]
    assert [frame.seconds for frame in frames] == pytest.approx([0, 0.1, 0.2])
    assert [frame.name for frame in Frames(tmp_path, every=2)] == ["frame1.png", "frame10.png"]
    assert len(Frames(tmp_path, every=2)) == 2


def test_times_in_file_names_are_used(tmp_path):
    for time in ("1305031102.175304", "1305031102.211214"):
        grey(3).save(tmp_path / f"{time}.png")
    assert [frame.seconds for frame in Frames(tmp_path)] == [1305031102.175304, 1305031102.211214]


def test_animations_and_videos(tmp_path):
    pictures = [grey(number) for number in range(5)]
    pictures[0].save(tmp_path / "walk.gif", save_all=True, append_images=pictures[1:], duration=50)
    frames = list(Frames(tmp_path / "walk.gif"))
    assert len(frames) == len(Frames(tmp_path / "walk.gif")) == 5
    assert [frame.seconds for frame in frames] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "walk.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width, stream.height, stream.pix_fmt = 16, 12, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    video = list(Frames(tmp_path / "walk.mp4"))
    assert len(video) == len(Frames(tmp_path / "walk.mp4")) == 5
    assert [frame.seconds for frame in video] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert abs(np.asarray(video[4].picture).mean() - 80) < 6


def test_bad_sources(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such folder or video"):
        Frames(tmp_path / "none")
    with pytest.raises(InputError, match="no pictures in"):
        Frames(tmp_path)
    with pytest.raises(InputError, match="every must be"):
        Frames(tmp_path, every=0)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"cannot read the picture.*broken.png"):
        list(Frames(tmp_path))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install av"):
        Frames(tmp_path / "broken.mp4")
    monkeypatch.undo()
    pytest.importorskip("av")
    with pytest.raises(InputError, match="cannot read the video"):
        list(Frames(tmp_path / "broken.mp4"))


def test_fit():
    assert fit(Image.new("RGB", (640, 480)), 308, 14).size == (308, 224)
    assert fit(Image.new("L", (16, 12)), None, 4).size == (16, 12)
    assert fit(Image.new("RGB", (3, 1000)), 28, 14).size == (14, 28)
    turned = Image.new("I;16", (640, 480), 65535)
    turned.getexif()[0x0112] = 6
    assert fit(turned, 308, 14).size == (224, 308)
    assert fit(turned, 308, 14).getpixel((0, 0)) == (255, 255, 255)
    for odd in (0, -1, 1.5, float("nan"), "308", True):
        with pytest.raises(InputError, match="longest must be"):
            fit(turned, odd, 14)
    with pytest.raises(InputError, match="are more than"):
        fit(turned, 100_000, 14)
    with pytest.raises(InputError, match="a picture is a PIL image"):
        fit("a.png", 308, 14)
