"""Scene -> caption, and caption against scene.

A caption names every object, in groups of equal ones, and may leave out colours, shapes, sizes, the background and how
things stand to each other. What it does say is kept beside its text, so that `holds` can check any scene against it.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

from data.world.scene import Object, Scene, relation

NUMBERS = ("zero", "one", "two", "three", "four", "five")
PLURALS = {"cross": "crosses", "shape": "shapes"}
OPENINGS = ("", "", "", "a picture of ", "an image of ", "a drawing of ", "draw ")


@dataclass(frozen=True)
class Group:
    """`count` objects that share what is said of them; None where nothing is said."""

    count: int
    colour: str | None = None
    shape: str | None = None
    size: str | None = None

    def matches(self, thing: Object) -> bool:
        said = (self.colour, self.shape, self.size)
        return all(word in (None, has) for word, has in zip(said, (thing.colour, thing.shape, thing.size), strict=True))

    @property
    def phrase(self) -> str:
        noun = self.shape or "shape"
        words = [word for word in (self.size, self.colour) if word]
        if self.count > 1:
            return " ".join([NUMBERS[self.count], *words, plural(noun)])
        words.append(noun)
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"

    @property
    def definite(self) -> str:
        return " ".join(["the", *(word for word in (self.size, self.colour) if word), self.shape or "shape"])


@dataclass(frozen=True)
class Caption:
    """What a sentence says of a scene. `link` = (i, words, j): group i stands so to group j, both of one object."""

    text: str
    groups: tuple[Group, ...]
    link: tuple[int, str, int] | None = None
    background: str | None = None


def plural(noun: str) -> str:
    """cross -> crosses, star -> stars."""
    return PLURALS.get(noun, noun + "s")


def describe(scene: Scene, rng: random.Random, *, full: bool = False) -> Caption:
    """One caption that names all objects of a scene; `full` leaves out no colour, shape, background or clear relation."""
    with_colour = full or rng.random() < 0.9
    with_shape = full or not with_colour or rng.random() < 0.93
    with_size = rng.random() < 0.3
    groups = group(scene.objects, with_colour, with_shape, with_size)
    order = list(range(len(groups)))
    rng.shuffle(order)
    groups = [groups[i] for i in order]
    background = scene.background if full or rng.random() < 0.4 else None
    wants_link = full or rng.random() < 0.7
    return phrase(groups, clear_link(groups, scene, rng) if wants_link else None, background, rng)


def phrase(groups: list[Group], link: tuple[int, str, int] | None, background: str | None, rng: random.Random) -> Caption:
    """Puts what is to be said into words; a link is said of the first group."""
    if link is not None:  # say the linked group first, the other one inside its relative phrase
        first, words, second = link
        rest = [g for i, g in enumerate(groups) if i not in (first, second)]
        groups = [groups[first], groups[second], *rest]
        link = (0, words, 1)
        parts = [f"{groups[0].phrase} {words} {groups[1].phrase}", *(g.phrase for g in rest)]
    else:
        parts = [g.phrase for g in groups]
    text = rng.choice(OPENINGS) + listing(parts)
    if background:
        text += f" on a {background} background"
    return Caption(text, tuple(groups), link, background)


def group(things: Iterable[Object], with_colour: bool, with_shape: bool, with_size: bool) -> list[Group]:
    """Objects that are alike in what will be said of them, counted together."""
    counts: dict[tuple[str | None, str | None, str | None], int] = {}
    for thing in things:
        said = (
            thing.colour if with_colour else None,
            thing.shape if with_shape else None,
            thing.size if with_size else None,
        )
        counts[said] = counts.get(said, 0) + 1
    return [Group(count, *said) for said, count in counts.items()]


def clear_link(groups: list[Group], scene: Scene, rng: random.Random) -> tuple[int, str, int] | None:
    """A relation between two groups of one object each that the scene shows clearly, or None."""
    single = [i for i, g in enumerate(groups) if g.count == 1]
    things = {i: next(thing for thing in scene.objects if groups[i].matches(thing)) for i in single}
    links = [(i, relation(things[i], things[j]), j) for i, j in permutations(single, 2)]
    clear = [(i, words, j) for i, words, j in links if words is not None]
    return rng.choice(clear) if clear else None


def holds(caption: Caption, scene: Scene) -> bool:
    """Whether a scene is what a caption says: every object in a group, no group short, link and background right."""
    if caption.background not in (None, scene.background):
        return False
    slots = [i for i, g in enumerate(caption.groups) for _ in range(g.count)]
    if len(slots) != len(scene.objects):
        return False
    return any(
        all(caption.groups[i].matches(thing) for i, thing in zip(slots, things, strict=True))
        and _link_holds(caption.link, slots, things)
        for things in permutations(scene.objects)
    )


def listing(parts: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _link_holds(link: tuple[int, str, int] | None, slots: list[int], things: tuple[Object, ...]) -> bool:
    if link is None:
        return True
    first, words, second = link
    return relation(things[slots.index(first)], things[slots.index(second)]) == words
