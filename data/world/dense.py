"""Scene -> which colour and which shape lies at each point of a grid: what a vision tower can be taught before words."""

import numpy as np

from data.world.render import footprint
from data.world.scene import BACKGROUNDS, COLOURS, SHAPES, Scene

COLOUR_NAMES = (*BACKGROUNDS, *COLOURS)
SHAPE_NAMES = ("background", *SHAPES)


def colour_and_shape(scene: Scene, grid: int, pixels_per_point: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Numbers into COLOUR_NAMES and SHAPE_NAMES at the centres of grid x grid cells, each [grid, grid] int64."""
    size = grid * pixels_per_point
    colours = np.full((size, size), COLOUR_NAMES.index(scene.background))
    shapes = np.zeros((size, size), np.int64)
    for thing in scene.objects:
        rows, columns, coverage = footprint(thing, size)
        inside = coverage > 0.5
        colours[rows, columns][inside] = COLOUR_NAMES.index(thing.colour)
        shapes[rows, columns][inside] = SHAPE_NAMES.index(thing.shape)
    centres = slice(pixels_per_point // 2, None, pixels_per_point)
    return colours[centres, centres], shapes[centres, centres]
