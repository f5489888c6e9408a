"""(seed, index, split) -> a conversation about a generated picture or a generated description.

Five kinds, each a pure function of its address: questions about a picture, about where things stand in one, a picture
described in full, questions about a description in words, and a plan of what a caption asks to draw. The last two make the
language model bind colours and places to things it only reads of, which is what learned queries need to find in it.
"""

import random
from dataclasses import dataclass

from PIL import Image

from data.world.captions import Caption, describe
from data.world.questions import Question, ask, questions
from data.world.render import render
from data.world.scene import OPPOSITE, Scene, make_scene, random_for
from model.prefix import DRAW_SYSTEM, Turn

DESCRIBE = (
    "Describe the image.",
    "What is in the image?",
    "Describe the picture in one sentence.",
    "What does the picture show?",
)
PLACES = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
PLANNED = 5  # things that a plan has a line for, whether they are there or not
READABLE_KINDS = ("existence", "colour", "shape", "count")  # answerable from a full description, whatever it links


@dataclass(frozen=True)
class Shares:
    """How often each kind of conversation comes; questions about a picture take the rest."""

    describe: float = 0.2
    read: float = 0.25
    where: float = 0.0
    plan: float = 0.0


def conversation(
    seed: int, index: int, split: str = "train", *, size: int = 64, shares: Shares = Shares()
) -> tuple[Turn, ...]:
    """User and assistant turns in alternation; the picture, if any, is in the first turn. `size` in pixels."""
    scene = make_scene(seed, index, split)
    rng = random_for(seed, "conversation", split, index)
    kind = rng.random()
    if kind < shares.read:
        return _read(scene, rng)
    if kind < shares.read + shares.plan:
        return _plan(scene, rng)
    picture = Image.fromarray(render(scene, size))
    if kind > 1 - shares.where:
        asked = _pairs(_where(scene, rng) or questions(scene, rng))
    elif kind < shares.read + shares.plan + shares.describe:
        asked = [(rng.choice(DESCRIBE), describe(scene, rng, full=True).text), *_pairs(questions(scene, rng)[:2])]
    else:
        asked = _pairs(questions(scene, rng))
    return _turns(asked, (picture,))


def answerable(caption: Caption, scene: Scene, rng: random.Random) -> list[Question]:
    """Questions whose answers a full description states."""
    asked = [question for kind in READABLE_KINDS if (question := ask(kind, scene, rng)) is not None]
    if caption.link is not None:
        first, words, second = caption.link
        text = f"Is {caption.groups[first].definite} left of, right of, above or below {caption.groups[second].definite}?"
        asked.append(Question("relation", text, words, ()))
    rng.shuffle(asked)
    return asked


def _where(scene: Scene, rng: random.Random) -> list[Question]:
    """Several questions about places and relations, none twice."""
    drawn = [ask(kind, scene, rng) for kind in ("relation", "place", "locate") * 2]
    asked = list({question.text: question for question in drawn if question is not None}.values())
    rng.shuffle(asked)
    return asked


def _read(scene: Scene, rng: random.Random) -> tuple[Turn, ...]:
    caption = describe(scene, rng, full=True)
    asked = _pairs(answerable(caption, scene, rng))
    asked[0] = (f"{caption.text}. {asked[0][0]}", asked[0][1])
    return _turns(asked, ())


def plan(caption: Caption, rng: random.Random) -> str:
    """What a caption asks to draw: "2 small blue square left. 4 none. background any. ..."

    Things are numbered as the caption says them. The lines come in any order, so that each has to be found by its number
    alone, as a query has to that reads beside the others."""
    places = {}
    if caption.link is not None:
        first, words, second = caption.link
        places = {first: PLACES[words], second: PLACES[OPPOSITE[words]]}
    things = [
        " ".join(word for word in (group.size, group.colour, group.shape or "shape", places.get(number)) if word)
        for number, group in enumerate(caption.groups)
        for _ in range(group.count)
    ]
    things += ["none"] * (PLANNED - len(things))
    lines = [f"{number} {thing}." for number, thing in enumerate(things, start=1)]
    lines.append(f"background {caption.background or 'any'}.")
    rng.shuffle(lines)
    return " ".join(lines)


def _plan(scene: Scene, rng: random.Random) -> tuple[Turn, ...]:
    """The drawing instruction, a caption, and the plan of it."""
    caption = describe(scene, rng)
    return Turn("system", DRAW_SYSTEM), Turn("user", caption.text), Turn("assistant", plan(caption, rng))


def _pairs(asked: list[Question]) -> list[tuple[str, str]]:
    return [(question.text, question.answer) for question in asked]


def _turns(asked: list[tuple[str, str]], images: tuple[Image.Image, ...]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for number, (question, answer) in enumerate(asked):
        turns += [Turn("user", question, images if number == 0 else ()), Turn("assistant", answer)]
    return tuple(turns)
