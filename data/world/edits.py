"""(seed, index, split) -> an edit: a scene, an instruction, and the scene it asks for.

Five kinds: recolour, add, remove, move, swap. Both scenes keep the rules of their split: nothing touches, the number of
objects is allowed, and held-out pairs stand where the split has them and nowhere else. An instruction names its object so
that only one is meant.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, count, permutations
from typing import Any

import numpy as np
from PIL import Image

from data.world.captions import Group
from data.world.render import render
from data.world.scene import (
    COLOURS,
    GAP,
    HELD_OUT_PAIRS,
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
SPARE = 1 << 40  # where a scene allows nothing of a kind, the one so many numbers later takes its place
FAR = 0.25  # a moved object goes at least this far, so that the change is seen
Naming = Callable[[Object, Scene], str | None]
"""Words that mean this object and no other of the scene, or None."""


@dataclass(frozen=True)
class Edit:
    """What to do, in words, to which scene, and what comes of it. Where words leave the place of a new object open, it only
    has to stand in `link` to an object, if one is told, and to be what `said` says, if it is added."""

    kind: str
    instruction: str
    before: Scene
    after: Scene
    link: tuple[str, Object] | None = None
    said: Group | None = None

    def to_json(self) -> dict[str, Any]:
        scenes = {"before": self.before.to_json(), "after": self.after.to_json()}
        return {"kind": self.kind, "instruction": self.instruction, **scenes}


def make_edit(seed: int, index: int, split: str = "train", kinds: Sequence[str] = KINDS) -> Edit:
    """Edit number `index` of a split, of one of `kinds`; a pure function of its arguments. Its scene is scene number
    `index`, or, where no edit of that one keeps the rules, one made for the purpose.

    Raises:
        ValueError: the split is unknown.
    """
    for address in count(index, SPARE):
        scene = make_scene(seed, address, split)
        for edit in edits_of(scene, split, random_for(seed, "edit", split, address), kinds=kinds):
            return edit
    raise AssertionError("addresses do not end")


def edits_of(
    scene: Scene,
    split: str,
    rng: random.Random,
    name: Naming | None = None,
    brief: bool = False,
    gap: float = GAP,
    kinds: Sequence[str] = KINDS,
) -> Iterator[Edit]:
    """Edits of a scene that keep the rules of a split, kind after kind in random order. `brief` ones may leave out the
    colour and the size of what they add."""
    for kind in rng.sample(kinds, len(kinds)):
        for edit in _EDITORS[kind](scene, _Words(name or refer, brief), rng):
            if keeps_rules(edit.after, split, gap):
                yield edit


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


def keeps_rules(scene: Scene, split: str, gap: float = GAP) -> bool:
    """Whether a scene could stand in a split: number of objects, held-out pairs, distances to each other and the border."""
    held_out = any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in scene.objects)
    counts = (5,) if split == "counts" else (1, 2, 3, 4)
    return len(scene.objects) in counts and held_out == (split == "pairs") and stands_free(scene.objects, gap)


def stands_free(things: tuple[Object, ...], gap: float = GAP) -> bool:
    """Whether the circles around objects keep `gap` from each other and from the border."""
    inside = all(t.radius + gap <= c + 1e-9 and c <= 1 - t.radius - gap + 1e-9 for t in things for c in (t.x, t.y))
    return inside and all(math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + gap for a, b in combinations(things, 2))


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


@dataclass(frozen=True)
class _Words:
    """How an editor speaks."""

    name: Naming
    brief: bool

    def named(self, scene: Scene, rng: random.Random) -> list[tuple[Object, str]]:
        """The objects that words can single out, with those words, in random order."""
        named = [(thing, words) for thing in scene.objects if (words := self.name(thing, scene)) is not None]
        return rng.sample(named, len(named))

    def new(self, thing: Object, rng: random.Random) -> Group:
        """What is said of an object that is added."""
        leave_out = rng.choice(("", "size", "colour", "size and colour")) if self.brief else ""
        colour = None if "colour" in leave_out else thing.colour
        return Group(1, colour, thing.shape, None if "size" in leave_out else thing.size)


def _recolour(scene: Scene, speak: _Words, rng: random.Random) -> Iterator[Edit]:
    for thing, words in speak.named(scene, rng):
        for colour in rng.sample(sorted(COLOURS), len(COLOURS)):
            if colour != thing.colour:
                text = rng.choice(("make {} {}", "turn {} {}", "change the colour of {} to {}", "recolour {} {}"))
                after = _swapped_in(scene, {thing: replace(thing, colour=colour)})
                yield Edit("recolour", text.format(words, colour), scene, after)


def _add(scene: Scene, speak: _Words, rng: random.Random) -> Iterator[Edit]:
    """Next to an object in a stated relation, where that can be; else anywhere."""
    if len(scene.objects) >= 4:  # no split has room for one more
        return
    for anchor in [*speak.named(scene, rng), None]:
        for _ in range(20):
            colour, shape, size = rng.choice(sorted(COLOURS)), rng.choice(SHAPES), rng.choice(sorted(SIZES))
            spot = free_spot(list(scene.objects), SIZES[size], rng)
            if spot is None:
                continue
            new = Object(shape, colour, size, *spot)
            how = relation(new, anchor[0]) if anchor else None
            if anchor and how is None:
                continue
            said = speak.new(new, rng)
            text = f"add {said.phrase}" + (f" {how} {anchor[1]}" if anchor else "")
            link = (how, anchor[0]) if anchor and how else None
            yield Edit("add", text, scene, replace(scene, objects=(*scene.objects, new)), link, said)


def _remove(scene: Scene, speak: _Words, rng: random.Random) -> Iterator[Edit]:
    for thing, words in speak.named(scene, rng):
        rest = tuple(other for other in scene.objects if other is not thing)
        text = f"{rng.choice(('remove', 'delete', 'take away'))} {words}"
        yield Edit("remove", text, scene, replace(scene, objects=rest))


def _move(scene: Scene, speak: _Words, rng: random.Random) -> Iterator[Edit]:
    """To where another object is in a new relation, or to a corner."""
    for thing, words in speak.named(scene, rng):
        others = [other for other in scene.objects if other is not thing]
        anchors = [(other, name) for other, name in speak.named(scene, rng) if other is not thing]
        for _ in range(20 if anchors else 0):
            spot = free_spot(others, thing.radius, rng)
            anchor, name = rng.choice(anchors)
            moved = replace(thing, x=spot[0], y=spot[1]) if spot else thing
            link = relation(moved, anchor)
            if link not in (None, relation(thing, anchor)) and _distance(thing, moved) >= FAR:
                assert link is not None
                after = _swapped_in(scene, {thing: moved})
                yield Edit("move", _to_place(link, words, name, rng), scene, after, (link, anchor))
        corners = [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")]
        for corner in rng.sample(corners, 4):
            near, far = round(thing.radius + GAP, 4), round(1 - thing.radius - GAP, 4)
            moved = replace(thing, x=near if "left" in corner else far, y=near if "top" in corner else far)
            if _distance(thing, moved) >= FAR:
                after = _swapped_in(scene, {thing: moved})
                yield Edit("move", f"move {words} to the {corner} corner", scene, after)


def _swap(scene: Scene, speak: _Words, rng: random.Random) -> Iterator[Edit]:
    """Two objects that look different trade places."""
    for (a, a_words), (b, b_words) in permutations(speak.named(scene, rng), 2):
        if a.name != b.name:
            text = rng.choice(("swap {} and {}", "swap {} with {}", "exchange {} and {}"))
            after = _swapped_in(scene, {a: _at(a, b), b: _at(b, a)})
            yield Edit("swap", text.format(a_words, b_words), scene, after)


def _to_place(link: str, words: str, anchor: str, rng: random.Random) -> str:
    side = f"to the {link}" if link in ("left of", "right of") else link
    return f"{rng.choice(('move', 'put'))} {words} {side} {anchor}"


def _swapped_in(scene: Scene, new: dict[Object, Object]) -> Scene:
    return replace(scene, objects=tuple(new.get(thing, thing) for thing in scene.objects))


def _at(thing: Object, place: Object) -> Object:
    return replace(thing, x=place.x, y=place.y)


def _distance(a: Object, b: Object) -> float:
    return math.hypot(a.x - b.x, a.y - b.y)


_EDITORS: dict[str, Callable[[Scene, _Words, random.Random], Iterator[Edit]]] = {
    "recolour": _recolour,
    "add": _add,
    "remove": _remove,
    "move": _move,
    "swap": _swap,
}
