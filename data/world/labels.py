"""Scene or caption -> label words and places for `model.labels`.

Of a scene some facts are withheld, which is what makes the decoder draw from partial descriptions later: an object's words
may be unknown, and its place may be told only to within a spread. A caption tells what it says and no more; how two things
stand to each other is told as two places with a spread. Every address gives the same labels on any rank.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.world.captions import Caption, describe
from data.world.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, random_for
from data.world.wanted import ANYWHERE, Wanted, by_caption
from model.labels import UNKNOWN, LabelsConfig

OBJECTS = 5
CHOICES = 32  # ways to tell a thing whose place is open; more than a grid of spots has
WORDS = ("unknown", "none", *BACKGROUNDS, *COLOURS, *SHAPES, *SIZES)
KINDS_OF_WORDS = tuple([WORDS.index(word) for word in kind] for kind in (COLOURS, SHAPES, SIZES))
NONE = WORDS.index("none")
GROUNDS = [WORDS.index(word) for word in BACKGROUNDS]
_NUMBER = {word: number for number, word in enumerate(WORDS)} | {None: UNKNOWN}


@dataclass(frozen=True)
class Withhold:
    """Probabilities, each drawn once for a scene: nothing told at all; only what a caption says; and otherwise one kind of
    fact withheld."""

    everything: float = 0.1
    captions: float = 0.6
    places: float = 0.5
    sizes: float = 0.3
    backgrounds: float = 0.2
    colours: float = 0.05
    shapes: float = 0.05


def labels_config(width: int) -> LabelsConfig:
    """The labels of this world: a token for the background and one for each of five objects, present or not."""
    return LabelsConfig(vocabulary=len(WORDS), places=True, width=width)


def encode(label: dict[str, Any], withhold: Withhold, seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene in JSON -> words [6, 3] int64, places [6, 3] float32 (x, y, spread)."""
    scene = Scene.from_json(label)
    rng = random_for(seed, "label", index)
    if rng.random() < withhold.everything:
        return nothing()
    if rng.random() < withhold.captions:
        return encode_caption(describe(scene, rng))
    words, places = absent(1 + OBJECTS)
    hide = {name: rng.random() < getattr(withhold, name) for name in ("places", "sizes", "backgrounds", "colours", "shapes")}
    words[0, 0] = UNKNOWN if hide["backgrounds"] else _NUMBER[scene.background]
    spread = rng.random() if hide["places"] else 0.0
    things = list(scene.objects)
    rng.shuffle(things)
    for row, thing in enumerate(things, start=1):
        words[row] = (
            UNKNOWN if hide["colours"] else _NUMBER[thing.colour],
            UNKNOWN if hide["shapes"] else _NUMBER[thing.shape],
            UNKNOWN if hide["sizes"] else _NUMBER[thing.size],
        )
        x, y = (min(1.0, max(0.0, c + spread * rng.uniform(-1, 1))) for c in (thing.x, thing.y))
        places[row] = (x, y, spread)
    return words, places


def encode_caption(caption: Caption) -> tuple[np.ndarray, np.ndarray]:
    """What a caption says -> words [6, 3], places [6, 3], things in the order in which they are said."""
    return encode_wanted(by_caption(caption))


def encode_wanted(wanted: Wanted) -> tuple[np.ndarray, np.ndarray]:
    """What a picture has to show -> words [6, 3], places [6, 3]; of a thing's spots, the first."""
    words, places = absent(1 + OBJECTS)
    words[0, 0] = _NUMBER[wanted.background]
    for row, thing in enumerate(wanted.things, start=1):
        words[row], places[row] = [_NUMBER[word] for word in thing.words], thing.place
    return words, places


def encode_choice(wanted: Wanted) -> tuple[int, np.ndarray, np.ndarray]:
    """The row of a thing of which several places are right, and all ways to tell it: words [32, 3], places [32, 3]. Where
    nothing is left to choose, the first thing, and one way 32 times."""
    words, places = encode_wanted(wanted)
    row, thing = next(((row, thing) for row, thing in enumerate(wanted.things, start=1) if thing.spots), (1, None))
    told = np.array(thing.spots if thing else places[row : row + 1], np.float32)
    return row, np.tile(words[row], (CHOICES, 1)), told[np.arange(CHOICES) % len(told)]


def nothing() -> tuple[np.ndarray, np.ndarray]:
    """The null condition: words [6, 3], places [6, 3]."""
    words, places = absent(1 + OBJECTS)
    words[:] = UNKNOWN
    return words, places


def absent(count: int) -> tuple[np.ndarray, np.ndarray]:
    """So many things that are not there: words [count, 3], places [count, 3]."""
    words, places = np.full((count, 3), UNKNOWN, np.int64), np.tile(np.array(ANYWHERE, np.float32), (count, 1))
    words[:, 0] = NONE
    return words, places
