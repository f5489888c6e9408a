"""Prompts about the world -> pictures -> verdicts of the pixel reader -> scores by category; and two controls.

`empty`: pictures drawn from the empty prompt, judged by the same claims. `chance`: training scenes drawn without looking
at the prompts. Both say what a model that ignores its prompt would earn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.world.captions import holds
from data.world.reader import LEAST_SIZE, read
from sample.grid import Cell, Row, sheet
from sample.measures import Measure, share
from sample.progress import Track
from sample.settings import Drawing
from sample.world_suite import Asked, chance

Draw = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]
"""Prompts and one seed each -> pictures."""


@dataclass(frozen=True)
class Judged:
    """A prompt, the picture drawn for it, and whether it is right."""

    asked: Asked
    picture: Image.Image
    right: bool


def check_readable(side: int, drawing: Drawing) -> None:
    """ValueError where a decoder of pictures of `side` pixels would be asked for what the judge cannot read."""
    height, width = drawing.height or side, drawing.width or side
    if height != width or height < LEAST_SIZE:
        raise ValueError(
            f"pictures would have {height} x {width} pixels, and their judge reads squares of {LEAST_SIZE} or more; give "
            "other --height and --width"
        )


def judge(asked: Sequence[Asked], pictures: Sequence[Image.Image]) -> list[Judged]:
    """Reads each picture and holds it against its claim.

    Raises:
        ValueError: the pictures are too small to be read.
    """
    scenes = [read(np.asarray(picture)).scene() for picture in pictures]
    return [Judged(a, p, holds(a.claim, s)) for a, p, s in zip(asked, pictures, scenes, strict=True)]


def drawing(
    draw: Draw,
    asked: Sequence[Asked],
    name: str = "generation",
    seed: int = 0,
    batch_size: int = 32,
    watch: Track = iter,
) -> tuple[dict[str, Measure], list[Judged]]:
    """Scores by category (`generation.colour`), of empty prompts (`generation.empty.colour`) and of chance
    (`generation.chance.colour`), with all verdicts. Picture i has seed `seed + i`."""
    parts = {category: [a for a in asked if a.category == category] for category in dict.fromkeys(a.category for a in asked)}
    empty = [""] * max(map(len, parts.values()), default=0)
    texts = [*(a.text for a in asked), *empty]
    pictures: list[Image.Image] = []
    for start in watch(range(0, len(texts), batch_size)):
        batch = texts[start : start + batch_size]
        pictures += draw(batch, range(seed + start, seed + start + len(batch)))
    judged, unprompted = judge(asked, pictures[: len(asked)]), pictures[len(asked) :]
    measures = {f"{name}.{category}": _score([j for j in judged if j.asked.category == category]) for category in parts}
    for category, part in parts.items():
        measures[f"{name}.empty.{category}"] = _score(judge(part, unprompted[: len(part)]))
    for category, part in parts.items():
        measures[f"{name}.chance.{category}"] = Measure(chance(part, seed), n=len(part), unit="share")
    return measures, judged


def picture_of(judged: Sequence[Judged], columns: int = 6) -> Image.Image:
    """The first pictures of each category of each split with their prompts and verdicts, one category to a line."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for one in judged:
        row = Row(one.asked.text, (Cell(one.picture, one.right),))
        lines.setdefault((one.asked.split, one.asked.category), []).append(row)
    columns = min(columns, *map(len, lines.values()))
    return sheet([row for rows in lines.values() for row in rows[:columns]], columns)


def _score(judged: Sequence[Judged]) -> Measure:
    return share(sum(one.right for one in judged), len(judged))
