"""A page about one tracked sequence: path from above, confidence, keyframes, and errors where they are known."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmattn import pages
from vlmattn.errors import InputError
from vlmattn.tracking import metrics
from vlmattn.tracking.metrics import Array
from vlmattn.tracking.tracker import Track, Tracker

_POINTS = 6_000  # drawn


def page(tracker: Tracker, tracks: Sequence[Track], title: str, truth: Array | None = None, extra: str = "") -> str:
    """An HTML page that needs nothing from elsewhere.

    Args:
        tracker: that has followed the sequence.
        tracks: what ``follow`` returned, frame by frame.
        truth: true poses of the frames, ``[n, 4, 4]``, drawn beside the path after a Sim(3) alignment.
        extra: HTML put below the figures, such as tables of errors.
    """
    lost = sum(bool(track.lost) for track in tracks)
    keyframes = [number for number, track in enumerate(tracks) if track.keyframe]
    facts = (
        f"{len(tracks)} frames, {len(keyframes)} keyframes, {tracker.map.version if tracker.map else 0} maps"
        f"{f', <b>{lost} frames lost</b>' if lost else ''}."
    )
    return pages.document(
        f"vlmattn track: {title}",
        f"<h1>{html.escape(title)}</h1><p>{facts} The world is the camera of the first frame: x to its right, z"
        " ahead.</p>"
        f"{_path(tracker, tracks, keyframes, truth)}{_confidence(tracks, keyframes)}{extra}"
        f"<h2>Keyframes</h2><div class='cards'>{_keyframes(tracker, keyframes)}</div>",
    )


def _path(tracker: Tracker, tracks: Sequence[Track], keyframes: Sequence[int], truth: Array | None) -> str:
    from vlmattn.drawing import Figure

    told = tracker.trajectory.poses
    drawn = Figure(figsize=(9, 6.5), layout="constrained")
    axis = drawn.subplots()
    _cloud(axis, tracker)
    axis.plot(told[:, 0, 3], told[:, 2, 3], color=pages.COLOURS[1], linewidth=2, label="tracked")
    if truth is not None and (real := _onto(truth, told)) is not None:
        axis.plot(real[:, 0, 3], real[:, 2, 3], color="black", linewidth=1.2, linestyle="--", label="truth")
    size = 0.12 * max(np.ptp(told[:, 0, 3]), np.ptp(told[:, 2, 3]), 1e-3)
    for number in keyframes:
        x, z = told[number, [0, 2], 3]
        ahead = size * told[number, [0, 2], 2]
        axis.annotate(
            "", (x + ahead[0], z + ahead[1]), (x, z), arrowprops={"arrowstyle": "->", "color": pages.COLOURS[6]}
        )
    axis.plot(
        told[keyframes, 0, 3],
        told[keyframes, 2, 3],
        "o",
        color=pages.COLOURS[6],
        markersize=5,
        label="keyframes, and where they look",
    )
    lost = [number for number, track in enumerate(tracks) if bool(track.lost)]
    if lost:
        axis.plot(told[lost, 0, 3], told[lost, 2, 3], "x", color="black", label="lost")
    axis.plot(*told[0, [0, 2], 3], "s", color="black", markersize=6, label="start")
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_xlabel("x")
    axis.set_ylabel("z")
    axis.set_title("From above", loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    drawn.draw_without_rendering()  # the aspect widens the limits, and the layout must know their numbers
    return pages.figure(drawn)


def _cloud(axis: Any, tracker: Tracker) -> None:
    """Points at the height of the camera and around it: walls and things, neither floor nor ceiling."""
    if tracker.map is None or tracker.map.points is None:
        return
    points, colours = (x.float().cpu().numpy() for x in tracker.point_cloud())
    if not len(points):
        return
    low, high = np.quantile(points[:, 1], (0.2, 0.8))
    chosen = np.flatnonzero((points[:, 1] >= low) & (points[:, 1] <= high))
    chosen = np.random.default_rng(0).permutation(chosen)[:_POINTS]
    axis.scatter(
        points[chosen, 0],
        points[chosen, 2],
        c=colours[chosen].clip(0, 1),
        s=5,
        alpha=0.5,
        linewidths=0,
        rasterized=True,
    )


def _onto(truth: Array, told: Array) -> Array | None:
    """The true path in the world of the tracked one; None where no alignment is determined."""
    try:
        return metrics.aligned(truth, told)
    except InputError:
        return None


def _confidence(tracks: Sequence[Track], keyframes: Sequence[int]) -> str:
    from vlmattn.drawing import Figure

    sure = [float("nan") if track.confidence is None else float(track.confidence) for track in tracks]
    if not np.isfinite(sure).any():
        return ""
    drawn = Figure(figsize=(9, 1.9), layout="constrained")
    axis = drawn.subplots()
    for number in keyframes:
        axis.axvline(number, color=pages.COLOURS[6], linewidth=0.8, alpha=0.6)
    axis.plot(sure, color=pages.COLOURS[1])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("frame (vertical lines: keyframes)")
    axis.set_title("Confidence", loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    return pages.figure(drawn)


def _keyframes(tracker: Tracker, keyframes: Sequence[int]) -> str:
    if tracker.map is None:
        return ""
    cards = []
    for number, picture in zip(keyframes, tracker.map.images.float().cpu(), strict=False):
        shown = Image.fromarray((picture.permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy())
        cards.append(
            f"<figure>{pages.image(shown, 168)}<figcaption><small>frame {number}</small></figcaption></figure>"
        )
    return "".join(cards)
