"""Scene -> questions with short answers, of nine kinds, balanced so that a guess without the picture earns chance.

Every question can be answered from the picture alone and has one right answer: the things it speaks of are unique.
"""

import random
from collections import Counter
from dataclasses import dataclass

from data.world.captions import NUMBERS, plural
from data.world.scene import COLOURS, OPPOSITE, RELATIONS, SHAPES, SIZES, Object, Scene, relation

KINDS = ("existence", "colour", "shape", "size", "count", "place", "relation", "comparison", "locate")
CELLS = 8  # columns and rows by which things are located, counted from 1 at the top left
CLEARLY_OFF = 0.08  # from the middle of the picture, as a fraction of the canvas


@dataclass(frozen=True)
class Question:
    """A question, its answer, and all answers that its wording allows."""

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Up to one question of each kind that the scene can be asked, in random order."""
    asked = [question for kind in KINDS if (question := ask(kind, scene, rng)) is not None]
    rng.shuffle(asked)
    return asked


def ask(kind: str, scene: Scene, rng: random.Random) -> Question | None:
    """A question of one kind, or None where the scene allows none."""
    return _ASKERS[kind](scene, rng)


def _existence(scene: Scene, rng: random.Random) -> Question:
    """Half yes, half no; a "no" often asks for a thing whose colour and whose shape are there, apart."""
    present = {(thing.colour, thing.shape) for thing in scene.objects}
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(present))
        answer = "yes"
    else:
        near = rng.random() < 0.6
        colours = sorted({c for c, _ in present}) if near else sorted(COLOURS)
        shapes = sorted({s for _, s in present}) if near else list(SHAPES)
        absent = [(c, s) for c in colours for s in shapes if (c, s) not in present]
        absent = absent or [(c, s) for c in sorted(COLOURS) for s in SHAPES if (c, s) not in present]
        colour, shape = rng.choice(absent)
        answer = "no"
    article = "an" if colour[0] in "aeiou" else "a"
    return Question("existence", f"Is there {article} {colour} {shape}?", answer, ("yes", "no"))


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    thing = _unique(scene, "shape", rng)
    return thing and Question("colour", f"What colour is the {thing.shape}?", thing.colour, tuple(COLOURS))


def _shape(scene: Scene, rng: random.Random) -> Question | None:
    thing = _unique(scene, "colour", rng)
    return thing and Question("shape", f"What shape is the {thing.colour} object?", thing.shape, SHAPES)


def _size(scene: Scene, rng: random.Random) -> Question | None:
    thing = _unique(scene, "name", rng)
    return thing and Question("size", f"Is the {thing.name} small or large?", thing.size, tuple(SIZES))


def _count(scene: Scene, rng: random.Random) -> Question:
    """Counts all objects, those of a shape or of a colour; the answers one to four come equally often where they can."""
    choices = NUMBERS[1:6]
    if rng.random() < 0.6:
        return Question("count", "How many objects are there?", NUMBERS[len(scene.objects)], choices)
    by = rng.choice(("shape", "colour"))
    counts = Counter(getattr(thing, by) for thing in scene.objects)
    wanted = rng.choice(sorted(set(counts.values())))
    word = rng.choice(sorted(value for value, count in counts.items() if count == wanted))
    noun = plural(word) if by == "shape" else f"{word} objects"
    return Question("count", f"How many {noun} are there?", NUMBERS[wanted], choices)


def _place(scene: Scene, rng: random.Random) -> Question | None:
    """In which half of the picture a thing clearly lies."""
    halves = []
    for thing in _unique_names(scene):
        for away, text, words in (
            (thing.x - 0.5, f"Is the {thing.name} on the left or on the right of the picture?", ("left", "right")),
            (thing.y - 0.5, f"Is the {thing.name} above or below the middle of the picture?", ("above", "below")),
        ):
            if abs(away) >= CLEARLY_OFF:
                halves.append(Question("place", text, words[away > 0], words))
    return rng.choice(halves) if halves else None


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique_names(scene)
    pairs = [(a, b, words) for a in things for b in things if a is not b and (words := relation(a, b))]
    if not pairs:
        return None
    a, b, words = rng.choice(pairs)
    if rng.random() < 0.6:
        text = f"Is the {a.name} left of, right of, above or below the {b.name}?"
        return Question("relation", text, words, RELATIONS)
    said = rng.choice((words, OPPOSITE[words]))
    return Question("relation", f"Is the {a.name} {said} the {b.name}?", "yes" if said == words else "no", ("yes", "no"))


def _comparison(scene: Scene, rng: random.Random) -> Question | None:
    """Which of two things is larger, or whether one kind outnumbers another."""
    things = _unique_names(scene)
    pairs = [(a, b) for a in things for b in things if a is not b and a.size != b.size]
    counts = Counter(thing.shape for thing in scene.objects)
    unequal = [(a, b) for a in sorted(counts) for b in sorted(counts) if counts[a] != counts[b]]
    if unequal and (not pairs or rng.random() < 0.5):
        a, b = rng.choice(unequal)
        text = f"Are there more {plural(a)} than {plural(b)}?"
        return Question("comparison", text, "yes" if counts[a] > counts[b] else "no", ("yes", "no"))
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    answer = a.name if a.radius > b.radius else b.name
    return Question("comparison", f"Which is larger, the {a.name} or the {b.name}?", answer, (a.name, b.name))


def _locate(scene: Scene, rng: random.Random) -> Question | None:
    """Column and row of a thing's centre. Grounding: an answer of many bits, from which "left of" is one comparison away."""
    things = _unique_names(scene)
    if not things:
        return None
    thing = rng.choice(things)
    cells = tuple(f"{column} {row}" for row in range(1, CELLS + 1) for column in range(1, CELLS + 1))
    column, row = (min(int(at * CELLS), CELLS - 1) for at in (thing.x, thing.y))
    return Question("locate", f"In which column and row is the {thing.name}?", cells[row * CELLS + column], cells)


def _unique(scene: Scene, attribute: str, rng: random.Random) -> Object | None:
    """An object that no other shares this attribute with."""
    counts = Counter(getattr(thing, attribute) for thing in scene.objects)
    alone = [thing for thing in scene.objects if counts[getattr(thing, attribute)] == 1]
    return rng.choice(alone) if alone else None


def _unique_names(scene: Scene) -> list[Object]:
    counts = Counter(thing.name for thing in scene.objects)
    return [thing for thing in scene.objects if counts[thing.name] == 1]


_ASKERS = {
    "existence": _existence,
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "place": _place,
    "relation": _relation,
    "comparison": _comparison,
    "locate": _locate,
}
