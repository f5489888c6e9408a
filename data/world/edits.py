"""(seed, index, split) -> an edit: a scene, an instruction, and the scene it asks for.

Five kinds: recolour, add, remove, move, swap. Both scenes keep the rules of their split: nothing touches, the number of
objects is allowed, and held-out pairs stand where the split has them and nowhere else. An instruction names its object so
that only one is meant.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, count, permutations
from typing import Any

import numpy as np
from PIL import Image

from data.world.render import render
from data.world.scene import (
    COLOURS,
    GAP,
    HELD_OUT_PAIRS,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    free_spot,
    make_scene,
    random_for,
    relation,
)

KINDS = ("recolour", "add", "remove", "move", "swap")
SIDES = {"leftmost": ("x", 1), "rightmost": ("x", -1), "topmost": ("y", 1), "bottommost": ("y", -1)}
SIDE_GAP = 0.08  # an object is the leftmost where it leads the next by this share of the canvas
SPARE = 1 << 40  # where a scene allows no edit, the scene so many numbers later takes its place
FAR = 0.25  # a moved object goes at least this far, so that the change is seen


@dataclass(frozen=True)
class Edit:
    """What to do, in words, to which scene, and what comes of it."""

    kind: str
    instruction: str
    before: Scene
    after: Scene

    def to_json(self) -> dict[str, Any]:
        scenes = {"before": self.before.to_json(), "after": self.after.to_json()}
        return {"kind": self.kind, "instruction": self.instruction, **scenes}


def make_edit(seed: int, index: int, split: str = "train") -> Edit:
    """Edit number `index` of a split; a pure function of its arguments. Its scene is scene number `index`, or, where no
    edit of that one keeps the rules, one made for the purpose.

    Raises:
        ValueError: the split is unknown.
    """
    return next(_edits(seed, index, split))


def edit_sample(seed: int, index: int, split: str, size: int = 64) -> dict[str, Any]:
    """An edit as a raw sample (data/records.py): the picture before is its source, the picture after its image, and the
    pixels that differ its mask."""
    edit = make_edit(seed, index, split)
    pixels = [render(scene, size) for scene in (edit.before, edit.after)]
    before, after = map(Image.fromarray, pixels)
    changed = Image.fromarray(np.where(differ(*pixels), 255, 0).astype(np.uint8))
    described = {"scene": edit.after.to_json(), "edit": edit.to_json()}
    key = f"{split}-{index:09d}"
    return {"key": key, "image": after, "txt": edit.instruction, "json": described, "sources": (before,), "mask": changed}


def keeps_rules(scene: Scene, split: str) -> bool:
    """Whether a scene could stand in a split: number of objects, held-out pairs, distances to each other and the border."""
    held_out = any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in scene.objects)
    counts = (5,) if split == "counts" else (1, 2, 3, 4)
    return len(scene.objects) in counts and held_out == (split == "pairs") and stands_free(scene.objects)


def stands_free(things: tuple[Object, ...]) -> bool:
    """Whether the circles around objects keep GAP from each other and from the border."""
    inside = all(t.radius + GAP <= c + 1e-9 and c <= 1 - t.radius - GAP + 1e-9 for t in things for c in (t.x, t.y))
    return inside and all(math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + GAP for a, b in combinations(things, 2))


def mask(before: Scene, after: Scene, size: int = 64) -> np.ndarray:
    """Which pixels an edit changes: bool [size, size]."""
    return differ(render(before, size), render(after, size))


def differ(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Which pixels of two pictures [H, W, 3] differ: bool [H, W]."""
    return (before != after).any(-1)


def refer(thing: Object, scene: Scene) -> str | None:
    """The shortest words that mean this object and no other of the scene, or None."""
    alike = [other for other in scene.objects if other.name == thing.name]
    if len(alike) == 1:
        return f"the {thing.name}"
    if sum(other.size == thing.size for other in alike) == 1:
        return f"the {thing.size} {thing.name}"
    for word, (axis, sign) in SIDES.items():
        others = [sign * getattr(other, axis) for other in alike if other is not thing]
        if sign * getattr(thing, axis) + SIDE_GAP <= min(others):
            return f"the {word} {thing.name}"
    return None


def _edits(seed: int, index: int, split: str) -> Iterator[Edit]:
    """Edits that keep the rules, of the addressed scene first, then of spare ones."""
    for address in count(index, SPARE):
        scene = make_scene(seed, address, split)
        rng = random_for(seed, "edit", split, address)
        for kind in rng.sample(KINDS, len(KINDS)):
            for instruction, after in _EDITORS[kind](scene, rng):
                if keeps_rules(after, split):
                    yield Edit(kind, instruction, scene, after)


def _recolour(scene: Scene, rng: random.Random) -> Iterator[tuple[str, Scene]]:
    for thing, words in _named(scene, rng):
        for colour in rng.sample(sorted(COLOURS), len(COLOURS)):
            if colour != thing.colour:
                text = rng.choice(("make {} {}", "turn {} {}", "change the colour of {} to {}", "recolour {} {}"))
                yield text.format(words, colour), _swapped_in(scene, {thing: replace(thing, colour=colour)})


def _add(scene: Scene, rng: random.Random) -> Iterator[tuple[str, Scene]]:
    """Next to an object in a stated relation, where that can be; else anywhere."""
    if len(scene.objects) >= 4:  # no split has room for one more
        return
    for anchor in [*_named(scene, rng), None]:
        for _ in range(20):
            colour, shape, size = rng.choice(sorted(COLOURS)), rng.choice(SHAPES), rng.choice(sorted(SIZES))
            spot = free_spot(list(scene.objects), SIZES[size], rng)
            if spot is None:
                continue
            new = Object(shape, colour, size, *spot)
            text = f"add a {size} {colour} {shape}"
            if anchor is not None:
                link = relation(new, anchor[0])
                if link is None:
                    continue
                text += f" {link} {anchor[1]}"
            yield text, replace(scene, objects=(*scene.objects, new))


def _remove(scene: Scene, rng: random.Random) -> Iterator[tuple[str, Scene]]:
    for thing, words in _named(scene, rng):
        rest = tuple(other for other in scene.objects if other is not thing)
        yield f"{rng.choice(('remove', 'delete', 'take away'))} {words}", replace(scene, objects=rest)


def _move(scene: Scene, rng: random.Random) -> Iterator[tuple[str, Scene]]:
    """To where another object is in a new relation, or to a corner."""
    for thing, words in _named(scene, rng):
        others = [other for other in scene.objects if other is not thing]
        anchors = [(other, name) for other, name in _named(scene, rng) if other is not thing]
        for _ in range(20 if anchors else 0):
            spot = free_spot(others, thing.radius, rng)
            anchor, name = rng.choice(anchors)
            moved = replace(thing, x=spot[0], y=spot[1]) if spot else thing
            link = relation(moved, anchor)
            if link not in (None, relation(thing, anchor)) and _distance(thing, moved) >= FAR:
                yield _to_place(link, words, name, rng), _swapped_in(scene, {thing: moved})
        corners = [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")]
        for corner in rng.sample(corners, 4):
            near, far = round(thing.radius + GAP, 4), round(1 - thing.radius - GAP, 4)
            moved = replace(thing, x=near if "left" in corner else far, y=near if "top" in corner else far)
            if _distance(thing, moved) >= FAR:
                yield f"move {words} to the {corner} corner", _swapped_in(scene, {thing: moved})


def _swap(scene: Scene, rng: random.Random) -> Iterator[tuple[str, Scene]]:
    """Two objects that look different trade places."""
    for (a, a_words), (b, b_words) in permutations(_named(scene, rng), 2):
        if a.name != b.name:
            text = rng.choice(("swap {} and {}", "swap {} with {}", "exchange {} and {}"))
            yield text.format(a_words, b_words), _swapped_in(scene, {a: _at(a, b), b: _at(b, a)})


def _named(scene: Scene, rng: random.Random) -> list[tuple[Object, str]]:
    """The objects that words can single out, with those words, in random order."""
    named = [(thing, words) for thing in scene.objects if (words := refer(thing, scene)) is not None]
    return rng.sample(named, len(named))


def _to_place(link: str | None, words: str, anchor: str, rng: random.Random) -> str:
    assert link in RELATIONS
    side = f"to the {link}" if link in ("left of", "right of") else link
    return f"{rng.choice(('move', 'put'))} {words} {side} {anchor}"


def _swapped_in(scene: Scene, new: dict[Object, Object]) -> Scene:
    return replace(scene, objects=tuple(new.get(thing, thing) for thing in scene.objects))


def _at(thing: Object, place: Object) -> Object:
    return replace(thing, x=place.x, y=place.y)


def _distance(a: Object, b: Object) -> float:
    return math.hypot(a.x - b.x, a.y - b.y)


_EDITORS: dict[str, Callable[[Scene, random.Random], Iterator[tuple[str, Scene]]]] = {
    "recolour": _recolour,
    "add": _add,
    "remove": _remove,
    "move": _move,
    "swap": _swap,
}
