"""Every pass has its own world; the tracker's stays. Measured with an oracle that tells true poses in random worlds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from true_poses import Oracle, OracleAdapter, picture, walk

from vlmattn.tracking import Interval, Similarity, Tracker, align, metrics
from vlmattn.tracking.keyframes import Angular, Azel, PoseChange, Released, Sight
from vlmattn.tracking.rooms import rotation


def followed(poses, rule=None, noise=0.0, sim3=True, seed=0, **options):
    model = Oracle(poses, noise, seed).eval()
    tracker = Tracker(model, OracleAdapter(model), rule or Interval(10), sim3, **options)
    tracks = [tracker.follow(picture(number)) for number in range(len(poses))]
    return tracker, tracks


def test_the_world_stays_over_remaps():
    poses = walk()
    tracker, tracks = followed(poses)
    assert tracker.keyframes == 6
    assert tracker.map.version == 6
    told = tracker.trajectory.poses
    assert metrics.ate(told, poses).rmse < 1e-6
    assert metrics.rpe(told, poses, part="rotation").max < 1e-4
    unit = metrics.umeyama(told[:, :3, 3], poses[:, :3, 3].numpy())[0]
    relative = np.linalg.inv(poses[0].numpy()) @ poses.numpy()
    relative[:, :3, 3] /= unit
    np.testing.assert_allclose(told, relative, atol=1e-6)  # the world is the first camera
    assert [track.map_version for track in tracks][::10] == [1, 2, 3, 4, 5, 6]


def test_without_sim3_the_unit_jumps():
    """What KV-Tracker's code does by default: the first camera is kept, the unit is not."""
    poses = walk()
    told = followed(poses, sim3=False)[0].trajectory.poses
    assert metrics.ate(told, poses).rmse > 0.05
    np.testing.assert_allclose(told[0], np.eye(4), atol=1e-6)


def test_noise_is_not_amplified():
    poses = walk(100)
    told = followed(poses, noise=0.01)[0].trajectory.poses
    assert metrics.ate(told, poses).rmse < 0.04
    assert metrics.ate(followed(poses, noise=0.01, sim3=False)[0].trajectory.poses, poses).rmse > 0.1


def test_a_turn_on_the_spot_keeps_its_unit():
    """Centres that coincide tell no scale; the depth does."""
    poses = walk()
    poses[:, :3, 3] = poses[0, :3, 3]
    tracker, _ = followed(poses)
    depth = tracker.map.depth
    first = Tracker(tracker.model, tracker.adapter)
    first.add_keyframe(picture(0))
    told = tracker.trajectory.poses
    assert np.abs(told[:, :3, 3]).max() < 1e-5
    assert torch.isfinite(depth)
    moved = walk()
    moved[:20, :3, 3] = moved[0, :3, 3]  # two keyframes on the spot before the camera begins to move
    told = followed(moved)[0].trajectory.poses
    assert metrics.ate(told, moved).rmse < 1e-4


def test_a_straight_walk_keeps_its_turn():
    """Centres on a line leave a rotation free; the orientations of the keyframes do not."""
    poses = torch.eye(4, dtype=torch.float64).repeat(40, 1, 1)
    poses[:, 2, 3] = torch.linspace(0, 2, 40)
    tracker, _ = followed(poses)
    told = torch.from_numpy(tracker.trajectory.poses)
    torch.testing.assert_close(told[:, :3, :3], poses[:, :3, :3], rtol=0, atol=1e-5)
    assert (told[:, :2, 3].abs().max() / told[:, 2, 3].max()) < 1e-5


def test_the_cache_carries_the_world():
    poses = walk()
    tracker, _ = followed(poses)
    right = tracker.track(picture(33)).pose
    other = followed(poses, seed=5)[0]
    swapped = torch.stack([x.detach() for x in [other.track(picture(33)).pose]])[0]
    assert (tracker.track(picture(33)).pose - right).abs().max() < 1e-6
    assert (right - swapped).abs().max() > 1e-3  # other passes, another unit


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.05, 20), st.integers(2, 7))
def test_align_undoes_any_similarity(seed, scale, count):
    draw = torch.Generator().manual_seed(seed)
    angles = torch.randn(3, count + 1, generator=draw, dtype=torch.float64)
    poses = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    turns = rotation(*angles)
    poses[:, :3, :3], poses[:, :3, 3] = turns[1:], torch.randn(count, 3, generator=draw, dtype=torch.float64)
    moved = Similarity(torch.tensor(scale, dtype=torch.float64), turns[0], torch.randn(3, generator=draw).double())
    back = align(moved.poses(poses), poses)
    torch.testing.assert_close(back.poses(moved.poses(poses)), poses, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back.points(moved.points(poses[:, :3, 3])), poses[:, :3, 3], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(moved.scale * back.scale, torch.ones((), dtype=torch.float64), rtol=1e-7, atol=1e-7)


def looking(azimuth, elevation=0.0, place=(0.0, 0.0, 0.0)):
    """A pose whose optical axis has this azimuth and elevation, degrees."""
    yaw, pitch = (torch.tensor(math.radians(angle), dtype=torch.float64) for angle in (azimuth, -elevation))
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = rotation(yaw, pitch, torch.zeros((), dtype=torch.float64))
    pose[:3, 3] = torch.tensor(place, dtype=torch.float64)
    return pose


def sight(pose, *keyframes, centre=None, since=1):
    return Sight(pose, torch.stack(keyframes), centre, torch.tensor(2.0, dtype=torch.float64), since)


def test_rules_in_a_scene():
    ahead, aside = looking(0), looking(30)
    assert not Angular(10).wants(sight(looking(9), ahead))
    assert Angular(10).wants(sight(looking(11), ahead))
    assert not Angular(10).wants(sight(looking(21), ahead, aside))  # within 10 degrees of the other
    assert not Angular(10).wants(sight(looking(0, place=(1, 0, 0)), ahead))
    # azimuth near one keyframe, elevation near another: covered for azel, not for angular
    low, corner = looking(0, 30), looking(30, 30)
    assert not Azel(10).wants(sight(corner, low, aside))
    assert Angular(10).wants(sight(corner, low, aside))
    assert Azel(10).wants(sight(looking(0, 15), ahead))
    assert not Azel(10).wants(sight(looking(-178), looking(178)))  # across the seam
    assert PoseChange(10, 0.15).wants(sight(looking(0, place=(0.31, 0, 0)), ahead))
    assert not PoseChange(10, 0.15).wants(sight(looking(0, place=(0.29, 0, 0)), ahead))
    assert PoseChange(10, 0.15).wants(sight(looking(11), ahead))
    assert not PoseChange(10, 0.15).wants(sight(looking(11), looking(5), looking(0, place=(3, 0, 0))))
    assert Interval(5).wants(sight(ahead, ahead, since=5))
    assert not Interval(5).wants(sight(ahead, ahead, since=4))


def test_rules_around_an_object():
    """The direction is that from the object to the camera, wherever the camera looks."""
    centre = torch.zeros(3, dtype=torch.float64)

    def around(degrees, distance=2.0):
        angle = math.radians(degrees)
        return looking(77, place=(distance * math.sin(angle), 0, distance * math.cos(angle)))

    assert Angular(10).wants(sight(around(60), around(0), around(49), centre=centre))
    assert not Angular(10).wants(sight(around(58), around(0), around(49), centre=centre))
    assert not Angular(10).wants(sight(around(0, 5.0), around(0), centre=centre))
    assert Azel(10).wants(sight(around(60), around(0), around(49), centre=centre))  # asin would stop at 45 degrees


def test_the_released_rule_is_the_formula_of_the_code():
    """azimuth = asin(x / z) cut to a right angle, elevation = atan2(y, z); without the circle that ``azel`` closes."""
    draw, differ = np.random.default_rng(0), 0
    for _ in range(2000):
        centre, places = draw.normal(size=3), 3 * draw.normal(size=(1 + draw.integers(1, 5), 3))
        x, y, z = (places - centre).T
        azimuth = np.degrees(np.arcsin(np.clip(x / z, -1, 1)))
        elevation = np.degrees(np.arctan2(y, z))
        away = [np.abs(angle[1:] - angle[0]).min() for angle in (azimuth, elevation)]
        poses = torch.eye(4, dtype=torch.float64).repeat(len(places), 1, 1)
        poses[:, :3, 3] = torch.from_numpy(places)
        seen = sight(poses[0], *poses[1:], centre=torch.from_numpy(centre))
        assert Released(10).wants(seen) == (max(away) > 10)
        differ += Released(10).wants(seen) != Azel(10).wants(seen)
    assert differ > 100
    assert Tracker(Oracle(walk()).eval(), OracleAdapter(Oracle(walk())), "released").rule == Released(10)


@pytest.mark.parametrize(("rule", "most"), [(Angular(10), 14), (Azel(10), 14), (PoseChange(10), 40), (Interval(20), 3)])
def test_rules_choose_keyframes_of_a_walk(rule, most):
    poses = walk()
    tracker, tracks = followed(poses, rule, max_keyframes=50)
    assert 3 <= tracker.keyframes <= most
    assert sum(track.keyframe for track in tracks) == tracker.keyframes
    assert metrics.ate(tracker.trajectory.poses, poses).rmse < 1e-4


def test_min_gap_and_cap():
    poses = walk()
    tracker, tracks = followed(poses, PoseChange(1, 0.01), min_gap=4, max_keyframes=9)
    taken = [number for number, track in enumerate(tracks) if track.keyframe]
    assert len(taken) == tracker.keyframes == 9
    assert min(np.diff(taken)) >= 4


@pytest.mark.parametrize("rule", [Angular, Azel, Released, PoseChange])
def test_rules_check_their_options(rule):
    for degrees in (0, -1, 181):
        with pytest.raises(ValueError, match="degrees must be above 0"):
            rule(degrees)
    with pytest.raises(ValueError, match="distance"):
        PoseChange(10, 0)
    with pytest.raises(ValueError, match="frames"):
        Interval(0)
