"""Picture -> scene graph, from pixels alone: the judge of drawn images.

Each blob is compared with all six shapes, drawn by the renderer's own geometry at the blob's centre and area, sharp and
softened. Three scores in [0, 1] say how sure the reading is, and a word is claimed only from `CLAIMED` on:

    shape   how well the best shape fits, and how far the blob lies from the middle of a morph to the next best one
    colour  how near the colour comes to the palette, and how far it lies from the middle of a mix of two entries
    size    how far the radius lies from the middle between small and large, or beyond them

What is below is reported as "unclear". Blobs smaller than `blobs.IGNORED_AREA` of the canvas are ignored.

Shape letters: H W pixels, h w a blob's window, S shapes, K palette colours.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from data.world.blobs import Blob, segment
from data.world.render import signed_distance
from data.world.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene

UNCLEAR = "unclear"
CLAIMED = 0.5
COLOUR_REACH = 80.0  # a colour this far from its palette entry, in levels of 255, scores zero
MISFIT = 0.225  # a shape's score falls to 0.5 where its misfit, root mean square over its area, is this
STRAY_LEVELS = 16.0  # ground that differs more from the background's colour, in levels of 255, is unexplained
STRAY_SHARE = 0.025  # at this share of unexplained ground, and
GRAIN_LEVELS = 20.0  # at this much noise, in levels of 255, a reading's confidence falls to 0.5
LEAST_SIZE = 48  # pixels; below, a small star is a smudge
WORKING_SIZE = 64  # larger pictures are averaged down to less than twice this

EXTENT = 1.6  # the tables of signed distance reach so many radii from the centre
RESOLUTION = 64  # table entries per radius


@dataclass(frozen=True)
class Found:
    """One object as read: words or "unclear", its centre in [0, 1] with y down, its radius as a share of the canvas."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    confidence: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows. `confidence` in [0, 1] is that of its weakest part: the background or any object."""

    background: str
    objects: tuple[Found, ...]
    confidence: float

    @property
    def clear(self) -> bool:
        """Whether no word had to be withheld and the background is free of unexplained pixels."""
        return self.confidence >= CLAIMED

    def scene(self) -> Scene:
        """The same as a scene graph; "unclear" words are kept, and equal no word of a caption."""
        return Scene(self.background, tuple(Object(o.shape, o.colour, o.size, o.x, o.y) for o in self.objects))


def read(image: np.ndarray) -> Reading:
    """Reads a square picture, uint8 RGB [H, W, 3]; objects come in reading order.

    Raises:
        ValueError: the picture is not square, not uint8 RGB, or smaller than 48 x 48.
    """
    pixels = _working_pixels(image)
    segments = segment(pixels)
    size = pixels.shape[0]
    objects = sorted((identify(blob, size) for blob in segments.blobs), key=lambda o: (round(o.y, 1), o.x))
    background, score = nearest_word(segments.background, BACKGROUNDS)
    stray = stray_share(pixels - segments.background, ~segments.taken)
    score = min(score, 1 - stray / (2 * STRAY_SHARE), 1 - grain(image) / (2 * GRAIN_LEVELS))
    return Reading(background, tuple(objects), max(0.0, min([score, *(o.confidence for o in objects)])))


def stray_share(offsets: np.ndarray, ground: np.ndarray) -> float:
    """The share of the ground [H, W] in blocks of 4 x 4 pixels that lie off the background's colour on average."""
    side = ground.shape[0] // 4
    blocks = (slice(0, 4 * side), slice(0, 4 * side))
    counts = ground[blocks].reshape(side, 4, side, 4).sum((1, 3))
    sums = np.where(ground[..., None], offsets, 0)[blocks].reshape(side, 4, side, 4, 3).sum((1, 3))
    off = np.abs(sums).max(-1) > STRAY_LEVELS * np.maximum(counts, 4)  # few pixels are too noisy a mean
    return float(counts[off].sum()) / max(float(counts.sum()), 1.0)


def grain(image: np.ndarray) -> float:
    """The median step between neighbouring pixels of a row, in levels: about the noise's sigma; 0 on a flat picture."""
    rows = image[:: max(1, image.shape[0] // WORKING_SIZE)].astype(np.int16)
    return float(np.median(np.abs(np.diff(rows, axis=1))))


def identify(blob: Blob, size: int) -> Found:
    """Names a blob of a picture with `size` pixels a side."""
    fit = fit_shape(blob.coverage)
    colour, colour_score = nearest_word(blob.colour, COLOURS)
    word, size_score = nearest_size(fit.radius / size)
    return Found(
        fit.shape if fit.score >= CLAIMED else UNCLEAR,
        colour,
        word,
        (blob.left + fit.x) / size,
        (blob.top + fit.y) / size,
        fit.radius / size,
        min(fit.score, colour_score, size_score),
    )


@dataclass(frozen=True)
class Fit:
    """The shape nearest to a blob, how sure it is, and its centre in the blob's window and radius, in pixels."""

    shape: str
    score: float
    x: float
    y: float
    radius: float


def fit_shape(coverage: np.ndarray) -> Fit:
    """Compares coverage [h, w] with all shapes of its area and centre.

    The score is the lower of two: the fit, from the root of the squared differences e1 over the shape's area; and the
    margin (e2 - e1) / d to another shape, with d the squared distance between the two: 1 on the best shape, 0 half way.
    """
    drawn, x, y, radii = _candidates(coverage)  # drawn [3, S, h, w]
    differences = ((drawn - coverage) ** 2).sum((2, 3))  # [3, S]
    softness, best = np.unravel_index(differences.argmin(), differences.shape)
    to_each = differences[softness]  # [S]
    apart = ((drawn[softness] - drawn[softness, best]) ** 2).sum((1, 2))  # [S]
    margin = float(np.delete((to_each - to_each[best]) / np.maximum(apart, 1e-6), best).min())
    misfit = math.sqrt(to_each[best] / max(float((drawn[softness, best] ** 2).sum()), 1e-6))
    score = max(0.0, min(1 - misfit / (2 * MISFIT), margin))
    return Fit(SHAPES[best], score, float(x[best]), float(y[best]), float(radii[best]))


def nearest_word(colour: np.ndarray, words: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    """The palette entry nearest to a colour, or "unclear", and how sure that is."""
    entries = np.array(list(words.values()), np.float32)  # [K, 3]
    squares = ((entries - colour) ** 2).sum(1)
    best = int(squares.argmin())
    apart = ((entries - entries[best]) ** 2).sum(1)
    margin = float(np.delete((squares - squares[best]) / np.maximum(apart, 1e-6), best).min())
    score = max(0.0, min(margin, 1 - math.sqrt(squares[best]) / COLOUR_REACH))
    return (list(words)[best] if score >= CLAIMED else UNCLEAR), score


def nearest_size(radius: float) -> tuple[str, float]:
    """The size whose radius comes nearest in ratio, or "unclear", and how sure that is: 1 on it, 0 half way to the other."""
    step = math.log(SIZES["large"] / SIZES["small"])
    away = {word: abs(math.log(max(radius, 1e-6) / r)) / step for word, r in SIZES.items()}
    word = min(away, key=lambda name: away[name])
    score = max(0.0, 1 - 2 * away[word])
    return (word if score >= CLAIMED else UNCLEAR), score


def _candidates(coverage: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All shapes of coverage's [h, w] mass and centroid, drawn sharp and softened twice: [3, S, h, w]; x, y, radius [S]."""
    tables, areas, centroids = _tables()
    h, w = coverage.shape
    mass = max(float(coverage.sum()), 1.0)
    across, down = np.arange(w) + 0.5, np.arange(h) + 0.5
    radii = np.sqrt(mass / areas)  # [S]
    x = (coverage.sum(0) @ across) / mass - centroids[:, 0] * radii
    y = (coverage.sum(1) @ down) / mass - centroids[:, 1] * radii
    columns, rows = _entry((across - x[:, None]) / radii[:, None]), _entry((down - y[:, None]) / radii[:, None])
    distance = tables[np.arange(len(SHAPES))[:, None, None], rows[:, :, None], columns[:, None, :]]
    sharp = np.clip(0.5 - distance * radii[:, None, None].astype(np.float32), 0, 1)
    soft = _soften(sharp)
    return np.stack([sharp, soft, _soften(soft)]), x, y, radii


def _soften(drawn: np.ndarray) -> np.ndarray:
    """Binomial blur, sigma 0.71 pixels, over the last two axes; nothing lies beyond their ends."""
    across = drawn / 2
    across[..., 1:] += drawn[..., :-1] / 4
    across[..., :-1] += drawn[..., 1:] / 4
    around = across / 2
    around[..., 1:, :] += across[..., :-1, :] / 4
    around[..., :-1, :] += across[..., 1:, :] / 4
    return around


def _entry(radii: np.ndarray) -> np.ndarray:
    return np.clip(np.rint((radii + EXTENT) * RESOLUTION), 0, 2 * EXTENT * RESOLUTION).astype(np.int64)


@cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distances of all shapes [S, T, T] over a fine grid in radii; their areas [S] and centroids (x, y) [S, 2]."""
    grid = np.arange(-EXTENT, EXTENT + 0.5 / RESOLUTION, 1 / RESOLUTION).astype(np.float32)  # [T]
    tables = np.stack([np.asarray(signed_distance(shape, grid[None], grid[:, None]), np.float32) for shape in SHAPES])
    inside = np.clip(0.5 - tables * RESOLUTION, 0, 1)
    counts = inside.sum((1, 2))
    x, y = (inside.sum(1) @ grid) / counts, (inside.sum(2) @ grid) / counts
    return tables, counts / RESOLUTION**2, np.stack([x, y], 1)


def _working_pixels(image: np.ndarray) -> np.ndarray:
    """Checks a picture and averages a large one down: float32 [H, W, 3] with H below 128."""
    got = f"got {image.dtype} {list(image.shape)}"
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: needs uint8 RGB [H, W, 3], {got}; convert it first")
    if image.shape[0] != image.shape[1] or image.shape[0] < LEAST_SIZE:
        raise ValueError(f"image: needs a square of at least {LEAST_SIZE} pixels a side, {got}; resize it first")
    factor = image.shape[0] // WORKING_SIZE
    if factor > 1:
        image = np.asarray(Image.fromarray(image).reduce(factor))
    return image.astype(np.float32)
