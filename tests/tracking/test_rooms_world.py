"""The ray-cast rooms: what is seen is where it is said to be."""

from __future__ import annotations

import torch

from vlmattn.tracking.rooms import BOXES, WALLS, make_rooms, random_poses, render, smooth_poses


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_points_lie_on_surfaces():
    rooms = make_rooms(4, draw())
    poses = random_poses(rooms, 3, draw(1))
    images, local = render(rooms, poses)
    assert images.shape == (4, 3, 3, 48, 48)
    assert images.min() >= 0
    assert images.max() <= 1
    world = torch.einsum("rvij,rvhwj->rvhwi", poses[..., :3, :3], local) + poses[..., None, None, :3, 3]
    beyond = torch.einsum("rvhwi,rpi->rvhwp", world, rooms.normals) - rooms.distances[:, None, None, None]
    assert beyond.amax() < 1e-4  # inside the room
    on_wall = beyond.amax(-1).abs() < 1e-4
    assert 0.5 < on_wall.float().mean() < 1  # the rest shows furniture
    assert (local[..., 2] > 0).all()


def test_the_same_place_has_the_same_colour_from_everywhere():
    """What makes matching possible: reproject pixels of one view into another."""
    rooms = make_rooms(1, draw(2))
    poses = random_poses(rooms, 2, draw(3), spread=0.2)
    images, local = render(rooms, poses, 96)
    world = local[0, 0].flatten(0, 1) @ poses[0, 0, :3, :3].T + poses[0, 0, :3, 3]
    there = (world - poses[0, 1, :3, 3]) @ poses[0, 1, :3, :3]
    focal = 48 / torch.tan(torch.deg2rad(torch.tensor(37.5)))
    pixel = (there[:, :2] / there[:, 2:] * focal + 48).floor().long()
    seen = (pixel >= 0).all(1) & (pixel < 96).all(1) & (there[:, 2] > 0)
    depth = local[0, 1, pixel[seen, 1], pixel[seen, 0], 2]
    close = (depth - there[seen, 2]).abs() < 0.02  # not hidden there
    one = images[0, 0].flatten(1)[:, seen][:, close]
    other = images[0, 1, :, pixel[seen, 1], pixel[seen, 0]][:, close]
    assert close.sum() > 3000
    assert (one - other).abs().mean() < 0.02


def test_rooms_follow_from_the_seed():
    one, other = make_rooms(2, draw(5)), make_rooms(2, draw(5))
    assert torch.equal(one.normals, other.normals)
    assert one.tints.shape == (2, WALLS + 2 + BOXES, 3)
    assert len(one) == 2
    path = smooth_poses(one, 50, draw(6))
    step = (path[:, 1:, :3, 3] - path[:, :-1, :3, 3]).norm(dim=-1)
    assert step.max() < 0.3
    turn = path[..., :3, :3]
    torch.testing.assert_close(turn @ turn.transpose(-1, -2), torch.eye(3).expand_as(turn), rtol=0, atol=1e-5)


def test_the_camera_stays_out_of_things():
    rooms = make_rooms(64, draw(8))
    _, local = render(rooms, random_poses(rooms, 8, draw(9)), 16)
    assert local[..., 2].min() > 0.02
