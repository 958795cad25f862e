"""How the bundled tracker was trained: batches follow from the step, the losses know the truth, runs go on where they
stopped."""

from __future__ import annotations

import json

import pytest
import torch

from tools.bundled import train_rooms as train
from tools.bundled.card_rooms import card, measure, spread_out
from vlmattn.tracking.bundled import FOLDER, figures, load
from vlmattn.tracking.controls import held_out_walk, score
from vlmattn.tracking.network import MultiViewNetwork, NetworkConfig, rigid


def test_batches_follow_from_the_step():
    one, other = train.batch(17), train.batch(17)
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[2], train.batch(18)[2][:1])
    near, far = train.batch(0)[2], train.batch(6_000)[2]
    assert near[..., :3, 3].norm(dim=-1).max() < 0.5 < far[..., :3, 3].norm(dim=-1).max()


def test_queries_are_seen_by_nobody():
    sees = train.visibility(3, 5)
    assert sees[:, :3].all()
    assert sees[3:, 3:].tolist() == [[True, False], [False, True]]
    assert not sees[:3, 3:].any()
    network = MultiViewNetwork(NetworkConfig(width=32, heads=2, pairs=2)).eval()
    images = torch.rand(1, 5, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    changed = images.clone()
    changed[:, 4] = 0.5
    before, after = (network(x, sees)["camera_poses"] for x in (images, changed))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4], after[:, 4])


def test_the_offset_of_a_motion_is_zero_at_the_truth():
    """``_off`` says without the motion itself how far it is from the truth."""
    draw = torch.Generator().manual_seed(1)
    local = torch.randn(1, 1, 30, 3, generator=draw)
    precision = torch.randn(1, 1, 30, generator=draw)
    poses = torch.eye(4).repeat(1, 1, 1, 1)
    poses[..., :3, 3] = torch.tensor([1.0, 2.0, 3.0])
    world = local + poses[..., None, :3, 3]
    assert train._off(world, local, precision, poses) < 1e-5
    shifted = train._off(world + torch.tensor([0.3, 0.0, 0.4]), local, precision, poses)
    assert shifted.item() == pytest.approx(0.5, abs=1e-4)
    angle = torch.tensor(0.1)
    turn = torch.tensor([[angle.cos(), 0, angle.sin()], [0, 1, 0], [-angle.sin(), 0, angle.cos()]])
    turned = train._off(local @ turn.T + poses[..., None, :3, 3], local, precision, poses)
    found = rigid(local, local @ turn.T, precision.exp())
    assert train.angle(found, poses)[0, 0].item() == pytest.approx(5.73, abs=0.05)
    assert 0.03 < turned.item() < 0.3


def test_the_world_is_that_of_the_mean_camera():
    """Any common motion of room and cameras is taken out; the order of map views does not matter; queries do not
    count."""
    poses = train.batch(2_000)[2]
    views = 2
    expected = train.in_mean_camera(poses, views)
    moved = poses[:1, :1] @ poses
    torch.testing.assert_close(train.in_mean_camera(moved, views), expected, rtol=0, atol=1e-4)
    swapped = train.in_mean_camera(poses[:, [1, 0, *range(2, poses.shape[1])]], views)
    torch.testing.assert_close(swapped[:, [1, 0]], expected[:, :2], rtol=0, atol=1e-4)
    torch.testing.assert_close(expected[:, :2, :3, 3].mean(1), torch.zeros(len(poses), 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(train.relative(expected, views), train.relative(poses, views), rtol=0, atol=1e-4)


def test_losses_fall_on_one_batch():
    torch.manual_seed(0)
    network = MultiViewNetwork(NetworkConfig(width=32, heads=2, pairs=3))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    batch = tuple(x[:4] if isinstance(x, torch.Tensor) else x for x in train.batch(1))
    history = []
    for _ in range(12):
        parts = train.losses(network, *batch)
        history.append({name: part.item() for name, part in parts.items()})
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    for name in ("local", "world", "anchor"):
        assert history[-1][name] < 0.9 * history[0][name], name


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Stopped and resumed is the same as not stopped: weights to the last bit."""
    config = NetworkConfig(width=32, heads=2, pairs=2)
    monkeypatch.setattr(train, "_SAVED_EVERY", 2)
    monkeypatch.setattr(train, "validate", lambda network: {})
    whole = train.train(tmp_path / "whole", 3, 1, config)
    bare = train.batch

    def killed(step):
        if step == 2:
            raise KeyboardInterrupt
        return bare(step)

    monkeypatch.setattr(train, "batch", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "parts", 3, 1, config)
    monkeypatch.setattr(train, "batch", bare)
    parts = train.train(tmp_path / "parts", 3, 1, config)
    for (name, one), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    train.export(parts, tmp_path / "parts", tmp_path / "net")
    assert [entry["step"] for entry in json.loads((tmp_path / "net" / "training_log.json").read_text())] == [2, 3]
    loaded = load(tmp_path / "net")
    torch.testing.assert_close(loaded.state_dict(), whole.half().float().state_dict())


def test_the_card_is_what_was_measured():
    told, log = figures(), json.loads((FOLDER / "training_log.json").read_text())
    assert (FOLDER / "README.md").read_text() == card(told, log)
    gate = told["gate"]
    assert gate["passed"] == (gate["yaw"]["ratio"] < 0.5 and gate["ate"]["ratio"] < 0.5)
    for name in ("yaw", "ate"):
        assert gate[name]["ratio"] == pytest.approx(
            told["errors"]["cached"][name] / told["errors"]["wrong map"][name], abs=2e-3
        )
    assert told["walks"] >= 50


def test_the_bundled_network_uses_the_map():
    """A small part of the gate, measured anew: the heading against the right map and another room's."""
    found = measure(load(), walks=4)["errors"]
    assert found["cached"]["yaw"] < 0.7 * found["wrong map"]["yaw"]
    assert found["cached"]["yaw"] == pytest.approx(found["full"]["yaw"], rel=0.5)


def test_scores_know_a_still_camera():
    walk = held_out_walk(1)
    still = torch.eye(4, dtype=torch.float64).expand(60, 4, 4).numpy()
    found = score(still, walk.poses)
    centres = walk.poses[:, :3, 3]
    assert found.ate == pytest.approx(((centres - centres.mean(0)) ** 2).sum(1).mean() ** 0.5)
    perfect = score(walk.poses, walk.poses)
    assert max(perfect.ate, perfect.rpe, perfect.yaw) < 1e-5
    assert spread_out(60, 4) == [0, 20, 39, 59]
    with pytest.raises(ValueError, match="2 to 60 keyframes"):
        spread_out(60, 61)
