"""(seed, index, split) -> scene graph.

A scene is a background and one to four objects that do not touch. Everything else in the world (pictures, captions,
questions, edits) is computed from it. Python's `random.Random` is used because its stream is the same on every platform.
"""

import hashlib
import math
import random
from dataclasses import asdict, dataclass
from typing import Any

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "cyan": (50, 200, 220),
    "blue": (40, 70, 210),
    "purple": (125, 50, 160),
    "pink": (245, 130, 190),
}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (150, 150, 150), "black": (15, 15, 15), "brown": (100, 65, 40)}
SIZES = {"small": 0.125, "large": 0.18}  # radius, as a fraction of the canvas
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

HELD_OUT_PAIRS = frozenset(
    {
        ("purple", "circle"),
        ("orange", "square"),
        ("blue", "triangle"),
        ("green", "diamond"),
        ("red", "star"),
        ("yellow", "cross"),
    }
)
"""Colour and shape pairs that the splits `train`, `val` and `counts` never show. Each colour and shape is seen apart."""

SPLITS = ("train", "val", "pairs", "counts")
"""`train`; `val`: unseen scenes of the same kind; `pairs`: every scene holds a held-out pair; `counts`: five objects."""

GAP = 0.03  # least distance between two objects and to the border, as a fraction of the canvas
NO_SCENE = "data.sources: a label is no scene of the generated world; give shards of data.world, or class numbers"
RELATION_DISTANCE = 0.2  # centres nearer than this on an axis stand in no clear relation along it


@dataclass(frozen=True)
class Object:
    """One flat shape. `x` and `y` place its centre in [0, 1], y pointing down."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        return SIZES[self.size]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def look(self) -> tuple[str, str, str]:
        """Colour, shape, size."""
        return self.colour, self.shape, self.size


@dataclass(frozen=True)
class Scene:
    """A background and objects that do not touch."""

    background: str
    objects: tuple[Object, ...]

    def to_json(self) -> dict[str, Any]:
        return {"background": self.background, "objects": [asdict(thing) for thing in self.objects]}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Scene":
        """ValueError for an object that is no scene of this world."""
        try:
            scene = Scene(fields["background"], tuple(Object(**thing) for thing in fields["objects"]))
            things = all(t.shape in SHAPES and t.colour in COLOURS and t.size in SIZES for t in scene.objects)
            known = scene.background in BACKGROUNDS and things
        except (KeyError, TypeError) as error:
            raise ValueError(f"{NO_SCENE} ({error!r})") from error
        if not known:
            raise ValueError(f"{NO_SCENE} (it has words that the world does not know)")
        return scene


def random_for(*address: object) -> random.Random:
    """The random stream of an address such as (seed, "caption", 17): the same everywhere, in any order of use."""
    digest = hashlib.blake2b("/".join(map(str, address)).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def make_scene(seed: int, index: int, split: str = "train") -> Scene:
    """Scene number `index` of a split; a pure function of its arguments.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    rng = random_for(seed, "scene", split, index)
    count = 5 if split == "counts" else rng.randint(1, 4)
    kinds = [_kind(rng) for _ in range(count)]
    if split == "pairs":
        kinds[rng.randrange(count)] = rng.choice(sorted(HELD_OUT_PAIRS))
    elif count > 1 and rng.random() < 0.35:
        kinds = _share_an_attribute(kinds, rng)
    return Scene(rng.choice(sorted(BACKGROUNDS)), place(kinds, rng))


def place(kinds: list[tuple[str, str]], rng: random.Random) -> tuple[Object, ...]:
    """Puts (colour, shape) pairs at free positions: largest tried first, shrunk where nothing fits."""
    large_share = 0.5 if len(kinds) < 5 else 0.0
    while True:
        placed: list[Object] = []
        for colour, shape in kinds:
            size = "large" if rng.random() < large_share else "small"
            spot = free_spot(placed, SIZES[size], rng)
            if spot is None:
                break
            placed.append(Object(shape, colour, size, *spot))
        if len(placed) == len(kinds):
            return tuple(placed)
        large_share *= 0.5


def free_spot(placed: list[Object], radius: float, rng: random.Random) -> tuple[float, float] | None:
    """A random centre at which an object of this radius touches nothing, or None after 60 tries."""
    low, high = radius + GAP, 1 - radius - GAP
    for _ in range(60):
        x, y = round(rng.uniform(low, high), 4), round(rng.uniform(low, high), 4)
        if all(math.hypot(x - other.x, y - other.y) >= radius + other.radius + GAP for other in placed):
            return x, y
    return None


def relation(a: Object, b: Object) -> str | None:
    """How `a` stands to `b` along the axis on which they differ most; None where neither axis is clear."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < RELATION_DISTANCE or 0.67 < abs(dx) / max(abs(dy), 1e-6) < 1.5:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _kind(rng: random.Random) -> tuple[str, str]:
    """A (colour, shape) that is not held out."""
    while True:
        kind = rng.choice(sorted(COLOURS)), rng.choice(SHAPES)
        if kind not in HELD_OUT_PAIRS:
            return kind


def _share_an_attribute(kinds: list[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """Gives several objects one colour, one shape or both, so that counting and comparing have something to count."""
    colour, shape = kinds[0]
    mode = rng.choice(("colour", "shape", "both"))
    for i in range(1, len(kinds)):
        if rng.random() < 0.7:
            kind = {"colour": (colour, kinds[i][1]), "shape": (kinds[i][0], shape), "both": (colour, shape)}[mode]
            kinds[i] = kinds[i] if kind in HELD_OUT_PAIRS else kind
    return kinds
