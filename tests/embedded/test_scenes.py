"""The generator: everything about a scene follows from its seed and index, and the labels are true."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from vlmattn.embedded.scenes import CATEGORIES, IMAGE_SIZE, PARTNER, VISIBILITY, make_scene


def test_scenes_are_pinned():
    """The same scenes on every machine: the evaluation sets must not move."""
    lines = "".join(
        repr(make_scene(12, i, look, broken)[0]) for i in range(4) for look in VISIBILITY for broken in (0.0, 1.0)
    )
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "d4e516de19bb3dfb"


def test_a_scene_does_not_depend_on_those_before_it():
    alone, picture = make_scene(5, 3)
    for i in range(3):
        make_scene(5, i)
    again, same = make_scene(5, 3)
    assert again == alone
    assert np.array_equal(picture, same)
    assert make_scene(6, 3)[0] != alone


@pytest.mark.parametrize("look", VISIBILITY)
def test_visibility_keeps_its_ranges(look):
    (low, high), (small, large) = VISIBILITY[look]
    things = [thing for i in range(60) for thing in make_scene(1, i, look)[0].things]
    assert all(low <= t.opacity <= high and small <= t.size <= large for t in things)
    assert {t.category for t in things} == set(CATEGORIES)


def test_things_are_drawn_where_they_are_said_to_be():
    scene, picture = make_scene(2, 7, "clear", count=1)
    (thing,) = scene.things
    assert picture.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    x, y = thing.corner
    inside = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    inside[y : y + thing.size, x : x + thing.size] = True
    grey = picture.astype(float).std(axis=-1)
    assert abs(grey[inside].mean() - grey[~inside].mean()) > 3


def test_broken_scenes_have_no_partners():
    for i in range(100):
        names = make_scene(3, i, prior_broken=1.0)[0].categories
        assert not any(PARTNER[name] in names for name in names)
