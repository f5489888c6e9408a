"""Scenes: pure functions of their address that keep the rules of their split."""

import math
from collections import Counter
from itertools import combinations

import pytest

from data.world.edits import keeps_rules
from data.world.scene import (
    COLOURS,
    GAP,
    HELD_OUT_PAIRS,
    OPPOSITE,
    SHAPES,
    SPLITS,
    Object,
    Scene,
    make_scene,
    relation,
)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_keep_the_rules(split):
    for index in range(400):
        scene = make_scene(7, index, split)
        assert keeps_rules(scene, split)
        for a, b in combinations(scene.objects, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + GAP


def test_a_scene_depends_on_its_address_alone():
    forwards = [make_scene(1, index) for index in range(50)]
    assert [make_scene(1, index) for index in reversed(range(50))] == forwards[::-1]
    assert len({make_scene(seed, 0, split) for seed in range(20) for split in SPLITS}) == 80


def test_the_stream_is_the_same_on_every_platform():
    """Shards and trained weights stand on it; a change here is a new world."""
    scene = make_scene(0, 0, "train")
    assert scene == Scene("gray", (Object("cross", "purple", "large", 0.5642, 0.3817),))


def test_json_round_trip():
    for index in range(50):
        scene = make_scene(2, index, "counts")
        assert Scene.from_json(scene.to_json()) == scene


def test_each_colour_and_shape_is_seen_but_no_held_out_pair():
    seen = Counter((o.colour, o.shape) for i in range(1500) for o in make_scene(0, i).objects)
    assert set(seen) == {(c, s) for c in COLOURS for s in SHAPES} - HELD_OUT_PAIRS
    held_out = {(o.colour, o.shape) for i in range(300) for o in make_scene(0, i, "pairs").objects}
    assert held_out >= HELD_OUT_PAIRS


def test_relation_turns_round_and_needs_a_clear_axis():
    seen = Counter()
    for index in range(300):
        for a, b in combinations(make_scene(3, index).objects, 2):
            forwards, backwards = relation(a, b), relation(b, a)
            assert backwards == (OPPOSITE[forwards] if forwards else None)
            seen[forwards] += 1
    assert set(seen) == {*OPPOSITE, None}
    here = Object("circle", "red", "small", 0.3, 0.3)
    assert relation(here, Object("square", "blue", "small", 0.6, 0.6)) is None
    assert relation(here, Object("square", "blue", "small", 0.8, 0.4)) == "left of"
    assert relation(here, Object("square", "blue", "small", 0.35, 0.8)) == "above"


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split: 'test' is unknown; choose one of train"):
        make_scene(0, 0, "test")
