"""Picture -> background and blobs: which pixels belong together, what colour they are, how much of each is covered.

Each pixel is named after the palette colour that explains it best as a mix with the background, so that soft edges
count for the object they bound. Blobs grow from cores (pixels surrounded by their own name), which keeps objects apart that
touch at a corner; cores of one colour that meet along a broad front are one blob; a patch without any core, of a colour
between two names or of many, is a blob too.

Shape letters: H W pixels, K palette colours.
"""

import math
from dataclasses import dataclass

import numpy as np

from data.world.scene import COLOURS

PALETTE = np.array(list(COLOURS.values()), np.float32)  # [K, 3]
IGNORED_AREA = 0.005  # blobs below this share of the canvas (20 pixels of 64 x 64) are artefacts, not objects
HALF = 0.5  # a pixel belongs to a blob where at least so much of it is covered
ONE_COLOUR = 60.0  # neighbouring patches whose colours are nearer than this, in levels of 255, may be one blob
MOST_BLOBS = 12  # noise breaks into many; the largest ones suffice to say that it is no scene


@dataclass(frozen=True)
class Blob:
    """A patch of one colour: `coverage` [h, w], about 0 to 1, lies at row `top` and column `left` of the picture."""

    colour: np.ndarray  # [3], levels of 255
    coverage: np.ndarray
    top: int
    left: int


@dataclass(frozen=True)
class Segments:
    """The background's colour [3], the blobs, and which pixels [H, W] the blobs and their soft edges take up."""

    background: np.ndarray
    blobs: tuple[Blob, ...]
    taken: np.ndarray


def segment(pixels: np.ndarray) -> Segments:
    """Takes a picture apart: float32 RGB [H, W, 3] in [0, 255] -> background and blobs, largest first."""
    background = border_colour(pixels)
    names, mixes = name_pixels(pixels, background)
    covered = mixes >= HALF
    least = IGNORED_AREA * names.size
    cores = np.where(covered & (like_around(np.where(covered, names, -1)) >= 7), names + 1, 0)
    owner = grow(label(cores), covered)
    rest = label(np.where(covered & (owner == 0), 1, 0))
    owner = unite(pixels, np.where(rest > 0, rest + owner.max(), owner))
    areas = np.bincount(owner.ravel())
    areas[0] = 0
    kept = [int(k) for k in np.argsort(-areas, kind="stable")[:MOST_BLOBS] if areas[k] >= least]
    wide = widen(widen(owner))
    blobs = tuple(cut_out(pixels, background, wide == k, owner == k) for k in kept)
    return Segments(background, blobs, widen(wide) > 0)


def border_colour(pixels: np.ndarray) -> np.ndarray:
    """The median colour of the outermost pixels, which no object reaches."""
    ring = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    return np.median(ring, axis=0)


def name_pixels(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The palette colour [H, W] whose mix with the background comes nearest to each pixel, and its share of the mix."""
    axes = PALETTE - background  # [K, 3]
    lengths = np.maximum((axes**2).sum(1), 1e-6)
    offsets = pixels - background
    dots = offsets @ axes.T  # [H, W, K]
    shares = np.clip(dots / lengths, 0, 1)
    misfit = shares * (shares * lengths - 2 * dots)  # squared distance to the mix, less the same |offset|^2 for all K
    best = misfit.argmin(-1)
    return best, np.take_along_axis(shares, best[..., None], -1)[..., 0]


def like_around(names: np.ndarray) -> np.ndarray:
    """How many of a pixel's eight neighbours bear its name [H, W]; 0 on the border."""
    centre = names[1:-1, 1:-1]
    height, width = names.shape
    count = np.zeros(names.shape, np.int8)
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)):
        count[1:-1, 1:-1] += names[row : height - 2 + row, column : width - 2 + column] == centre
    return count


def grow(owner: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Spreads labels over allowed pixels, one pixel at a time, at most a sixth of the picture far."""
    for _ in range(max(owner.shape) // 6):
        grown = np.where(allowed, widen(owner), 0)
        if np.array_equal(grown, owner):
            break
        owner = grown
    return owner


def widen(owner: np.ndarray) -> np.ndarray:
    """Gives each free pixel the label of a labelled neighbour, if there is one."""
    across = owner.copy()
    np.maximum(across[:, 1:], owner[:, :-1], out=across[:, 1:])
    np.maximum(across[:, :-1], owner[:, 1:], out=across[:, :-1])
    around = across.copy()
    np.maximum(around[1:], across[:-1], out=around[1:])
    np.maximum(around[:-1], across[1:], out=around[:-1])
    return np.where(owner > 0, owner, around)


def unite(pixels: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Joins neighbours of about one colour whose common edge is longer than half the width of the smaller one."""
    pairs = np.concatenate(
        [
            np.stack([owner[:, 1:].ravel(), owner[:, :-1].ravel()], 1),
            np.stack([owner[1:].ravel(), owner[:-1].ravel()], 1),
        ]
    )
    pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs.min(1) > 0)]
    if not len(pairs):
        return owner
    edges, lengths = np.unique(np.sort(pairs, axis=1), axis=0, return_counts=True)
    areas = np.bincount(owner.ravel())
    new = np.arange(len(areas))
    for (a, b), length in zip(edges.tolist(), lengths.tolist(), strict=True):
        colours = [np.median(pixels[owner == k], axis=0) for k in (a, b)]
        if length > math.sqrt(min(areas[a], areas[b])) / 2 and np.linalg.norm(colours[0] - colours[1]) < ONE_COLOUR:
            new[new == new[b]] = new[a]
    return new[owner]


def label(values: np.ndarray) -> np.ndarray:
    """Numbers the connected patches (by edges) of equal non-zero values from 1 on: joins runs of rows that overlap."""
    changes = np.ones((values.shape[0], values.shape[1] + 1), bool)
    changes[:, 1:-1] = values[:, 1:] != values[:, :-1]
    rows, edges = np.nonzero(changes)
    inside = rows[1:] == rows[:-1]
    rows, starts, ends = rows[:-1][inside], edges[:-1][inside], edges[1:][inside]
    filled = values[rows, starts] != 0
    rows, starts, ends = rows[filled], starts[filled], ends[filled]
    kinds = values[rows, starts].tolist()
    parent = list(range(len(kinds)))
    _join(parent, rows.tolist(), starts.tolist(), ends.tolist(), kinds)
    roots = [_root(parent, i) for i in parent]
    numbers = {root: n for n, root in enumerate(dict.fromkeys(roots), start=1)}
    labels = np.zeros(values.shape, np.int64)
    for row, start, end, root in zip(rows.tolist(), starts.tolist(), ends.tolist(), roots, strict=True):
        labels[row, start:end] = numbers[root]
    return labels


def cut_out(pixels: np.ndarray, background: np.ndarray, wide: np.ndarray, body: np.ndarray) -> Blob:
    """One blob with two pixels of margin: the median colour of its inside, and coverage measured from background to it."""
    rows, columns = np.nonzero(wide.any(1))[0], np.nonzero(wide.any(0))[0]
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside = body & (like_around(body) == 8)
    colour = np.median(pixels[inside if inside.any() else body], axis=0)
    axis = colour - background
    share = (pixels[window] - background) @ axis / max(float(axis @ axis), 1e-6)  # [h, w]
    return Blob(colour, np.where(wide[window], np.clip(share, -0.5, 1.5), 0), int(rows[0]), int(columns[0]))


def _join(parent: list[int], rows: list[int], starts: list[int], ends: list[int], kinds: list[int]) -> None:
    """Unites runs of neighbouring rows that overlap and are of a kind; the runs come in reading order."""
    above = 0
    for i, row in enumerate(rows):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= starts[i]):
            above += 1
        other = above
        while rows[other] == row - 1 and starts[other] < ends[i]:
            if kinds[other] == kinds[i]:
                parent[_root(parent, i)] = _root(parent, other)
            other += 1


def _root(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = i = parent[parent[i]]
    return i
