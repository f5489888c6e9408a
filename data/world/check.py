"""How well the reader reads: clean and damaged renders must come back right, deceptive pictures must not be believed."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from data.interval import wilson
from data.world.reader import Reading, read
from data.world.render import render, signed_distance
from data.world.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, SPLITS, Scene, make_scene

POSITION_TOLERANCE = 1.5 / 64  # of the canvas

Drawn = tuple[Scene | None, np.ndarray]
"""What a reader should find, or None where nothing is to be found, and the picture."""


@dataclass(frozen=True)
class Tally:
    """Of `pictures` of one kind: read `right`, read `wrong` yet called clear; and the mean CPU time of a reading."""

    kind: str
    pictures: int
    right: int
    wrong: int
    milliseconds: float

    def measures(self) -> dict[str, dict[str, float | str | None]]:
        """The same as the measures of --json."""
        name = f"reader.{self.kind}"
        time = {"value": self.milliseconds, "low": None, "high": None, "n": self.pictures, "unit": "ms"}
        shares = {"right": self.right, "wrong": self.wrong}
        return {f"{name}.{key}": share(k, self.pictures) for key, k in shares.items()} | {f"{name}.time": time}


def check(pictures: Mapping[str, int], seed: int, size: int = 64) -> Iterator[tuple[str, bool, bool, float]]:
    """Reads so many pictures of each kind; yields (kind, right, wrong yet called clear, seconds of CPU) for each."""
    for kind, count in pictures.items():
        for index in range(count):
            scene = make_scene(seed, index, SPLITS[index % len(SPLITS)])
            truth, picture = KINDS[kind](scene, size, np.random.default_rng([seed, index]))
            start = time.thread_time()
            reading = read(picture)
            seconds = time.thread_time() - start
            right = truth is not None and agrees(reading, truth)
            yield kind, right, reading.clear and not right, seconds


def tally(results: Iterable[tuple[str, bool, bool, float]]) -> dict[str, Tally]:
    """Adds up the results of `check` by kind of picture."""
    rows: dict[str, list[tuple[bool, bool, float]]] = {}
    for kind, right, wrong, seconds in results:
        rows.setdefault(kind, []).append((right, wrong, seconds))
    tallies = {}
    for kind, row in rows.items():
        right, wrong, seconds = (sum(column) for column in zip(*row, strict=True))
        tallies[kind] = Tally(kind, len(row), int(right), int(wrong), 1000 * seconds / len(row))
    return tallies


def share(successes: int, n: int) -> dict[str, float | str | None]:
    """A share with its 95 % interval."""
    low, high = wilson(successes, n)
    return {"value": successes / n, "low": low, "high": high, "n": n, "unit": "share"}


def agrees(reading: Reading, scene: Scene) -> bool:
    """Whether a reading names the background and each object of a scene, at its place and nothing else."""
    if reading.background != scene.background or len(reading.objects) != len(scene.objects):
        return False
    left = list(reading.objects)
    for thing in scene.objects:
        words = (thing.shape, thing.colour, thing.size)
        near = (
            found
            for found in left
            if (found.shape, found.colour, found.size) == words
            and math.hypot(found.x - thing.x, found.y - thing.y) <= POSITION_TOLERANCE
        )
        match = next(near, None)
        if match is None:
            return False
        left.remove(match)
    return True


def soften(picture: np.ndarray, sigma: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur of `sigma` pixels, then gaussian noise of `noise` levels: uint8 [H, W, 3] -> the same."""
    return to_bytes(blur(picture.astype(np.float32), sigma) + rng.normal(0, noise, picture.shape))


def blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur along rows and columns, edges repeated: float [H, W, 3] -> the same."""
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        ends = [(reach, reach) if axis == a else (0, 0) for a in range(3)]
        padded = np.pad(picture, ends, mode="edge")
        n = picture.shape[axis]
        picture = np.add.reduce([w * np.take(padded, range(i, i + n), axis) for i, w in enumerate(weights)])
    return picture


def wave(picture: np.ndarray, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Shifts pixels by a smooth random field of `amplitude` pixels (root mean square): float [H, W, 3] -> the same."""
    size = picture.shape[0]
    field = blur(rng.normal(0, 1, (size, size, 2)), size / 16)
    field *= amplitude / field.std()
    rows, columns = (np.clip(np.indices((size, size))[i] + field[..., i], 0, size - 1.001) for i in (0, 1))
    r, c = rows.astype(int), columns.astype(int)
    down, right = (rows - r)[..., None], (columns - c)[..., None]
    upper = picture[r, c] * (1 - right) + picture[r, c + 1] * right
    lower = picture[r + 1, c] * (1 - right) + picture[r + 1, c + 1] * right
    return upper * (1 - down) + lower * down


def morph(first: str, second: str, share: float, size: int, rng: random.Random) -> np.ndarray:
    """One object on the way from one shape to another, of a random place, size, colour and background."""
    radius = rng.choice(sorted(SIZES.values()))
    centre = [rng.uniform(0.3, 0.7) for _ in range(2)]
    x, y = (((np.arange(size, dtype=np.float32) + 0.5) / size - c) / radius for c in centre)
    ends = [signed_distance(shape, x[None], y[:, None]) for shape in (first, second)]
    coverage = np.clip(0.5 - ((1 - share) * ends[0] + share * ends[1]) * radius * size, 0, 1)[..., None]
    ground, colour = (np.array(rng.choice(list(words.values()))) for words in (BACKGROUNDS, COLOURS))
    return to_bytes(ground + coverage * (colour - ground))


def to_bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _clean(scene: Scene, size: int, rng: np.random.Generator) -> Drawn:
    return scene, render(scene, size)


def _soft(scene: Scene, size: int, rng: np.random.Generator) -> Drawn:
    """What a mild autoencoder does: blur of 0.7 pixels, noise of 6 levels."""
    return scene, soften(render(scene, size), 0.7 * size / 64, 6, rng)


def _sketchy(scene: Scene, size: int, rng: np.random.Generator) -> Drawn:
    """What a small diffusion model does: wavy outlines, a tint, specks of up to 3 x 3 pixels, soft edges and noise."""
    picture = wave(render(scene, size).astype(np.float32), 0.6 * size / 64, rng) + rng.uniform(-10, 10, 3)
    for _ in range(3):
        row, column = rng.integers(0, size - 3, 2)
        height, width = rng.integers(1, 4, 2) * size // 64
        picture[row : row + height, column : column + width] = rng.uniform(0, 255, 3)
    return scene, soften(to_bytes(picture), 0.7 * size / 64, 6, rng)


def _blurred(scene: Scene, size: int, rng: np.random.Generator) -> Drawn:
    return scene, soften(render(scene, size), 4 * size / 64, 0, rng)


def _noise(scene: Scene, size: int, rng: np.random.Generator) -> Drawn:
    return None, rng.integers(0, 256, (size, size, 3), dtype=np.uint8)


def _crossfade(scene: Scene, size: int, rng: np.random.Generator) -> Drawn:
    other = make_scene(int(rng.integers(1 << 30)), 0, "val")
    return None, to_bytes((render(scene, size).astype(np.float32) + render(other, size)) / 2)


def _morph(scene: Scene, size: int, rng: np.random.Generator) -> Drawn:
    """Half way between two shapes; that between square and diamond is left out: a regular octagon passes for a circle."""
    stream = random.Random(int(rng.integers(1 << 30)))
    first, second = stream.choice([p for p in combinations(SHAPES, 2) if p != ("square", "diamond")])
    return None, morph(first, second, 0.5, size, stream)


KINDS: dict[str, Callable[[Scene, int, np.random.Generator], Drawn]] = {
    "clean": _clean,
    "soft": _soft,
    "sketchy": _sketchy,
    "blurred": _blurred,
    "crossfade": _crossfade,
    "morph": _morph,
    "noise": _noise,
}
"""Kinds of pictures to read; `rng` draws what is random about one."""
