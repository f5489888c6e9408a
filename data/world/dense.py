"""Scene -> which colour and which shape lies at each point of a grid: what a vision tower can be taught before words.

Letters: B batch, T tokens in reading order, K points of a token's cell."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def points_of(scenes: Sequence[dict[str, Any]], side: int, points: int) -> tuple[Tensor, Tensor]:
    """Scenes in JSON -> colours and shapes, [B, T, K] each, at points x points places in each of side x side cells."""
    told = [colour_and_shape(Scene.from_json(scene), side * points) for scene in scenes]

    def by_cell(values: np.ndarray) -> np.ndarray:
        cells = values.reshape(side, points, side, points).transpose(0, 2, 1, 3)
        return cells.reshape(side * side, points * points)

    colours, shapes = (torch.from_numpy(np.stack([by_cell(part) for part in parts])) for parts in zip(*told, strict=True))
    return colours, shapes
