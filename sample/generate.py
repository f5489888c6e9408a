"""Prompts -> PNG files, one seed and one file for each picture, the same pictures on any number of processes.

Picture i of a run has seed `seed + i` and the name `0000i.png`; its prompt, seed, release and settings stand in the file.
Under torchrun, rank r of R draws the pictures r, r + R, ...
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, UseAppendAction

from sample.cli import run
from sample.settings import Drawing

if TYPE_CHECKING:
    from PIL import Image

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Args:
    """Draw pictures from prompts with a release."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to draw; each in quotes."""
    release: Path
    """The release folder to draw with."""
    prompts: Path | None = None
    """A text file with one prompt per line."""
    image: UseAppendAction[tuple[Path, ...]] = ()
    """A picture that every prompt starts from; may be given several times."""
    out: Path = Path("pictures")
    """The folder for the pictures."""
    n: int = 1
    """Pictures for each prompt."""
    seed: int = 0
    """The first picture's seed; each further one is one higher."""
    batch_size: int = 16
    """Pictures drawn at once; changes speed and memory, never a picture."""
    grid: bool = False
    """Also write grid.png, all pictures with their prompts."""
    drawing: Annotated[Drawing, OmitArgPrefixes] = Drawing()


@dataclass(frozen=True)
class Job:
    """Picture `number` of a run."""

    number: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.number:05d}.png"


def main(argv: list[str] | None = None) -> None:
    """Draws all pictures of this rank."""
    args = tyro.cli(Args, args=argv)
    jobs = plan(args)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise ValueError(f"environment: RANK is {rank} and WORLD_SIZE {world_size}; launch with torchrun, or unset RANK")
    if args.grid and world_size > 1:
        raise ValueError("--grid needs all pictures in one process; run without torchrun, or leave it out")
    draw(args, jobs[rank::world_size])


def plan(args: Args) -> list[Job]:
    """Every picture of the run.

    Raises:
        ValueError: there is no prompt, or a number is too small.
    """
    prompts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else ())]
    if not prompts:
        raise ValueError("there is no prompt; give one in quotes, or a file of them with --prompts")
    for name, value in (("n", args.n), ("batch-size", args.batch_size)):
        if value < 1:
            raise ValueError(f"--{name} {value} is too small; give at least 1")
    each = [prompt for prompt in prompts for _ in range(args.n)]
    if not 0 <= args.seed <= MAX_SEED - len(each):
        raise ValueError(f"--seed {args.seed} cannot be counted up from; give 0 to {MAX_SEED - len(each)}")
    return [Job(number, prompt, args.seed + number) for number, prompt in enumerate(each)]


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, empty ones left out.

    Raises:
        ValueError: it is not UTF-8 text, or holds no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {path} is not UTF-8 text; save it as such, one prompt per line") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"prompts file {path} is empty; write one prompt per line")
    return prompts


def draw(args: Args, jobs: Sequence[Job]) -> None:
    """Draws and writes pictures in batches; everything is checked before the first file is written."""
    # heavy imports wait until the arguments are right, so that --help stays instant
    from rich.progress import track

    from sample.grid import Cell, Row, sheet
    from sample.pictures import open_picture
    from sample.pipeline import Asked, Pipeline

    sources = tuple(open_picture(path) for path in args.image)
    pipeline = Pipeline.from_release(args.release)
    pipeline.check([job.prompt for job in jobs])
    about = {"release": pipeline.fingerprint, **settings(args.drawing), "software": "querybridge"}
    rows: list[Row] = []
    starts = range(0, len(jobs), args.batch_size)
    for start in track(starts, "drawing", transient=True, disable=not sys.stderr.isatty()):
        batch = jobs[start : start + args.batch_size]
        pictures = pipeline([Asked(job.prompt, sources) for job in batch], [job.seed for job in batch], args.drawing)
        for job, picture in zip(batch, pictures, strict=True):
            save(args.out / job.name, picture, {"prompt": job.prompt, "seed": job.seed, **about})
            rows.append(Row(job.prompt, (Cell(picture),)))
    if args.grid:
        save(args.out / "grid.png", sheet(rows), about)
    if jobs:
        print(f"{len(jobs)} pictures in {args.out}")


def settings(drawing: Drawing) -> dict[str, object]:
    """The drawing's values by the names they have on the command line."""
    values = {**vars(drawing), **vars(drawing.guidance)}
    values["guidance"] = values.pop("text")
    return values


def save(path: Path, picture: "Image.Image", about: dict[str, object]) -> None:
    """A PNG with `about` as its text chunks, whole or absent."""
    from model.files import write_whole
    from sample.pictures import png

    data = png(picture, about)
    write_whole(path, lambda temporary: temporary.write_bytes(data))


if __name__ == "__main__":
    sys.exit(run(main))
