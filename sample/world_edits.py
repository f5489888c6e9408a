"""Held-out asks that start from pictures -> drawn pictures -> verdicts of the pixel reader -> scores.

    edit.change        what was asked for is there, and what was to go is gone; `edit.change.move`: by kind of edit
    edit.kept          every untouched object is still there, with its colour, shape, size and place, and the background
    edit.whole         both, and nothing else is there
    edit.psnr          dB over the pixels that the edit does not touch
    edit.source.*      the same of the source picture, left as it is: what is earned by doing nothing
    reconstruct.*      `found`: objects found again; `whole`; `psnr`, over the whole picture
    subject.whole      the objects of the pictures as the words arrange them, and no other; `subject.whole.many`: by kind
    edit.three_turns   conversations whose three pictures are all whole. The user looks at each picture and asks for an edit
                       of it; `edit.three_turns.turn_2`: of those that got so far, and `edit.three_turns.move`: by kind

A place is right within `TOLERANCE`; one that words leave open is right where the words hold.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from random import Random

import numpy as np
import torch
from PIL import Image

from data.world.asks import DREW, Ask, Step, first_step, make_ask, next_step
from data.world.edits import differ
from data.world.reader import Found, read
from data.world.render import render
from data.world.scene import SIZES, Object, Scene, make_scene, random_for, relation
from data.world.wanted import Thing, Wanted
from model.prefix import DRAW_SYSTEM, Turn
from sample.grid import Cell, Row, table
from sample.measures import Measure, mean, share
from sample.pipeline import Asked, Pipeline
from sample.progress import Track
from sample.settings import Drawing

TOLERANCE = 0.08  # a place is right within this share of the canvas
PERFECT = 60.0  # dB, where a picture is the same to the level
TURNS = 3
Conversations = Sequence[Sequence[Turn]]
Draw = Callable[[Conversations, Sequence[int]], list[Image.Image]]
"""Conversations that end with an order, and one seed each -> pictures."""


@dataclass(frozen=True)
class Verdict:
    """What a picture shows of what was wanted. `at`: for each thing wanted, the number of the object in `scene` that is
    it, None where it is missing."""

    scene: Scene
    at: tuple[int | None, ...]
    change: bool
    kept: bool
    whole: bool


@dataclass(frozen=True)
class Judged:
    """An order, the picture drawn for it, and the verdict."""

    ask: Ask
    picture: Image.Image
    verdict: Verdict

    @property
    def source(self) -> Image.Image | None:
        """The last picture that was given."""
        return next((picture for turn in reversed(self.ask.turns) for picture in reversed(turn.images)), None)


@dataclass
class Dialogue:
    """A conversation under way. `steps` are those that were drawn, the last of which may have failed."""

    number: int
    turns: list[Turn]
    step: Step | None
    rng: Random
    scenes: list[Scene] = field(default_factory=list)
    steps: list[tuple[Step, Image.Image, bool]] = field(default_factory=list)


def judge(wanted: Wanted, picture: Image.Image) -> Verdict:
    """Reads a picture and holds it against what was wanted, each object read standing for at most one thing: for as many
    untouched and then as many changed ones as can be.

    Raises:
        ValueError: the picture is too small to be read.
    """
    reading = read(np.asarray(picture))
    found, things = reading.objects, wanted.things
    choices = [[n for n, one in enumerate(found) if _fits(thing, one)] + [None] for thing in things]
    ways = [at for at in product(*choices) if len(taken := [n for n in at if n is not None]) == len(set(taken))]
    at = max(ways, key=lambda at: _worth(wanted, found, at))
    background = wanted.background in (None, reading.background)
    kept = background and all(n is not None for n, thing in zip(at, things, strict=True) if thing.kept)
    there = all(n is not None for n, thing in zip(at, things, strict=True) if not thing.kept)
    gone = not any(_fits(_was(old), one) for old in wanted.gone for one in found)
    change = there and gone and _linked(wanted, found, at)
    scene = Scene(reading.background, tuple(_object(one) for one in found))
    return Verdict(scene, at, change, kept, change and kept and len(found) == len(things))


def drawer(pipeline: Pipeline, drawing: Drawing) -> Draw:
    """Draws what a release makes of whole conversations."""

    @torch.no_grad()
    def draw(conversations: Conversations, seeds: Sequence[int]) -> list[Image.Image]:
        mllm = pipeline.model.mllm
        conditions = pipeline.model.condition(mllm.builder(conversations).to(mllm.device)).split(1)  # each [1, Q, C]
        orders = [turns[-1] for turns in conversations]
        asked = [Asked(order.text, order.images, told) for order, told in zip(orders, conditions, strict=True)]
        return pipeline(asked, seeds, drawing)

    return draw


def editing(
    draw: Draw, split: str, n: int, seed: int = 0, batch_size: int = 32, watch: Track = iter
) -> tuple[dict[str, Measure], list[Judged]]:
    """Scores of `n` edits, `n` reconstructions and `n` subjects of a split, with all verdicts. Picture i has seed
    `seed + i`."""
    asks = [make_ask(seed, index, split, kind) for kind in ("edit", "reconstruct", "subject") for index in range(n)]
    pictures: list[Image.Image] = []
    for start in watch(range(0, len(asks), batch_size)):
        batch = asks[start : start + batch_size]
        pictures += draw([ask.turns for ask in batch], range(seed + start, seed + start + len(batch)))
    judged = [Judged(ask, picture, judge(ask.wanted, picture)) for ask, picture in zip(asks, pictures, strict=True)]
    edits, same, subjects = ([one for one in judged if one.ask.kind == kind] for kind in ("edit", "reconstruct", "subject"))
    left = [Judged(one.ask, source, judge(one.ask.wanted, source)) for one in edits if (source := one.source)]
    kept = [n is not None for one in same for n in one.verdict.at]
    measures = {
        **_shares(_under("edit", split), edits, ("change", "kept", "whole")),
        f"{_under('edit', split)}.psnr": mean([_psnr(one) for one in edits], "dB"),
        **_shares(_under("edit", split) + ".source", left, ("change", "kept", "whole"), by_part=False),
        f"{_under('reconstruct', split)}.found": share(sum(kept), len(kept)),
        **_shares(_under("reconstruct", split), same, ("whole",), by_part=False),
        f"{_under('reconstruct', split)}.psnr": mean([_psnr(one) for one in same], "dB"),
        **_shares(_under("subject", split), subjects, ("whole",)),
    }
    return measures, judged


def conversing(
    draw: Draw, split: str, n: int, seed: int = 0, batch_size: int = 32, watch: Track = iter
) -> tuple[dict[str, Measure], list[Dialogue]]:
    """Scores of `n` conversations of three turns, which end at the first picture that is not whole. Conversation i has seed
    `seed + i` in the first turn, and one `n` higher in each further one."""
    held: list[Dialogue] = []
    for start in watch(range(0, n, batch_size)):
        under_way = [_begin(seed, index, split) for index in range(start, min(start + batch_size, n))]
        held += under_way
        for turn in range(TURNS):
            for dialogue in under_way:
                assert dialogue.step is not None
                given = (dialogue.steps[-1][1],) if dialogue.steps else ()
                dialogue.turns.append(Turn("user", dialogue.step.text, given))
            seeds = [seed + turn * n + dialogue.number for dialogue in under_way]
            pictures = draw([dialogue.turns for dialogue in under_way], seeds) if under_way else []
            for dialogue, picture in zip(under_way, pictures, strict=True):
                _go_on(dialogue, picture, split)
            under_way = [dialogue for dialogue in under_way if dialogue.step is not None]
    name = _under("edit", split) + ".three_turns"
    steps = [(turn, step, right) for each in held for turn, (step, _, right) in enumerate(each.steps, start=1)]
    measures = {name: share(sum(right for turn, _, right in steps if turn == TURNS), len(held))}
    for turn in range(1, TURNS + 1):
        verdicts = [right for number, _, right in steps if number == turn]
        measures[f"{name}.turn_{turn}"] = share(sum(verdicts), len(verdicts))
    for kind in dict.fromkeys(sorted(step.kind for _, step, _ in steps)):
        verdicts = [right for _, step, right in steps if step.kind == kind]
        measures[f"{name}.{kind}"] = share(sum(verdicts), len(verdicts))
    return measures, held


def grid(judged: Sequence[Judged], dialogues: Sequence[Dialogue], rows: int = 6) -> Image.Image:
    """The first of each kind with what was given, what was drawn and its verdict; beside them, conversations by turn."""
    kinds = dict.fromkeys(one.ask.kind for one in judged)
    shown = [one for kind in kinds for one in islice((j for j in judged if j.ask.kind == kind), rows)]
    before_after = [
        Row(one.ask.turns[-1].text, (Cell(one.source), Cell(one.picture, one.verdict.whole)))
        for one in shown
        if one.source is not None
    ]
    left = table(("given", "drawn"), before_after)
    talks = []
    for dialogue in dialogues[: 3 * rows]:
        texts = " / ".join(step.text for step, _, _ in dialogue.steps)
        cells = tuple(Cell(picture, right) for _, picture, right in dialogue.steps)
        talks.append(table(tuple(f"turn {turn}" for turn in range(1, 1 + len(cells))), [Row(texts, cells)]))
    height = max(left.height, sum(talk.height for talk in talks))
    canvas = Image.new("RGB", (left.width + max((talk.width for talk in talks), default=0), height), "white")
    canvas.paste(left, (0, 0))
    top = 0
    for talk in talks:
        canvas.paste(talk, (left.width, top))
        top += talk.height
    return canvas


def _begin(seed: int, index: int, split: str) -> Dialogue:
    rng = random_for(seed, "three turns", split, index)
    step = first_step(make_scene(seed, index, split), split, rng)
    return Dialogue(index, [Turn("system", DRAW_SYSTEM)], step, rng)


def _go_on(dialogue: Dialogue, picture: Image.Image, split: str) -> None:
    """Takes in a picture and, where it is right, thinks of the next order."""
    step = dialogue.step
    assert step is not None
    verdict = judge(step.wanted, picture)
    dialogue.steps.append((step, picture, verdict.whole))
    dialogue.turns.append(Turn("assistant", DREW))
    dialogue.step = None
    if verdict.whole and len(dialogue.steps) < TURNS:
        dialogue.scenes.append(verdict.scene)
        number = None if step.focus is None else verdict.at[step.focus]
        focus = None if number is None else verdict.scene.objects[number]
        dialogue.step = next_step(dialogue.scenes, focus, split, dialogue.rng, gap=0)


def _worth(wanted: Wanted, found: Sequence[Found], at: Sequence[int | None]) -> tuple[int, int, bool]:
    """By what one way to see the wanted things in those found is better than another."""
    there = [thing.kept for n, thing in zip(at, wanted.things, strict=True) if n is not None]
    return sum(there), len(there), _linked(wanted, found, at)


def _fits(thing: Thing, one: Found) -> bool:
    """Whether an object that was read is what is said of a thing, and where."""
    words = zip(thing.words, (one.colour, one.shape, one.size), strict=True)
    x, y, spread = thing.place
    placed = bool(thing.spots) or spread > 0 or math.dist((one.x, one.y), (x, y)) <= TOLERANCE
    return placed and all(word in (None, has) for word, has in words)


def _was(old: Object) -> Thing:
    return Thing(old.colour, old.shape, None, (old.x, old.y, 0.0))


def _linked(wanted: Wanted, found: Sequence[Found], at: Sequence[int | None]) -> bool:
    pairs = [(at[i], how, at[j]) for i, how, j in wanted.links]
    return all(
        i is not None and j is not None and relation(_object(found[i]), _object(found[j])) == how for i, how, j in pairs
    )


def _object(one: Found) -> Object:
    """As a thing of a scene, of the nearer size where that is unclear."""
    size = one.size if one.size in SIZES else min(SIZES, key=lambda word: abs(SIZES[word] - one.radius))
    return Object(one.shape, one.colour, size, round(one.x, 4), round(one.y, 4))


def _psnr(one: Judged) -> float:
    """dB of the drawn picture against the source, over what is the same in both scenes."""
    before, drawn = one.ask.before, np.asarray(one.picture, np.float32)
    assert before is not None
    at = zip(one.verdict.at, one.ask.wanted.things, strict=True)
    new = [one.verdict.scene.objects[n] for n, thing in at if n is not None and not thing.kept]
    new = [thing for thing in new if "unclear" not in thing.look]
    rest = [thing for thing in before.objects if thing not in one.ask.wanted.gone]
    source = render(before, drawn.shape[0])
    same = ~differ(source, render(Scene(before.background, (*rest, *new)), drawn.shape[0]))
    off = ((drawn - source) ** 2)[same].mean()
    return min(PERFECT, 10 * math.log10(255**2 / max(float(off), 1e-9)))


def _shares(name: str, judged: Sequence[Judged], what: Sequence[str], by_part: bool = True) -> dict[str, Measure]:
    """`edit.change` and, by part, `edit.change.move`."""
    measures = {}
    for verdict in what:
        right = [(one.ask.part, bool(getattr(one.verdict, verdict))) for one in judged]
        measures[f"{name}.{verdict}"] = share(sum(r for _, r in right), len(right))
        for part in sorted({part for part, _ in right}) if by_part else ():
            of_part = [r for p, r in right if p == part]
            measures[f"{name}.{verdict}.{part}"] = share(sum(of_part), len(of_part))
    return measures


def _under(name: str, split: str) -> str:
    return name if split == "val" else f"{name}.{split}"
