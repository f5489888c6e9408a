"""Scene -> label words and places for `model.labels`, some of them withheld.

Withholding is what makes the decoder draw from partial descriptions later: an object's words may be unknown, and its
place may be told only to within a spread. Every address gives the same withholding on any rank.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.world.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, random_for
from model.labels import LabelsConfig

OBJECTS = 5
WORDS = ("unknown", "none", *BACKGROUNDS, *COLOURS, *SHAPES, *SIZES)
_NUMBER = {word: number for number, word in enumerate(WORDS)}


@dataclass(frozen=True)
class Withhold:
    """Probabilities, each drawn once for a scene: nothing told at all, and one kind of fact withheld."""

    everything: float = 0.1
    places: float = 0.5
    sizes: float = 0.3
    backgrounds: float = 0.2
    colours: float = 0.05
    shapes: float = 0.05


def labels_config(width: int) -> LabelsConfig:
    """The labels of this world: a token for the background and one for each of five objects, present or not."""
    return LabelsConfig(vocabulary=len(WORDS), tokens=1 + OBJECTS, words=3, places=True, width=width)


def encode(label: dict[str, Any], withhold: Withhold, seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene in JSON -> words [6, 3] int64, places [6, 3] float32 (x, y, spread)."""
    scene = Scene.from_json(label)
    rng = random_for(seed, "label", index)
    words = np.zeros((1 + OBJECTS, 3), np.int64)
    places = np.tile(np.array([0.5, 0.5, 1.0], np.float32), (1 + OBJECTS, 1))
    if rng.random() < withhold.everything:
        return words, places
    hide = {name: rng.random() < getattr(withhold, name) for name in ("places", "sizes", "backgrounds", "colours", "shapes")}
    words[0, 0] = 0 if hide["backgrounds"] else _NUMBER[scene.background]
    words[1:, 0] = _NUMBER["none"]
    spread = rng.random() if hide["places"] else 0.0
    things = list(scene.objects)
    rng.shuffle(things)
    for row, thing in enumerate(things, start=1):
        said = (
            0 if hide["colours"] else _NUMBER[thing.colour],
            0 if hide["shapes"] else _NUMBER[thing.shape],
            0 if hide["sizes"] else _NUMBER[thing.size],
        )
        words[row] = said
        x, y = (min(1.0, max(0.0, c + spread * rng.uniform(-1, 1))) for c in (thing.x, thing.y))
        places[row] = (x, y, spread)
    return words, places
