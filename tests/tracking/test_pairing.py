"""Pairing by time, on odd inputs too, as evo pairs; trajectories in files as they come."""

from __future__ import annotations

import logging
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vlmattn.errors import InputError, OptionError
from vlmattn.tracking import Trajectory, read_tum, write_ply, write_tum
from vlmattn.tracking.files import quaternions, rotations
from vlmattn.tracking.metrics import associate, ate, rpe, umeyama

# Hundredths of a second, so that stamps repeat and lie as near on both sides; or microseconds.
STAMPS = st.lists(
    st.one_of(st.integers(0, 20).map(lambda n: n / 100), st.integers(0, 200_000).map(lambda n: n / 1e6)),
    min_size=1,
    max_size=14,
)
ODD = st.one_of(STAMPS, STAMPS.map(sorted), STAMPS.map(lambda run: sorted(run) * 2))


@pytest.fixture(scope="module")
def evo():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("core.sync", "core.trajectory", "core.metrics", "tools.file_interface"):
            pytest.importorskip(f"evo.{name}")
        import evo

    logging.getLogger("evo").setLevel(logging.ERROR)
    return evo


def path_at(stamps, seed):
    """A random pose for each stamp; each of equal stamps has its own."""
    draw = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (len(stamps), 1, 1))
    poses[:, :3, :3] = rotations(draw.normal(size=(len(stamps), 4)))
    poses[:, :3, 3] = draw.normal(size=(len(stamps), 3))
    return poses


def written(path, stamps, poses, form):
    """A TUM file as different programs write it."""
    lines = ["# t x y z qx qy qz qw \u2028 \u0085 \u00e9"] if form != "plain" else []
    for time, pose, turn in zip(stamps, poses, quaternions(poses), strict=True):
        lines.append(" ".join(repr(float(number)) for number in (time, *pose[:3, 3], *turn)))
    end = "\r\n" if form == "windows" else "\n"
    path.write_bytes((end.join(lines) + end).encode("utf-8-sig" if form in ("mark", "windows") else "utf-8"))


@settings(max_examples=80, deadline=None)
@given(
    ODD,
    ODD,
    st.sampled_from([0.0, 0.005, 0.02, 1.0]),
    st.sampled_from(["plain", "mark", "windows"]),
    st.integers(0, 99),
)
def test_pairs_and_errors_are_those_of_evo(tmp_path_factory, evo, told, true, most, form, seed):
    folder = tmp_path_factory.mktemp("tum")
    for name, stamps, number in (("told", told, seed), ("true", true, seed + 100)):
        written(folder / name, stamps, path_at(stamps, number), form)
    ours, ours_true = read_tum(folder / "told"), read_tum(folder / "true")
    theirs, theirs_true = (evo.tools.file_interface.read_tum_trajectory_file(str(folder / n)) for n in ("told", "true"))
    np.testing.assert_array_equal(ours.times, theirs.timestamps)
    np.testing.assert_allclose(ours.poses, np.stack(theirs.poses_se3), rtol=0, atol=1e-12)
    try:
        theirs, theirs_true = evo.core.sync.associate_trajectories(theirs, theirs_true, max_diff=most)
    except evo.core.sync.SyncException:
        with pytest.raises(InputError, match="no two time stamps"):
            associate(ours.times, ours_true.times, most)
        return
    here, there = associate(ours.times, ours_true.times, most)
    np.testing.assert_allclose(ours.poses[here], np.stack(theirs.poses_se3), rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours_true.poses[there], np.stack(theirs_true.poses_se3), rtol=0, atol=1e-12)
    shorter = here if len(ours) < len(ours_true) else there
    assert len(set(shorter.tolist())) == len(shorter)
    assume(len({*here.tolist()}) > 3 and len({*there.tolist()}) > 3)
    theirs.align(theirs_true, correct_scale=True)
    metrics = evo.core.metrics
    absolute = metrics.APE(metrics.PoseRelation.translation_part)
    relative = metrics.RPE(metrics.PoseRelation.translation_part, 1, metrics.Unit.frames)
    for metric, found in ((absolute, ate), (relative, rpe)):
        metric.process_data((theirs_true, theirs))
        np.testing.assert_allclose(
            found(ours.poses[here], ours_true.poses[there]).values, metric.error, rtol=0, atol=1e-9
        )


def test_an_exact_estimate_has_no_error_against_a_sparse_truth():
    def walk(times):
        poses = np.tile(np.eye(4), (len(times), 1, 1))
        poses[:, :3, 3] = np.stack([np.cos(3 * times), np.sin(3 * times), 0.2 * times], 1)
        return poses

    told, true = np.arange(0, 2, 0.01), np.arange(0, 2, 0.1)
    here, there = associate(told, true)
    assert len(here) == len(true) == len(set(there.tolist()))
    assert ate(walk(told)[here], walk(true)[there], "none").rmse < 1e-12
    there, here = associate(true, told)
    assert ate(walk(told)[here], walk(true)[there], "none").rmse < 1e-12


def test_many_poses_need_no_table_of_all_pairs():
    true = np.arange(30_000) / 100
    told = true[::-1] + 0.001
    tracemalloc.start()
    here, there = associate(told, true)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(here, 29_999 - there)
    assert len(here) == 30_000
    assert peak < 2**25  # 30,000 x 30,000 differences alone are 7 GB


def test_two_runs_in_one_file_stay_two(tmp_path):
    lines = [f"{time} {place} 0 0 0 0 0 1" for place, time in enumerate((0, 1, 1, 0, 1))]
    (tmp_path / "runs.txt").write_text("\n".join(lines))
    runs = read_tum(tmp_path / "runs.txt")
    assert runs.times.tolist() == [0, 1, 1, 0, 1]
    assert runs.poses[:, 0, 3].tolist() == [0, 1, 2, 3, 4]
    assert not runs.ascending
    assert Trajectory([0, 1.5, 2], np.tile(np.eye(4), (3, 1, 1))).ascending


def test_a_turn_of_any_length_is_a_rotation(tmp_path):
    wanted = rotations([[0.5, 0.5, -0.5, 0.5]])[0]
    for size in (1e-300, 1e-9, 3.0, 1e99):
        numbers = " ".join(f"{size * part!r}" for part in (0.5, 0.5, -0.5, 0.5))
        (tmp_path / "path.txt").write_text(f"0 1 2 3 {numbers}\n")
        np.testing.assert_allclose(read_tum(tmp_path / "path.txt").poses[0, :3, :3], wanted, atol=1e-12)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"\x00" * 40,
        b"",
        b"1 2 3 4 5 6 7 1e999\n",
        b"inf 0 0 0 0 0 0 1\n",
        b"1 1e200 0 0 0 0 0 1\n",
        b"\xe9 0 0 0 0 0 0 1\n",
    ],
)
def test_odd_files_are_one_line(tmp_path, content):
    (tmp_path / "path.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"path\.txt"):
        read_tum(tmp_path / "path.txt")


POSES = np.tile(np.eye(4), (5, 1, 1))
ODD_NUMBERS = [
    "poses",
    None,
    [],
    [[1, 2], [3]],
    np.array(["a"]),
    np.full((5, 4, 4), np.nan),
    POSES * 1j,
    POSES[0],
    np.full((5, 4, 4), 1e200),
    {},
]


@pytest.mark.parametrize("odd", ODD_NUMBERS, ids=range(len(ODD_NUMBERS)))
def test_odd_poses_points_and_times_are_refused(tmp_path, odd):
    for call in (
        lambda: ate(odd, POSES),
        lambda: ate(POSES, odd, "none"),
        lambda: rpe(odd, odd, align="none"),
        lambda: umeyama(odd, odd),
        lambda: associate(odd, [0.0]),
        lambda: associate([0.0], odd),
        lambda: Trajectory(odd, POSES),
        lambda: Trajectory(np.arange(5.0), odd),
        lambda: write_ply(tmp_path / "a.ply", odd, POSES[:, :3, 3]),
        lambda: write_ply(tmp_path / "a.ply", POSES[:, :3, 3], odd),
    ):
        with pytest.raises(InputError):
            call()
    assert not list(tmp_path.iterdir())


def test_odd_options_of_metrics_are_refused():
    for most in (-1, np.nan, "0.02", None):
        with pytest.raises(OptionError, match="most must be"):
            associate([0.0], [0.0], most)
    for delta in (0, -1, 1.5, "1", None):
        with pytest.raises(InputError, match="delta must be"):
            rpe(POSES, POSES, delta, align="none")
    with pytest.raises(InputError, match="a time for each pose"):
        Trajectory(np.arange(4.0), POSES)
    assert len(Trajectory(np.zeros(0), np.zeros((0, 4, 4)))) == 0


def test_times_of_today_survive_a_file(tmp_path):
    told = Trajectory(np.array([1305031102.175304, 1305031102.211214]), POSES[:2])
    write_tum(tmp_path / "path.txt", told)
    np.testing.assert_allclose(read_tum(tmp_path / "path.txt").times, told.times, rtol=0, atol=5e-7)
