"""What a page's fields hold -> pictures and how far they are. Knows no page: its endpoints can be called around the page
too, so that every value is checked here."""

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import cast, get_args

from PIL import Image

from data.transforms import to_pil
from sample.drawn import about
from sample.jobs import Jobs, Tell
from sample.pictures import open_picture
from sample.pipeline import Asked, Pipeline, Progress, Watch
from sample.settings import Drawing, Guidance, SolverName

MOST_PICTURES = 8
MOST_SOURCES = 4
MOST_STEPS = 100
MOST_GUIDANCE = 20
MOST_CHARACTERS = 2000
MOST_SEED = 2**53 - MOST_PICTURES  # a browser's numbers are exact up to 2**53
LONGEST_SIDE = 2048  # pixels; larger pictures are kept and read at this
PREVIEWS = 8  # of a drawing on its way


@dataclass(frozen=True)
class View:
    """What there is to see of a drawing. `pictures` None: those that were there before."""

    note: str
    seed: int
    """Of the first picture; each further one has the next."""
    pictures: tuple[Image.Image, ...] | None = None
    done: bool = False


class Studio:
    """A pipeline and its one thread."""

    def __init__(self, pipeline: Pipeline, jobs: Jobs):
        self.pipeline = pipeline
        self.jobs = jobs

    def draw(
        self,
        prompt: object,
        *,
        count: object = 1,
        seed: object = 0,
        drawing: Drawing = Drawing(),
        sources: tuple[Image.Image, ...] = (),
    ) -> Iterator[View]:
        """A view of every step, some with what it would come to from there, and the pictures.

        Raises:
            ValueError: the prompt is empty or too long, a number is out of its range, or it takes too long.
        """
        words, first = written("prompt", prompt), whole("seed", seed, 0, MOST_SEED)
        seeds = range(first, first + whole("pictures", count, 1, MOST_PICTURES))

        def job(tell: Tell[View]) -> None:
            start = monotonic()
            self.pipeline.check([words, drawing.negative])
            watch = previews(self.pipeline, drawing, lambda note, pictures: tell(View(note, first, pictures)))
            drawn = self.pipeline([Asked(words, sources)] * len(seeds), seeds, drawing, watch)
            for picture, own in zip(drawn, seeds, strict=True):
                told = about(words, own, drawing, self.pipeline.fingerprint)
                picture.info.update({name: str(value) for name, value in told.items()})  # written into its file
            tell(View(f"{_amount(len(seeds))} in {monotonic() - start:.1f} s", first, tuple(drawn), done=True))

        return self.jobs.stream(job)


def previews(pipeline: Pipeline, drawing: Drawing, show: Callable[[str, tuple[Image.Image, ...] | None], None]) -> Watch:
    """Says every step how far a drawing is, and `PREVIEWS` times shows what it would come to."""
    calls = drawing.steps * (2 if drawing.solver == "heun" else 1)
    every = math.ceil(calls / PREVIEWS)

    def watch(progress: Progress) -> None:
        pictures = None
        if progress.call % every == 0:
            pictures = tuple(to_pil(pixels) for pixels in pipeline.decode(progress.latents))
        show(f"Step {math.ceil(progress.call * drawing.steps / calls)} of {drawing.steps}", pictures)

    return watch


def drawing_from(
    steps: object, guidance: object, solver: object = "dpm++", negative: object = "", image_guidance: object = 3.0
) -> Drawing:
    """The settings of a page's fields.

    Raises:
        ValueError: a value is missing, out of its range or unknown.
    """
    names = get_args(SolverName)
    if solver not in names:
        raise ValueError(f"solver: {solver!r} is unknown; choose one of {', '.join(names)}")
    return Drawing(
        steps=whole("steps", steps, 1, MOST_STEPS),
        guidance=Guidance(text=number("guidance", guidance), image=number("picture guidance", image_guidance)),
        negative=written("what to avoid", negative, least=0),
        solver=cast(SolverName, solver),
    )


def seed_from(seed: object, fresh: object) -> object:
    """The seed that was given, or, where a fresh one is wanted, a number that a person can copy."""
    return secrets.randbelow(10**6) if fresh else seed


def written(name: str, text: object, least: int = 1) -> str:
    """`text` without the space around it."""
    text = text.strip() if isinstance(text, str) else ""
    if len(text) < least:
        raise ValueError(f"{name}: there is nothing; write a few words")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name}: {len(text):,} characters are too many; write at most {MOST_CHARACTERS:,}")
    return text


def whole(name: str, value: object, least: int, most: int) -> int:
    if not isinstance(value, int | float) or not math.isfinite(value) or value != int(value) or not least <= value <= most:
        raise ValueError(f"{name}: {_shown(value)} will not do; give a whole number from {least} to {most}")
    return int(value)


def number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= MOST_GUIDANCE:
        raise ValueError(f"{name}: {_shown(value)} will not do; give a number from 0 to {MOST_GUIDANCE}")
    return float(value)


def pictures_from(paths: Sequence[object]) -> tuple[Image.Image, ...]:
    """Uploaded files as pictures, the longest side at most `LONGEST_SIDE`.

    Raises:
        ValueError: there are too many, or one is no whole PNG, JPEG or WebP, or has too many pixels.
    """
    if len(paths) > MOST_SOURCES:
        raise ValueError(f"pictures: {len(paths)} are too many; give at most {MOST_SOURCES}")
    return tuple(_picture_from(Path(str(path))) for path in paths)


def _picture_from(path: Path) -> Image.Image:
    try:
        picture = open_picture(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error  # where uploads lie is nobody's business
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return picture


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:40]


def _amount(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
