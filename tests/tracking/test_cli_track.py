"""vlmattn track: what it prints and writes, and what bad input gets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmattn.tracking import MultiViewNetwork, NetworkConfig, Trajectory, read_tum, write_tum
from vlmattn.tracking.bundled import save
from vlmattn.tracking.controls import held_out_walk


@pytest.fixture(autouse=True)
def _in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def walk(tmp_path):
    """Twelve frames of a walk in a folder, and their true poses."""
    walk = held_out_walk(2)
    folder = tmp_path / "walk"
    folder.mkdir()
    for number, image in enumerate(walk.images[:24:2]):
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(folder / f"{number}.png")
    write_tum(tmp_path / "truth.txt", Trajectory(np.arange(12) / 30, walk.poses[:24:2]))
    return folder


def test_demo_prints_controls_beside_results(run, tmp_path):
    code, out, err = run("track", "--demo", "--degrees", "25")
    assert code == 0, err
    for words in (
        "live",
        "cached",
        "wrong map",
        "full",
        "no map",
        "standing still",
        "ATE, Sim(3)",
        "yaw",
        "per second",
    ):
        assert words in out
    assert re.search(r"ms cached, [\d.]+ ms in a full pass: [\d.]+x \[", out)
    folder = tmp_path / "runs" / "track-demo"
    assert sorted(file.name for file in folder.iterdir()) == ["page.html", "trajectory.txt", "truth.txt"]
    assert len(read_tum(folder / "trajectory.txt")) == len(read_tum(folder / "truth.txt")) == 60
    page = (folder / "page.html").read_text()
    for words in ("<svg", "From above", "Keyframes", "wrong map", "data:image/png"):
        assert words in page
    assert "http://" not in re.sub(r"http://(www.w3.org|purl.org|creativecommons.org)", "", page)


def test_a_folder_of_frames(run, walk, tmp_path):
    outputs = ["--out", "deep/walk.txt", "--viz", "walk.html", "--ply", "walk.ply", "--truth", "truth.txt"]
    code, out, err = run("track", "--frames", "walk", *outputs, "--rule", "pose")
    assert code == 0, err
    assert "12 of 12 frames have a true pose" in out
    assert "tracked" in out
    assert "frames per second" in out
    told = read_tum("deep/walk.txt")
    np.testing.assert_allclose(told.times, np.arange(12) / 30, atol=1e-6)
    assert (tmp_path / "walk.ply").read_bytes().startswith(b"ply\n")
    assert "truth" in (tmp_path / "walk.html").read_text()
    assert not list(tmp_path.rglob("*.partial"))


def test_masks_make_it_an_object(run, walk, tmp_path):
    (tmp_path / "masks").mkdir()
    for number in range(12):
        mask = np.zeros((48, 48), np.uint8)
        mask[10:40, 10:40] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    code, _, err = run("track", "--frames", "walk", "--out", "a.txt", "--masks", "masks", "--cache-dtype", "bfloat16")
    assert code == 0, err
    assert len(read_tum("a.txt")) == 12
    (tmp_path / "masks" / "7.png").unlink()
    code, _, err = run("track", "--frames", "walk", "--out", "b.txt", "--masks", "masks")
    assert code == 2
    assert "cannot read the picture masks/7.png" in err
    assert not (tmp_path / "b.txt").exists()


def test_a_network_of_ones_own(run, walk, tmp_path):
    torch.manual_seed(0)
    save(MultiViewNetwork(NetworkConfig(width=32, heads=2, pairs=1)), tmp_path / "net")
    code, out, err = run(
        "track",
        "--frames",
        "walk",
        "--out",
        "a.txt",
        "--model",
        "net",
        "--every",
        "3",
        "--rule",
        "interval",
        "--interval",
        "2",
    )
    assert code == 0, err
    assert "4 frames, 2 keyframes" in out


def test_a_truth_that_cannot_be_compared_costs_nothing(run, walk, tmp_path):
    straight = np.tile(np.eye(4), (12, 1, 1))
    straight[:, 2, 3] = np.arange(12)
    write_tum(tmp_path / "line.txt", Trajectory(np.arange(12) / 30, straight))
    code, _, err = run("track", "--frames", "walk", "--out", "a.txt", "--truth", "line.txt")
    assert code == 0
    assert "not compared with the truth: the camera centres lie on a straight line" in err
    assert len(read_tum("a.txt")) == 12


def test_what_is_made_up_or_odd_is_noted_once(run, walk, tmp_path):
    poses = np.concatenate([read_tum("truth.txt").poses[:6]] * 2)
    write_tum(tmp_path / "runs.txt", Trajectory(np.tile(np.arange(6) / 30, 2), poses))
    code, _, err = run("track", "--frames", "walk", "--out", "a.txt", "--truth", "runs.txt", "--size", "48")
    assert code == 0
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert "no times for all frames; those without follow at 30 per second" in notes[0]
    assert "the times of the truth repeat or go back (two runs in one file?)" in notes[1]
    code, _, err = run("track", "--frames", "walk", "--out", "a.txt", "--rate", "10")
    assert code == 0
    assert "note: " not in err
    assert read_tum("a.txt").times == pytest.approx(np.arange(12) / 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --frames with a folder or video, or --demo"),
        (["--demo", "--frames", "walk"], "not both"),
        (["--demo", "--truth", "truth.txt"], "knows their truth"),
        (["--frames", "walk"], "give --out"),
        (["--frames", "nowhere", "--out", "a.txt"], "no such folder or video: nowhere"),
        (["--frames", "walk", "--out", "a.txt", "--rule", "angulr"], "did you mean angular"),
        (["--frames", "walk", "--out", "a.txt", "--rule", "interval", "--degrees", "3"], "--degrees means nothing"),
        (["--frames", "walk", "--out", "a.txt", "--interval", "3"], "--interval means nothing to --rule angular"),
        (["--frames", "walk", "--out", "a.txt", "--degrees", "0"], "degrees must be above 0"),
        (["--frames", "walk", "--out", "a.txt", "--cache-dtype", "int8"], "float32, bfloat16 or float16"),
        (["--frames", "walk", "--out", "a.txt", "--model", "nowhere"], "nowhere holds no multi-view network"),
        (["--frames", "walk", "--out", "a.txt", "--network", "nowhere:Net"], "package.module:Class"),
        (["--frames", "walk", "--out", "a.txt", "--max-keyframes", "1"], "max_keyframes must be at least 2"),
        (["--frames", "walk", "--out", "walk"], "it is a folder"),
        (["--frames", "walk", "--out", "a.txt", "--rate", "0"], "rate must be from"),
        (["--frames", "walk", "--out", "a.txt", "--rate", "nan"], "rate must be from"),
        (["--frames", "walk", "--out", "a.txt", "--every", "0"], "every must be at least 1"),
        (["--frames", "/dev/zero", "--out", "a.txt"], "neither a folder nor a regular file"),
        (["--frames", "walk", "--out", "a.txt", "--truth", "none.txt"], "cannot read the trajectory none.txt"),
        (["--demo", "--degrees", "170", "--rule", "azel"], "took 1 keyframe"),
    ],
)
def test_bad_input_is_one_line(run, walk, tmp_path, arguments, message):
    code, _, err = run("track", *arguments)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert err.count("\n") == 1
    assert not (tmp_path / "a.txt").exists()


def test_the_page_about_tracking_runs():
    """The Python of docs/tracking.md."""
    page = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text()
    first, adapter = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(first, names)
    assert len(read_tum("trajectory.txt")) == 60
    assert Path("points.ply").read_bytes().startswith(b"ply")
    exec(adapter, names)
    assert names["Mine"](names["model"]).lead == 5
