"""Pictures: the same bytes every time, the right colours in the right places, one picture at every size."""

import hashlib

import numpy as np
import pytest

from data.world.render import footprint, polygon_distance, render, signed_distance
from data.world.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene, make_scene

GRID = np.linspace(-1.5, 1.5, 301, dtype=np.float32)


def test_the_bytes_are_the_same_on_every_run():
    """Shards and trained weights stand on them; a change here is a new world."""
    pictures = b"".join(render(make_scene(0, index), 64).tobytes() for index in range(20))
    assert hashlib.sha256(pictures).hexdigest()[:16] == "4060b36cca6845af"


@pytest.mark.parametrize("size", [48, 64, 100])
def test_middle_and_corner_have_the_palette_colours(size):
    for index in range(30):
        scene = make_scene(1, index, "counts")
        picture = render(scene, size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        assert tuple(picture[0, 0]) == BACKGROUNDS[scene.background]
        for thing in scene.objects:
            assert tuple(picture[int(thing.y * size), int(thing.x * size)]) == COLOURS[thing.colour]


def test_small_pictures_are_large_ones_averaged():
    """Coverage by distance is the same as supersampling, up to corners."""
    for index in range(20):
        scene = make_scene(2, index)
        fine = render(scene, 512).astype(np.float32).reshape(64, 8, 64, 8, 3).mean((1, 3))
        difference = np.abs(fine - render(scene, 64))
        assert difference.mean() < 0.3
        assert np.quantile(difference, 0.99) < 30
        assert difference.max() < 110  # the tip of a star


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distance(shape):
    """Negative inside, mirror symmetric, steps no faster than the distance itself, within the reach of a renderer's box."""
    distance = signed_distance(shape, GRID[None], GRID[:, None])
    assert distance[150, 150] < 0 < distance[0].min()
    np.testing.assert_allclose(distance, distance[:, ::-1], atol=1e-5)
    assert max(np.abs(np.diff(distance, axis=axis)).max() for axis in (0, 1)) <= 0.01 + 1e-5
    reached = np.abs(GRID[(distance < 0).any(0)]).max()
    assert 0.7 < reached <= 1.0


def test_polygon_distance_equals_the_closed_form_of_a_square():
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)], np.float32)
    ours = polygon_distance(corners, GRID[None], GRID[:, None])
    x, y = np.abs(GRID)[None] - 0.5, np.abs(GRID)[:, None] - 0.5
    exact = np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0)
    np.testing.assert_allclose(ours, exact, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_footprint_holds_the_whole_object(shape, size):
    thing = Object(shape, "red", size, 0.4321, 0.5678)
    rows, columns, coverage = footprint(thing, 64)
    assert coverage.min() >= 0
    assert coverage.max() == 1
    for edge in (coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]):
        assert edge.max() < 0.05
    whole = render(Scene("black", (thing,)), 64)
    changed = (whole != np.array(BACKGROUNDS["black"])).any(-1)
    assert changed.sum() == changed[rows, columns].sum()
