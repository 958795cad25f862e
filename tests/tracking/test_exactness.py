"""Cached tracking equals the full pass in which the keyframes do not see the frame; maps do not change; no copies."""

from __future__ import annotations

import multiview
import pytest
import torch
from numerics import bound, near
from numerics import size as largest

from vlmattn.kernels import segments
from vlmattn.tracking import Tracker
from vlmattn.tracking.models import find_adapter

KEYFRAMES = 5
TERMS = 1024  # of the sums in a network, one upon the other: four blocks of three widths and up to a hundred keys
FINE = 1e-11  # in float64


def mapped(name, dtype=torch.float32, **options):
    model = multiview.build(name, dtype)
    frames = multiview.images(KEYFRAMES + 3, dtype=dtype)
    tracker = Tracker(model, **options)
    for frame in frames[:KEYFRAMES]:
        assert tracker.add_keyframe(frame).accepted
    return tracker, frames


def full(tracker, frames):
    """The oracle: all frames in one pass, the last hidden from the others; in the tracker's world."""
    adapter = tracker.adapter
    with torch.no_grad(), multiview.last_frame_hidden(adapter.attentions(), len(frames)):
        views = adapter.forward(frames[None], reading=False)
    pose = tracker.map.gauge.poses(views.poses[0].double())
    return pose, views.local_points[0], views.confidence[0]


@pytest.mark.parametrize("name", multiview.NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, bound(torch.float32, TERMS)), (torch.float64, FINE)])
def test_cached_is_the_masked_full_pass(name, dtype, tolerance):
    tracker, frames = mapped(name, dtype)
    for number in (KEYFRAMES, KEYFRAMES + 1, 2):  # new frames, and one that is a keyframe
        found = tracker.track(frames[number])
        poses, local, confidence = full(tracker, torch.cat([frames[:KEYFRAMES], frames[number : number + 1]]))
        torch.testing.assert_close(found.pose, poses[-1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(tracker.map.poses, poses[:-1], rtol=tolerance, atol=tolerance)
        scale = tracker.map.gauge.scale.to(dtype)
        turn, centre = poses[-1, :3, :3].to(dtype), poses[-1, :3, 3].to(dtype)
        points = scale * local[-1] @ turn.T + centre
        assert ((found.points - points).norm() / points.norm()) < tolerance
        near(found.confidence, confidence[-1].float().mean(), TERMS)


@pytest.mark.parametrize("name", multiview.NETWORKS)
def test_the_map_is_seen(name):
    tracker, frames = mapped(name)
    right = tracker.track(frames[-1]).pose
    other = Tracker(tracker.model)
    for frame in multiview.images(KEYFRAMES, 24)[:, :, :12]:
        other.add_keyframe(frame)
    wrong = (
        tracker.map.gauge.poses(other.adapter.model(frames[-1][None, None])["camera_poses"][0, 0].double())
        if (name != "vggt")
        else other.track(frames[-1]).pose
    )
    assert (right - wrong).abs().max() > 1e-3
    bare = find_adapter(tracker.model).forward(torch.cat([frames[:KEYFRAMES], frames[-1:]])[None], reading=False)
    unmasked = tracker.map.gauge.poses(bare.poses[0, -1].detach().double())
    assert (right - unmasked).abs().max() > 1e-4  # pi^3 of all frames is another function


@pytest.mark.parametrize("name", ["rooms", "pi3"])
def test_order_of_keyframes_does_not_matter(name):
    tracker, frames = mapped(name, torch.float64)
    shuffled = Tracker(tracker.model)
    order = [0, 3, 1, 4, 2]  # the first stays: it is the world
    for number in order:
        shuffled.add_keyframe(frames[number])
    # the networks are equal up to a pass's own world, which both trackers take from their first keyframe
    plain, other = (Tracker(tracker.model, sim3=False) for _ in range(2))
    for number in range(KEYFRAMES):
        plain.add_keyframe(frames[number])
        other.add_keyframe(frames[order[number]])
    torch.testing.assert_close(plain.track(frames[-1]).pose, other.track(frames[-1]).pose, rtol=0, atol=FINE)
    torch.testing.assert_close(plain.map.poses[order], other.map.poses, rtol=0, atol=FINE)


def test_first_frame_tokens_matter():
    """VGGT is not free of a reference: another first keyframe is another map, and a tracked frame is no first frame."""
    tracker, frames = mapped("vggt", sim3=False)
    adapter = tracker.adapter
    taken_for_first = adapter.model.aggregator.frame_blocks[0]
    seen = []
    hook = taken_for_first.register_forward_hook(lambda module, args, out: seen.append(args[0][:, : adapter.lead]))
    tracker.track(frames[-1])
    hook.remove()
    aggregator = adapter.model.aggregator
    later = torch.cat([aggregator.camera_token[:, 1], aggregator.register_token[:, 1]], 1)
    assert torch.equal(seen[0], later)


@pytest.mark.parametrize("name", multiview.NETWORKS)
def test_a_batch_of_queries_is_its_frames(name):
    tracker, frames = mapped(name, torch.float64)
    batch = tracker.track(frames[KEYFRAMES:])
    assert batch.pose.shape == (3, 4, 4)
    assert batch.lost.shape == batch.confidence.shape == (3,)
    for number in range(3):
        one = tracker.track(frames[KEYFRAMES + number])
        torch.testing.assert_close(batch.pose[number], one.pose, rtol=0, atol=FINE)
        torch.testing.assert_close(batch.points[number], one.points, rtol=FINE, atol=FINE)


@pytest.mark.parametrize("name", multiview.NETWORKS)
def test_tracking_changes_neither_map_nor_model(name):
    tracker, frames = mapped(name)
    before = [(k.clone(), v.clone(), k._version, v._version) for k, v in tracker.map.cache]
    bare = tracker.model(frames[None, :3])
    for _ in range(100):
        tracker.track(frames[-1])
    for (k, v), (was_k, was_v, *versions) in zip(tracker.map.cache, before, strict=True):
        assert torch.equal(k, was_k)
        assert torch.equal(v, was_v)
        assert [k._version, v._version] == versions
    again = tracker.model(frames[None, :3])
    for key, value in bare.items():
        assert torch.equal(value, again[key])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tracker.model.modules())


def test_bytes_per_keyframe_are_the_formula():
    """2 x attentions x tokens x width x bytes; the camera trunk of VGGT keeps one token per frame and call."""
    tokens = 3 * 4  # patches of 12 x 16
    for name, lead, blocks, calls_of_trunk in (("rooms", 2, 2, 0), ("pi3", 5, 2, 0), ("vggt", 3, 2, 6)):
        for dtype, size in ((None, 4), (torch.bfloat16, 2)):
            tracker, _ = mapped(name, cache_dtype=dtype)
            expected = 2 * multiview.WIDTH * size * (blocks * (tokens + lead) + calls_of_trunk)
            assert tracker.map.cache_bytes == KEYFRAMES * expected
            held = {k.untyped_storage().nbytes() + v.untyped_storage().nbytes() for k, v in tracker.map.cache}
            assert sum(k.untyped_storage().nbytes() + v.untyped_storage().nbytes() for k, v in tracker.map.cache) == (
                tracker.map.cache_bytes
            ), held  # no view of a joint projection


def test_no_copy_of_the_map_per_frame(monkeypatch):
    """What flash attention gets of the map is the map's own memory."""
    tracker, frames = mapped("rooms", cache_dtype=torch.bfloat16)
    seen = []
    bare = segments.flash

    def spy(query, key, value, *args, **kwargs):
        seen.append((key.data_ptr(), value.data_ptr()))
        return bare(query, key, value, *args, **kwargs)

    monkeypatch.setattr(segments, "flash", spy)
    tracker.track(frames[KEYFRAMES:])
    for key, value in tracker.map.cache:
        assert (key.data_ptr(), value.data_ptr()) in seen


def test_a_cache_in_half_precision_is_near():
    exact, frames = mapped("rooms")
    half, _ = mapped("rooms", cache_dtype=torch.bfloat16)
    assert half.map.cache[0][0].dtype == torch.bfloat16
    far = (exact.track(frames[-1]).pose - half.track(frames[-1]).pose).abs().max()
    assert 0 < far < 0.03


def test_segments_are_one_attention():
    draw = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float64):
        q, k, v = (torch.randn(3, 2, size, 16, generator=draw, dtype=dtype) for size in (5, 7, 7))
        shared_k, shared_v = (torch.randn(1, 2, 40, 16, generator=draw, dtype=dtype) for _ in range(2))
        shared_k[:, :, 3] *= 30  # a dominant key
        out = segments.attend(q, [(shared_k, shared_v), (k, v)], 0.25)
        whole = torch.nn.functional.scaled_dot_product_attention(
            q,
            torch.cat([shared_k.expand(3, -1, -1, -1), k], 2),
            torch.cat([shared_v.expand(3, -1, -1, -1), v], 2),
            scale=0.25,
        )
        score = (
            largest(q @ torch.cat([shared_k.expand(3, -1, -1, -1), k], 2).mT) * 0.25
        )  # weights are off in proportion
        near(out, whole, terms=16 + 47, scale=score)
