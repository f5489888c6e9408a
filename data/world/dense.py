"""Scene -> which colour and which shape lies at each point of a grid: what a vision tower can be taught before words."""

import numpy as np

from data.world.render import footprint
from data.world.scene import BACKGROUNDS, COLOURS, SHAPES, Scene

COLOUR_NAMES = (*BACKGROUNDS, *COLOURS)
SHAPE_NAMES = ("background", *SHAPES)


def colour_and_shape(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers into COLOUR_NAMES and SHAPE_NAMES of what covers most of grid x grid cells, int64 [grid, grid] each."""
    colours = np.full((grid, grid), COLOUR_NAMES.index(scene.background))
    shapes = np.zeros((grid, grid), np.int64)
    for thing in scene.objects:
        rows, columns, coverage = footprint(thing, grid)
        inside = coverage > 0.5
        colours[rows, columns][inside] = COLOUR_NAMES.index(thing.colour)
        shapes[rows, columns][inside] = SHAPE_NAMES.index(thing.shape)
    return colours, shapes
