"""Maps are replaced whole or not at all; bad input is said; threads; object mode."""

from __future__ import annotations

import math
import threading
import warnings

import multiview
import numpy as np
import pytest
import torch
from numerics import bound
from PIL import Image

import vlmattn
from vlmattn.errors import InputError, OptionError, StateError, UnknownNameError, UnsupportedError
from vlmattn.tracking import Adapter, Angular, Interval, Tracker, Views, find_adapter, register_adapter
from vlmattn.tracking.models import base


@pytest.fixture
def model():
    return multiview.build("rooms")


@pytest.fixture
def tracker(model):
    tracker = vlmattn.Tracker(model, max_keyframes=6)
    for frame in multiview.images(3):
        tracker.add_keyframe(frame)
    return tracker


FRAME = multiview.images(4)[3]
ROUNDING = bound(torch.float32, 256)  # of poses from a tiny network


def test_the_first_keyframe_is_the_world(tracker):
    origin = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(tracker.map.anchors[0], origin, rtol=0, atol=ROUNDING)
    rigid = Tracker(tracker.model, sim3=False)
    for frame in multiview.images(3):
        rigid.add_keyframe(frame)
    torch.testing.assert_close(rigid.map.poses[0], origin, rtol=0, atol=ROUNDING)
    assert tracker.map.version == 2  # of two keyframes, then of three
    found = tracker.track(FRAME)
    assert found.map_version == 2
    turn = found.pose[:3, :3]
    torch.testing.assert_close(turn @ turn.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=ROUNDING)


def test_pictures_arrays_and_tensors_are_the_same(tracker, tmp_path):
    array = (FRAME.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(array).save(tmp_path / "frame.png")
    expected = tracker.track(torch.from_numpy(array).permute(2, 0, 1).float() / 255).pose
    for image in (array, Image.fromarray(array), tmp_path / "frame.png", str(tmp_path / "frame.png")):
        assert torch.equal(tracker.track(image).pose, expected)


def test_fewer_than_two_keyframes(model):
    tracker = Tracker(model)
    with pytest.raises(StateError, match=r"two keyframes, there are 0.*follow"):
        tracker.track(FRAME)
    assert tracker.add_keyframe(FRAME).version == 0
    with pytest.raises(StateError, match="two keyframes, there is 1"):
        tracker.track(FRAME)


def test_another_size_works_and_warns_once(tracker):
    other = multiview.images(1, 16, 20)[0]
    with pytest.warns(UserWarning, match="16x20, the keyframes are 12x16"):
        found = tracker.track(other)
    assert found.pose.isfinite().all()
    assert found.points.shape == (16, 20, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.track(other)
    with pytest.raises(InputError, match="one size: this is 16x20"):
        tracker.add_keyframe(other)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 12, 16), torch.nan), "finite and within"),
        (FRAME * 255, "within \\[0, 1\\]"),
        (torch.rand(12, 16), "a frame is a PIL image"),
        (torch.rand(3, 13, 16), "whole patches of 4.*near is 12x16"),
        (np.zeros((12, 16), np.uint8), "height, width, 3"),
        ("nowhere.png", "cannot read the picture"),
        (None, "got NoneType"),
        ({"image": 1}, "got dict"),
        (["a", 1], "got list"),
        (["a", "b"], "cannot read the picture a"),
        ([Image.new("RGB", (16, 12)), Image.new("RGB", (12, 16))], "of one size, got 12x16, 16x12"),
        ([[1.0], [1.0, 2.0]], "got list"),
        (FRAME.numpy().astype(object), "got ndarray"),
        (FRAME.long(), "a frame is a PIL image"),
        (FRAME * 1j, "a frame is a PIL image"),
        (FRAME.to("meta"), "got Tensor"),
        (FRAME.to_sparse(), "got Tensor"),
        (FRAME[None][:0], "whole patches of 4"),
        (FRAME[:, :0], "whole patches of 4"),
        (FRAME[None, None], "whole patches of 4"),
        ("n\0l.png", "cannot read the picture"),
    ],
)
def test_bad_frames(tracker, image, message):
    was = tracker.map
    for call in (tracker.track, tracker.add_keyframe):
        with pytest.raises(InputError, match=message):
            call(image)
    assert tracker.map is was


def test_bad_masks(tracker, model):
    with pytest.raises(InputError, match="mask must be"):
        tracker.track(FRAME, mask=torch.ones(4, 4))
    with pytest.raises(InputError, match="mask is empty"):
        tracker.track(FRAME, mask=torch.zeros(12, 16))
    with pytest.raises(InputError, match="either all keyframes have a mask"):
        tracker.add_keyframe(FRAME, mask=torch.ones(12, 16))
    for odd in ("mask", [[1], [1, 2]], {}):
        with pytest.raises(InputError, match="a mask is a PIL image"):
            tracker.track(FRAME, mask=odd)
    with pytest.raises(InputError, match="mask holds NaN"):
        tracker.track(FRAME, mask=torch.full((12, 16), torch.nan))


def test_flipped_arrays_are_frames(tracker):
    """As OpenCV users make them of blue, green and red."""
    picture = (FRAME.permute(1, 2, 0) * 255).byte().numpy()
    flipped = np.ascontiguousarray(picture[..., ::-1])[..., ::-1]
    assert tracker.track(flipped).pose.equal(tracker.track(picture).pose)
    flipped.flags.writeable = False
    assert tracker.track(FRAME.numpy().astype(">f4")).pose.equal(tracker.track(FRAME).pose)
    tracker.track(flipped)


@pytest.mark.parametrize("time", [math.nan, math.inf, "1.5", [1.0], True, {}])
def test_odd_times_are_refused_before_anything_changes(model, time):
    tracker = Tracker(model)
    with pytest.raises(InputError, match="time"):
        tracker.follow(FRAME, time=time)
    assert tracker.keyframes == len(tracker.trajectory) == 0


def test_times_that_do_not_go_on_are_told_once(model):
    tracker = Tracker(model)
    tracker.follow(FRAME, time=1.0)
    with pytest.warns(UserWarning, match="this frame is at 1 s, the one before was at 1 s"):
        tracker.follow(FRAME, time=torch.tensor(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.follow(FRAME, time=np.float32(0.5))
    assert tracker.trajectory.times.tolist() == [1.0, 1.0, 0.5]


def test_odd_confidences_are_refused(tracker):
    for odd in ("0.5", math.nan, [0.5]):
        with pytest.raises(OptionError, match="min_confidence must be"):
            tracker.point_cloud(odd)


def test_follow_takes_one_frame(tracker):
    with pytest.raises(InputError, match="follow takes one frame, got a batch of 2"):
        tracker.follow(FRAME.expand(2, -1, -1, -1))
    assert len(tracker.trajectory) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.double(), "dtype was torch.float32 and is torch.float64"),
        (lambda model: model.load_state_dict(multiview.build("rooms").state_dict()), "weights are others"),
        (lambda model: model.register_tokens.mul_(2.0), "weights are others"),
    ],
)
def test_a_changed_model_is_refused_until_remapped(tracker, change, message):
    with torch.no_grad():
        change(tracker.model)
    with pytest.raises(StateError, match=message):
        tracker.track(FRAME)
    tracker.remap()
    assert tracker.map.version == 3
    tracker.track(FRAME)


def test_autocast_is_part_of_the_map(tracker):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(StateError, match=r"autocast was None and is torch.bfloat16"),
    ):
        tracker.track(FRAME)


def test_training_mode_is_refused(model):
    with pytest.raises(StateError, match=r"model\.eval"):
        Tracker(model.train()).add_keyframe(FRAME)


def test_a_failed_remap_leaves_the_old_map(tracker, monkeypatch):
    was, before = tracker.map, tracker.track(FRAME).pose
    bare = tracker.adapter.forward

    def broken(images, reading):
        views = bare(images, reading)
        return views if reading else Views(views.poses * torch.nan, views.local_points, views.confidence)

    monkeypatch.setattr(tracker.adapter, "forward", broken)
    with pytest.raises(StateError, match=r"NaN.*as it was"):
        tracker.add_keyframe(FRAME)

    def out_of_memory(images, reading):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tracker.adapter, "forward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        tracker.add_keyframe(FRAME)
    monkeypatch.undo()
    assert tracker.map is was
    assert torch.equal(tracker.track(FRAME).pose, before)
    assert tracker.add_keyframe(FRAME).accepted


def test_a_keyframe_of_low_confidence_is_refused(tracker, monkeypatch):
    was = tracker.map
    bare = tracker.adapter.forward

    def unsure(images, reading):
        views = bare(images, reading)
        views.confidence[:, -1] *= 0.5
        return views

    monkeypatch.setattr(tracker.adapter, "forward", unsure)
    answer = tracker.add_keyframe(FRAME)
    assert not answer.accepted
    assert "below 0.6 of the first map's" in answer.reason
    assert tracker.map is was
    assert answer.version == was.version


def test_lost_frames_hold_the_last_pose(model, monkeypatch):
    tracker = Tracker(model, rule=Interval(100))
    frames = multiview.images(4)
    poses = [tracker.follow(frame).pose for frame in frames[:3]]
    bare, shares = tracker.adapter.forward, []

    def blind(images, reading):
        views = bare(images, reading)
        confidence = torch.full_like(views.confidence, float(shares[-1] * tracker.map.usual))
        return Views(views.poses, views.local_points, confidence)

    monkeypatch.setattr(tracker.adapter, "forward", blind)
    for share, lost in (
        (0.29, False),
        (0.181, False),
        (torch.nan, True),
        (0.179, True),
    ):  # 0.3 x 0.6 of the first map's
        shares.append(share)
        assert bool(tracker.track(frames[3]).lost) is lost
    held = tracker.follow(frames[3])
    assert bool(held.lost)
    assert torch.equal(held.pose, poses[-1])
    assert len(tracker.trajectory) == 4


def test_the_map_may_be_full(model):
    tracker = Tracker(model, max_keyframes=2, rule=Interval(1))
    for frame in multiview.images(5):
        tracker.follow(frame)
    assert tracker.keyframes == 2
    with pytest.raises(StateError, match="full: 2 keyframes"):
        tracker.add_keyframe(FRAME)


def test_follow_begins_with_the_first_frame_twice(model):
    tracker = Tracker(model, rule=Interval(2))
    frames = multiview.images(4)
    first = tracker.follow(frames[0])
    assert first.keyframe
    assert tracker.keyframes == 1
    torch.testing.assert_close(first.pose, torch.eye(4, dtype=torch.float64), rtol=0, atol=ROUNDING)
    twice = model(frames[0].expand(1, 2, -1, -1, -1))["camera_poses"][0]
    alone = tracker.map.gauge.poses(twice[:1].detach().double())
    torch.testing.assert_close(alone, tracker.map.poses)
    tokens = tracker.map.cache[0][0].shape[2]
    tracker.follow(frames[1])
    third = tracker.follow(frames[2])
    assert third.keyframe  # the copy is dropped: two keyframes, the same number of tokens
    assert tracker.map.cache[0][0].shape[2] == tokens
    assert tracker.keyframes == 2


def test_follow_goes_on_with_a_map_that_is_there(model):
    """Also when its first frame is not of the map; and make_map begins anew."""
    frames = multiview.images(5)
    tracker = Tracker(model, rule=Interval(100))
    assert tracker.make_map(frames[:3]).version == 1
    found = tracker.follow(frames[4])
    assert not found.keyframe
    assert torch.equal(found.pose, tracker.track(frames[4]).pose)
    assert tracker.keyframes == 3
    tracker.make_map(frames[:2])
    assert len(tracker.trajectory) == 0
    with pytest.raises(InputError, match="two keyframes or more"):
        tracker.make_map(frames[:1])
    with pytest.raises(StateError, match="more than max_keyframes = 2"):
        Tracker(model, max_keyframes=2).make_map(frames)
    one_by_one = Tracker(model)
    for frame in frames[:2]:
        one_by_one.add_keyframe(frame)
    torch.testing.assert_close(tracker.map.poses, one_by_one.map.poses)


def test_object_mode_blackens_and_drops(model):
    frames, mask = multiview.images(3), torch.zeros(12, 16, dtype=torch.bool)
    mask[4:9, 4:12] = True
    masked, dropped = Tracker(model), Tracker(model, drop_masked_tokens=True)
    for tracker in (masked, dropped):
        for frame in frames:
            tracker.add_keyframe(frame, mask)
    black = Tracker(model)
    for frame in frames:
        black.add_keyframe(frame * mask)
    torch.testing.assert_close(masked.map.poses, black.map.poses)
    torch.testing.assert_close(masked.track(FRAME, mask).pose, black.track(FRAME * mask).pose)
    assert torch.equal(masked.map.centre, masked.map.centre)
    points = masked.map.points[:1][masked.map.masks[:1]]
    assert masked.map.centre.shape == (3,)
    assert points.shape[1] == 3
    on = 2 * 2  # patches that the object touches: rows 4..8 of 4 pixels, columns 4..11
    assert dropped.map.cache[0][0].shape[2] == 3 * (model.config.registers + on)
    assert dropped.track(FRAME, mask).pose.isfinite().all()
    cloud, _ = masked.point_cloud(min_confidence=0.0)
    assert len(cloud) == 3 * int(mask.sum())
    batch = masked.track(frames, mask.expand(3, -1, -1))
    torch.testing.assert_close(batch.confidence[0], masked.track(frames[0], mask).confidence)


def test_threads_share_a_tracker_while_it_maps_anew(tracker):
    """Frames see one whole map or the next, never parts of two."""
    by_version, failures = {}, []
    done = threading.Event()

    def watch():
        try:
            while not done.is_set():
                found = tracker.track(FRAME)
                by_version.setdefault(found.map_version, []).append(found.pose)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=watch) for _ in range(3)]
    for thread in threads:
        thread.start()
    maps = {tracker.map.version: tracker.track(FRAME).pose}
    for frame in multiview.images(9)[4:7]:
        tracker.add_keyframe(frame)
        maps[tracker.map.version] = tracker.track(FRAME).pose
    done.set()
    for thread in threads:
        thread.join()
    assert not failures
    for version, poses in by_version.items():
        for pose in poses:
            torch.testing.assert_close(pose, maps[version], rtol=1e-5, atol=1e-6)


def test_two_trackers_share_a_model(model):
    frames = multiview.images(6)
    one, other = Tracker(model), Tracker(model)
    for frame in frames[:2]:
        one.add_keyframe(frame)
    alone = one.track(FRAME).pose
    for frame in frames[2:5]:
        other.add_keyframe(frame)
    other.track(FRAME)
    assert torch.equal(one.track(FRAME).pose, alone)


def test_an_error_inside_the_network_leaves_nothing_behind(tracker, monkeypatch):
    block = tracker.model.global_blocks[0].attn

    def fails(x):
        raise RuntimeError("inside")

    hook = block.proj.register_forward_pre_hook(lambda module, args: fails(args))
    with pytest.raises(RuntimeError, match="inside"):
        tracker.track(FRAME)
    hook.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tracker.model.modules())
    assert torch.overrides._get_current_function_mode() is None
    tracker.track(FRAME)


def test_no_adapter_fits():
    with pytest.raises(UnsupportedError, match=r"no adapter fits Linear.*pi3, rooms, vggt"):
        Tracker(torch.nn.Linear(2, 2))
    with pytest.raises(UnknownNameError, match="did you mean pi3"):
        Tracker(multiview.build("pi3"), adapter="pi33")
    assert find_adapter(multiview.build("pi3"), "pi3").name == "pi3"


@pytest.mark.parametrize("name", multiview.NETWORKS)
def test_adapters_are_found_by_structure(name):
    assert find_adapter(multiview.build(name)).name == name


def test_attention_by_other_means_is_refused(model, monkeypatch):
    """A network that does not come to SDPA would silently not see the map."""
    attention = model.global_blocks[1].attn

    def dense(x, rotary, mask=None):
        q, k, v = attention.qkv(x).chunk(3, -1)
        return attention.proj((q @ k.transpose(-1, -2)).softmax(-1) @ v)

    monkeypatch.setattr(attention, "forward", dense)
    tracker = Tracker(model)
    tracker.add_keyframe(FRAME)
    with pytest.raises(UnsupportedError, match=r"Attention called F.scaled_dot_product_attention 0 times"):
        tracker.add_keyframe(FRAME)


def test_an_adapter_of_ones_own():
    class Mine(Adapter):
        name, multiple, lead = "mine", 4, 5

        @classmethod
        def fits(cls, model):
            return type(model).__name__ == "Own"

        def attentions(self):
            return [block.attn for block in self.model.decoder[1::2]]

        def forward(self, images, reading):
            out = self.model(images)
            return Views(out["camera_poses"], None, None)

    Own = type("Own", (multiview.Pi3,), {})
    model = Own().eval()
    tracker = Tracker(model, adapter=Mine(model))
    for frame in multiview.images(2):
        tracker.add_keyframe(frame)
    found = tracker.track(FRAME)
    assert found.points is None
    assert found.confidence is None
    assert not found.lost
    with pytest.raises(StateError, match="tells none"):
        tracker.point_cloud()
    register_adapter(Mine)
    try:
        assert type(find_adapter(model)) is Mine
    finally:
        del base._ADAPTERS[Mine.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_keyframes": 1}, "max_keyframes"),
        ({"min_gap": 0}, "min_gap"),
        ({"cache_dtype": torch.int8}, "cache_dtype"),
        ({"cache_dtype": "bfloat16"}, "cache_dtype"),
        ({"max_keyframes": 2.5}, "max_keyframes"),
        ({"max_keyframes": "20"}, "max_keyframes"),
        ({"min_gap": math.nan}, "min_gap"),
        ({"rule": 5}, "rule must be a name"),
        ({"rule": Interval}, "rule must be a name"),
        ({"adapter": 5}, "adapter must be"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(OptionError, match=message):
        Tracker(model, **options)
    with pytest.raises(OptionError, match="must be a torch module"):
        Tracker("embedded")
    for odd in (math.nan, "1", None):
        with pytest.raises(OptionError, match="frames must be"):
            Interval(odd)
        with pytest.raises(OptionError, match="degrees must be"):
            Angular(odd)
    with pytest.raises(UnknownNameError, match="keyframe rule 'angle'; did you mean angular"):
        Tracker(model, rule="angle")
