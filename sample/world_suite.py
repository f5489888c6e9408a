"""(seed, split, number) -> prompts about the world, each with the claim that decides whether a picture of it is right.

    category        prompt                            a picture is right when it shows
    single_object   a red circle                      one object, of this colour and shape
    colour          a red circle                      one object, of this colour
    shape           a red circle                      one object, of this shape
    count           three stars                       so many objects
    position        a red circle left of a blue star  these two objects, so placed, and no other
    binding         a red circle and a blue star      these two objects (no shared colour, no shared shape), and no other

Split `val`: pairs of colour and shape seen in training, two to four objects to count. `pairs`: every prompt names a
held-out pair. `counts`: five objects, which training never shows. All scenes are held out.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from statistics import fmean

from data.world.captions import Caption, Group, clear_link, group, holds, phrase
from data.world.scene import Scene, make_scene, random_for

CATEGORIES = ("single_object", "colour", "shape", "count", "position", "binding")
ASKED_OF = {
    "val": CATEGORIES,
    "pairs": tuple(category for category in CATEGORIES if category != "count"),
    "counts": ("count",),
}
"""The categories that each split's scenes can be asked for."""


@dataclass(frozen=True)
class Asked:
    """A prompt, what it tests, the claim that must hold for a picture of it, and a held-out scene for which it does."""

    split: str
    category: str
    text: str
    claim: Caption
    scene: Scene


def suite(seed: int, split: str, per_category: int) -> list[Asked]:
    """`per_category` prompts for each category of a split, a pure function of its arguments; more only add to fewer.

    Raises:
        ValueError: the split has no prompts.
    """
    if split not in ASKED_OF:
        raise ValueError(f"split: {split!r} has no prompts; choose one of {', '.join(ASKED_OF)}")
    return [asked for category in ASKED_OF[split] for asked in islice(prompts(seed, split, category), per_category)]


def prompts(seed: int, split: str, category: str) -> Iterator[Asked]:
    """Endless prompts of one category; no two categories look at the same scene."""
    taken = 0
    for index in count(CATEGORIES.index(category), len(CATEGORIES)):
        scene = make_scene(seed, index, split)
        said = _say(category, scene, taken, random_for(seed, "suite", split, category, index))
        if said is not None:
            yield Asked(split, category, said.text, _claim(category, said), scene)
            taken += 1


def chance(asked: Sequence[Asked], seed: int, scenes: int = 300) -> float:
    """How often the claims hold for training scenes drawn without looking at the prompts."""
    drawn = [make_scene(seed, index, "train") for index in range(scenes)]
    return fmean(holds(one.claim, scene) for one in asked for scene in drawn)


def _say(category: str, scene: Scene, number: int, rng: random.Random) -> Caption | None:
    """A caption for prompt `number` of a category, or None where the scene does not suit it."""
    things = scene.objects
    if category == "count":
        wanted = len(things) if len(things) == 5 else 2 + number % 3  # two, three and four in turn
        return _say_count(scene, rng) if len(things) == wanted else None
    if category in ("single_object", "colour", "shape"):
        return phrase(group(things, True, True, False), None, None, rng) if len(things) == 1 else None
    if len(things) != 2 or things[0].colour == things[1].colour or things[0].shape == things[1].shape:
        return None
    groups = group(things, True, True, False)
    if category == "binding":
        rng.shuffle(groups)
        return phrase(groups, None, None, rng)
    link = clear_link(groups, scene, rng)
    return phrase(groups, link, None, rng) if link is not None else None


def _say_count(scene: Scene, rng: random.Random) -> Caption | None:
    """Counts objects that share a colour, a shape or both."""
    for with_colour, with_shape in ((True, True), (True, False), (False, True)):
        groups = group(scene.objects, with_colour, with_shape, False)
        if len(groups) == 1:
            return phrase(groups, None, None, rng)
    return None


def _claim(category: str, said: Caption) -> Caption:
    """The part of a caption that its category judges."""
    first = said.groups[0]
    reduced = {
        "colour": Group(1, colour=first.colour),
        "shape": Group(1, shape=first.shape),
        "count": Group(first.count),
    }
    return Caption("", (reduced[category],)) if category in reduced else said
