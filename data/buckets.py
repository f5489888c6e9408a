"""Pictures of any aspect ratio -> batches of one shape: a few shapes of about one area, and which one a picture gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from data.transforms import Shape


@dataclass(frozen=True)
class Buckets:
    """Shapes whose sides are multiples of `step` pixels, of at most the area of `size` x `size`, and at most `max_aspect`
    times as long as wide; the square is among them."""

    size: int
    max_aspect: float
    step: int

    def __post_init__(self) -> None:
        if self.max_aspect < 1:
            raise ValueError(f"data.max_aspect is {self.max_aspect}; give 1 (squares alone) or more")
        if self.step < 1 or self.size % self.step:
            raise ValueError(
                f"data.bucket_step is {self.step}; give a number of pixels that divides data.image_size {self.size}"
            )

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """(height, width) of every bucket, from the tallest to the widest: for each width the largest height."""
        most = self.size // self.step
        found = []
        for columns in range(1, most**2 + 1):
            rows = most**2 // columns
            fits = max(rows, columns) <= self.max_aspect * min(rows, columns)
            wasteful = rows == most**2 // (columns + 1)  # the next width has the same height
            if fits and not wasteful:
                found.append((rows * self.step, columns * self.step))
        return tuple(found)

    def nearest(self, sizes: np.ndarray | Sequence[Shape]) -> np.ndarray:
        """[pictures, 2] heights and widths -> [pictures] the number of the bucket whose aspect ratio is nearest, that is, of
        which least is cut; the square for a picture of unknown size (0, 0)."""
        given = np.maximum(np.asarray(sizes, dtype=np.float64).reshape(-1, 2), 1)
        own = np.log([height / width for height, width in self.shapes])  # [buckets], falling
        borders = (own[1:] + own[:-1]) / 2
        return np.searchsorted(-borders, -np.log(given[:, 0] / given[:, 1]))  # [pictures]

    def shape_of(self, picture: Image.Image) -> Shape:
        """(height, width) of the bucket of an upright picture."""
        return self.shapes[int(self.nearest([(picture.height, picture.width)])[0])]
