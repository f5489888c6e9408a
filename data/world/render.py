"""Scene -> picture: anti-aliased flat shapes at any size, byte for byte the same on every run.

Each shape is a signed distance (negative inside, in units of its radius); coverage of a pixel is the distance of its
centre to the edge, clipped to one pixel. Shapes have about equal areas, so that size says nothing about shape.
"""

import math

import numpy as np

from data.world.scene import BACKGROUNDS, COLOURS, Object, Scene


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draws a scene as uint8 RGB [size, size, 3]."""
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        rows, columns, coverage = footprint(thing, size)
        patch = canvas[rows, columns]  # a view: blending it draws on the canvas
        patch += coverage[:, :, None] * (np.array(COLOURS[thing.colour], np.float32) - patch)
    return np.rint(canvas).astype(np.uint8)


def footprint(thing: Object, size: int) -> tuple[slice, slice, np.ndarray]:
    """The rows and columns that an object may touch, and how much of each pixel there it covers, in [0, 1]."""
    radius = thing.radius * size
    left, top = (max(0, math.floor(c * size - radius - 1)) for c in (thing.x, thing.y))
    right, bottom = (min(size, math.ceil(c * size + radius + 1)) for c in (thing.x, thing.y))
    x = (np.arange(left, right, dtype=np.float32) + 0.5 - thing.x * size)[None, :] / radius
    y = (np.arange(top, bottom, dtype=np.float32) + 0.5 - thing.y * size)[:, None] / radius
    coverage = np.clip(0.5 - signed_distance(thing.shape, x, y) * radius, 0, 1)
    return slice(top, bottom), slice(left, right), coverage


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to a shape's edge, in radii: x [1, W], y [H, 1] -> [H, W], negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 0.88
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.76
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - 1.0) / np.float32(math.sqrt(2))
    if shape == "cross":
        longer, shorter = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(longer - 0.92, shorter - 0.32)
    return polygon_distance(_POLYGONS[shape], x, y)


def polygon_distance(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a simple polygon, corners [N, 2]: nearest edge, sign by crossing number."""
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    inside = np.zeros(nearest.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            inside ^= ((y < ay) != (y < by)) & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -nearest, nearest)


def _triangle() -> np.ndarray:
    return np.array([(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)], np.float32)


def _star() -> np.ndarray:
    angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
    return np.array(
        [
            ((1.0 if k % 2 == 0 else 0.45) * math.cos(a), (1.0 if k % 2 == 0 else 0.45) * math.sin(a))
            for k, a in enumerate(angles)
        ],
        np.float32,
    )


_POLYGONS = {"triangle": _triangle(), "star": _star()}
