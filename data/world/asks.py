"""(seed, index, split) -> what somebody asks to have drawn, as a conversation, and what a right picture has to show.

    kind         what is asked
    caption      a caption, as in data/world/captions.py
    edit         a picture and an instruction, as in data/world/edits.py
    swap         the same, of two things that trade places: the hardest edit, and rare among those drawn evenly
    passing      the same, in the words of a dialogue: "make the circle blue", "remove the one on the left"
    reconstruct  a picture, to be drawn once more
    subject      one or two pictures of one object each, to be drawn in another arrangement
    dialogue     several turns that each drew something: "draw a red circle", "make it blue", "add a star above it"

What was drawn earlier joins the next turn of the user; to an order to draw the assistant says `DREW`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

from PIL import Image

from data.dropout import Dropped
from data.world.captions import Caption, Group, describe
from data.world.conversations import plan
from data.world.edits import SIDE_GAP, SIDES, SPARE, Edit, Naming, edits_of, keeps_rules, make_edit, refer
from data.world.questions import questions
from data.world.reader import UNCLEAR
from data.world.render import render
from data.world.scene import BACKGROUNDS, GAP, HELD_OUT_PAIRS, RELATIONS, Object, Scene, make_scene, random_for
from data.world.wanted import Wanted, by_caption, by_edit, by_scene
from model.prefix import DRAW_SYSTEM, THINK, Turn

KINDS = ("caption", "edit", "swap", "passing", "reconstruct", "subject", "dialogue")
DREW = ""
AGAIN = ("draw this picture again", "draw the same picture", "copy this picture", "reproduce the image", "draw exactly this")
ONCE_MORE = ("draw it again", "draw the same picture again", "once more, please")
BACK = ("undo that", "go back to the picture before", "take that back")
ANSWERED = ("Here it is.", "Done.", "Here is the picture.")
SYSTEMS = ("You are a helpful assistant.", "You look at pictures, answer questions and draw.")
ORDERS = ("", "", "draw ", "please draw ", "now draw ")
PLANNED = 0.05  # of captions


@dataclass(frozen=True)
class Mix:
    """How often each kind comes; dialogues take the rest."""

    caption: float = 0.12
    edit: float = 0.4
    swap: float = 0.0
    passing: float = 0.0
    reconstruct: float = 0.08
    subject: float = 0.05

    def __post_init__(self) -> None:
        shares = vars(self).values()
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError("task.mix: give shares of 0 or more that sum to at most 1")

    def share(self, kind: str) -> float:
        """The share of a kind in [0, 1]."""
        told = vars(self)
        return told[kind] if kind in told else 1 - sum(told.values())

    def kind(self, chance: float) -> str:
        """The kind that stands at `chance` in [0, 1)."""
        for kind, share in vars(self).items():
            if chance < share:
                return kind
            chance -= share
        return "dialogue"


@dataclass(frozen=True)
class Ask:
    """`turns` end with the user's. `part` says more than its kind: the kind of edit, or the last step of a dialogue.
    `before`: what the last picture that was given or drawn shows."""

    kind: str
    part: str
    turns: tuple[Turn, ...]
    wanted: Wanted
    before: Scene | None = None


@dataclass(frozen=True)
class Step:
    """One order to draw within a dialogue. `focus`: which of the things wanted "it" then means."""

    kind: str
    text: str
    wanted: Wanted
    scene: Scene
    focus: int | None = None


def make_ask(
    seed: int, index: int, split: str = "train", kind: str | None = None, *, size: int = 64, mix: Mix = Mix()
) -> Ask:
    """Ask number `index` of a split, of a given kind or of any; a pure function of its arguments. `size` in pixels.

    Raises:
        ValueError: the split is unknown.
    """
    rng = random_for(seed, "ask", split, index)
    chosen = mix.kind(rng.random())
    return _MAKERS[kind or chosen](seed, index, split, size, rng)


def without_dropped(ask: Ask, lost: Dropped) -> tuple[tuple[Turn, ...], Wanted | None]:
    """An ask of which words or pictures are lost, as guidance's branches are; None: then nothing is said.

    Without words, the last picture is to be drawn as it is; without pictures, only a caption still says something."""
    pictures = [picture for turn in ask.turns for picture in turn.images]
    if lost is None or (lost == "image" and not pictures):
        return ask.turns, ask.wanted
    if lost == "image":
        return tuple(replace(turn, images=()) for turn in ask.turns), None
    if lost == "text" and ask.before is not None:
        return _plain("", (pictures[-1],)), by_scene(ask.before)
    return _plain(""), None


def next_step(
    scenes: Sequence[Scene], focus: Object | None, split: str, rng: random.Random, gap: float = GAP
) -> Step | None:
    """An edit of the last of the scenes that were drawn so far, in the words of somebody who looks at it; None where it
    allows none. Objects of a scene that was read from a picture may stand nearer than `GAP`, and nobody calls one by what is
    not clear about it."""
    scene = scenes[-1]
    name = _in_passing(focus, rng)
    for edit in edits_of(scene, split, rng, name, brief=True, gap=gap):
        if edit.kind == "add" and focus is not None and edit.said is not None and rng.random() < 0.3:
            edit = _another(edit, focus, split) or edit
        changed = [number for number, thing in enumerate(edit.after.objects) if thing not in scene.objects]
        return Step(edit.kind, edit.instruction, by_edit(edit), edit.after, changed[0] if len(changed) == 1 else None)
    return None


def first_step(scene: Scene, split: str, rng: random.Random) -> Step:
    """An order to draw a scene, or one of fewer objects."""
    fewer = Scene(scene.background, scene.objects[: rng.choice((1, 1, 2, 4))])
    scene = fewer if keeps_rules(fewer, split) else scene
    caption = describe(scene, rng)
    text = caption.text if caption.text.startswith("draw ") else rng.choice(ORDERS) + caption.text
    return Step("caption", text, by_caption(caption), scene, 0 if len(scene.objects) == 1 else None)


def picture_of(scene: Scene, size: int) -> Image.Image:
    """A scene as a PIL picture, `size` pixels a side."""
    return Image.fromarray(render(scene, size))


def _caption(seed: int, index: int, split: str, size: int, rng: random.Random) -> Ask:
    """Now and then the assistant has first planned the picture, and is asked once more."""
    scene = make_scene(seed, index, split)
    caption = describe(scene, random_for(seed, "caption", split, index))
    turns = _framed(caption.text, (), rng)
    if rng.random() < PLANNED:
        asked = Turn("user", f"{turns[-1].text}\n{THINK}")
        turns = (*turns[:-1], asked, Turn("assistant", plan(caption, rng)), turns[-1])
    return Ask("caption", "caption", turns, by_caption(caption))


def _edit(seed: int, index: int, split: str, size: int, rng: random.Random) -> Ask:
    return _of_edit("edit", make_edit(seed, index, split), size, rng)


def _swap(seed: int, index: int, split: str, size: int, rng: random.Random) -> Ask:
    return _of_edit("swap", make_edit(seed, index, split, ("swap",)), size, rng)


def _of_edit(kind: str, edit: Edit, size: int, rng: random.Random) -> Ask:
    turns = _framed(edit.instruction, (picture_of(edit.before, size),), rng)
    return Ask(kind, edit.kind, turns, by_edit(edit), edit.before)


def _passing(seed: int, index: int, split: str, size: int, rng: random.Random) -> Ask:
    for address in count(index, SPARE):
        scene = make_scene(seed, address, split)
        step = next_step([scene], None, split, rng)
        if step is not None:
            turns = _framed(step.text, (picture_of(scene, size),), rng)
            return Ask("passing", step.kind, turns, step.wanted, scene)
    raise AssertionError("addresses do not end")


def _reconstruct(seed: int, index: int, split: str, size: int, rng: random.Random) -> Ask:
    scene = make_scene(seed, index, split)
    turns = _framed(rng.choice(AGAIN), (picture_of(scene, size),), rng)
    return Ask("reconstruct", "reconstruct", turns, by_scene(scene), scene)


def _subject(seed: int, index: int, split: str, size: int, rng: random.Random) -> Ask:
    """Each object on a background of its own, at the place that it has in its scene."""
    scene = make_scene(seed, index, split)
    things = sorted(scene.objects, key=lambda thing: (thing.colour, thing.shape) not in HELD_OUT_PAIRS)
    background = rng.choice([None, *sorted(BACKGROUNDS)])
    if len(things) > 1 and rng.random() < 0.5:
        shown, part = things[:2], "two"
        groups, how = [Group(1, *thing.look) for thing in shown], rng.choice((None, *RELATIONS))
        text = rng.choice(("draw both", "draw both together")) if how is None else f"draw the first {how} the second"
        link = None if how is None else (0, how, 1)
    else:
        shown, part = things[:1], rng.choice(("many", "beside", "alone"))
        own = Group(1, *shown[0].look)
        other = _other(seed, index, split, rng)
        how = rng.choice((None, *RELATIONS))
        number = rng.choice((2, 3, 4))
        groups = {"many": [replace(own, count=number, size=None)], "alone": [own], "beside": [own, other]}[part]
        link = None if how is None or part != "beside" else (0, how, 1)
        text = {
            "many": f"draw {('two', 'three', 'four')[number - 2]} of {rng.choice(('these', 'them'))}",
            "alone": rng.choice(("draw it alone", "draw only it somewhere else", "draw it at another place")),
            "beside": f"draw it {how} {other.phrase}" if how else f"draw it and {other.phrase}",
        }[part]
    if background is not None:
        text += f" on a {background} background"
    pictures = tuple(picture_of(Scene(rng.choice(sorted(BACKGROUNDS)), (thing,)), size) for thing in shown)
    return Ask("subject", part, _framed(text, pictures, rng), by_caption(Caption(text, tuple(groups), link, background)))


def _dialogue(seed: int, index: int, split: str, size: int, rng: random.Random) -> Ask:
    """Two to four orders, of which the last is to be obeyed; now and then talk about a picture in between."""
    for address in count(index, SPARE):
        ask = _steps(make_scene(seed, address, split), split, rng.choice((2, 2, 3, 3, 4)), size, rng)
        if ask is not None:
            return ask
    raise AssertionError("addresses do not end")


def _steps(scene: Scene, split: str, orders: int, size: int, rng: random.Random) -> Ask | None:
    turns, pictures = list(_system(rng)), ()
    reply = DREW if rng.random() < 0.85 else rng.choice(ANSWERED)
    scenes, focus = [], None
    step: Step | None
    if rng.random() < 0.2:  # the user begins with a picture
        scenes, pictures = [scene], (picture_of(scene, size),)
        step = next_step(scenes, None, split, rng)
    else:
        step = first_step(scene, split, rng)
    for number in range(orders):
        if step is None:
            return None
        turns.append(Turn("user", step.text, pictures))
        if number == orders - 1:
            return Ask("dialogue", step.kind, tuple(turns), step.wanted, scenes[-1] if scenes else None)
        turns.append(Turn("assistant", reply))
        scenes.append(step.scene)
        pictures = (picture_of(step.scene, size),)
        focus = None if step.focus is None else step.scene.objects[step.focus]
        if rng.random() < 0.25:
            for question in questions(step.scene, rng)[: rng.choice((1, 2))]:
                turns += [Turn("user", question.text, pictures), Turn("assistant", question.answer)]
                pictures = ()
        step = _other_step(scenes, split, rng) if rng.random() < 0.15 else next_step(scenes, focus, split, rng)
    raise AssertionError("a dialogue has orders")


def _other_step(scenes: list[Scene], split: str, rng: random.Random) -> Step:
    """What has little to do with the last picture: the same once more, the one before it, or something new."""
    kind = rng.choice(("fresh", "fresh", "again", "back"))
    if kind == "back" and len(scenes) > 1:
        return Step(kind, rng.choice(BACK), by_scene(scenes[-2]), scenes[-2])
    if kind == "fresh":
        step = first_step(make_scene(rng.randrange(1 << 40), 0, split), split, rng)
        text = step.text if "draw " in step.text else "draw " + step.text
        return replace(step, kind=kind, text=text)
    return Step("again", rng.choice(ONCE_MORE), by_scene(scenes[-1]), scenes[-1])


def _another(edit: Edit, focus: Object, split: str) -> Edit | None:
    """The same addition, of one more like the last; None where the rules forbid it, or what that looks like is unclear."""
    if UNCLEAR in focus.look:
        return None
    new = next(thing for thing in edit.after.objects if thing not in edit.before.objects)
    like = replace(new, colour=focus.colour, shape=focus.shape)
    after = replace(edit.after, objects=(*edit.before.objects, like))
    if not keeps_rules(after, split, gap=0):
        return None
    assert edit.said is not None
    text = edit.instruction.replace(edit.said.phrase, "another one")
    return replace(edit, instruction=text, after=after, said=Group(1, focus.colour, focus.shape))


def _in_passing(focus: Object | None, rng: random.Random) -> Naming:
    """Names as people say them who look at the picture together."""
    ways = {way for way in ("it", "side", "one word") if rng.random() < 0.6}

    def name(thing: Object, scene: Scene) -> str | None:
        if "it" in ways and thing == focus:
            return "it"
        others = [other for other in scene.objects if other is not thing]
        if "side" in ways:
            for side, (axis, sign) in SIDES.items():
                led = [sign * getattr(other, axis) for other in others]
                if led and sign * getattr(thing, axis) + SIDE_GAP <= min(led):
                    return f"the one on the {side.removesuffix('most')}"
        if "one word" in ways:
            if thing.shape != UNCLEAR and all(other.shape != thing.shape for other in others):
                return f"the {thing.shape}"
            if thing.colour != UNCLEAR and all(other.colour != thing.colour for other in others):
                return f"the {thing.colour} one"
        return None if UNCLEAR in (thing.colour, thing.shape) else refer(thing, scene)

    return name


def _other(seed: int, index: int, split: str, rng: random.Random) -> Group:
    thing = make_scene(seed, index + SPARE, "val" if split == "val" else "train").objects[0]
    return Group(1, thing.colour, thing.shape, thing.size if rng.random() < 0.3 else None)


def _framed(text: str, images: tuple[Image.Image, ...], rng: random.Random) -> tuple[Turn, ...]:
    """One order in a frame: mostly that of `PrefixBuilder.draw`, else that of a conversation that begins."""
    if rng.random() < 0.6:
        return _plain(text, images)
    order = text if images or "draw " in text else rng.choice(ORDERS) + text
    return (*_system(rng), Turn("user", order, images))


def _plain(text: str, images: tuple[Image.Image, ...] = ()) -> tuple[Turn, ...]:
    return Turn("system", DRAW_SYSTEM), Turn("user", text, images)


def _system(rng: random.Random) -> tuple[Turn, ...]:
    chance = rng.random()
    if chance < 0.3:
        return ()
    return (Turn("system", DRAW_SYSTEM if chance < 0.8 else rng.choice(SYSTEMS)),)


_MAKERS = {
    "caption": _caption,
    "edit": _edit,
    "swap": _swap,
    "passing": _passing,
    "reconstruct": _reconstruct,
    "subject": _subject,
    "dialogue": _dialogue,
}
