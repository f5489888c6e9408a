"""Prompts -> PNG files, one seed for each picture, the same pictures in any batches and on any number of processes.

    python -m sample.generate --release RELEASE "a red circle" "a star" --n 4
    python -m sample.generate --release RELEASE "make it winter" --image photo.png       # --image twice or more: subjects
    python -m sample.generate --release RELEASE --image photo.png                        # without words: drawn anew
    python -m sample.generate --release RELEASE --prompts list.jsonl --shard 3/8         # lines as in sample/prompts.py
    torchrun --nproc_per_node 8 -m sample.generate --release RELEASE --layout geneval --prompts evaluation_metadata.jsonl

Picture i has seed `seed + i` and the name `0000i.png`, or that of its benchmark (sample/layouts.py); its prompt, seed,
release and settings stand in the file. Pictures that are there are not drawn again: the same command goes on where it was
stopped. In batches of other sizes matrix products round otherwise, which may show as one level of 255 in a few pixels.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from sample.cli import run
from sample.drawn import about, is_there, ranks, save, share
from sample.layouts import LAYOUTS, LayoutName
from sample.progress import progress
from sample.prompts import Job, Line, jobs_of, read_lines
from sample.settings import Drawing

if TYPE_CHECKING:
    from PIL import Image

    from sample.pipeline import Pipeline

OPEN = 64  # source pictures kept in memory


@dataclass(frozen=True, kw_only=True)
class Args:
    """Draw pictures from prompts with a release."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to draw; each in quotes."""
    release: Path
    """The release folder to draw with."""
    prompts: Path | None = None
    """A text file with one prompt per line; a .jsonl with an object per line (prompt, images, seed, n, height, width,
    negative, id); with --layout the benchmark's own."""
    image: UseAppendAction[tuple[Path, ...]] = ()
    """A picture that every prompt starts from, unless its line names others; may be given several times."""
    out: Path = Path("pictures")
    """The folder for the pictures."""
    layout: LayoutName | None = None
    """The benchmark whose files to write; python -m sample.layouts check tells whether all are there."""
    n: Annotated[int | None, arg(aliases=["-n"])] = None
    """Pictures for each prompt; None: 1, or as the benchmark has it."""
    seed: int = 0
    """The first picture's seed; each further one is one higher."""
    shard: str = "0/1"
    """i/n: draw every n-th picture from i on, counted from 0."""
    batch_size: int = 16
    """Pictures drawn at once; changes speed and memory, and a picture by its rounding alone."""
    grid: bool = False
    """Also write OUT-grid.png beside the folder, all pictures with their prompts."""
    drawing: Annotated[Drawing, OmitArgPrefixes] = Drawing()


def main(argv: list[str] | None = None) -> None:
    """Draws the pictures that fall to this process and are not there yet."""
    args = tyro.cli(Args, args=argv)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size} is too small; give at least 1")
    jobs, beside = plan(args)
    own = share(jobs, args.shard)
    if args.grid and (args.layout or args.shard != "0/1" or ranks()[1] > 1):
        raise ValueError(
            "--grid needs all pictures in one process and a folder of its own; run without torchrun, --shard and --layout"
        )
    draw(args, own)
    for path, text in beside:
        _write(path, text)


def plan(args: Args) -> tuple[list[Job], list[tuple[Path, str]]]:
    """Every picture of the run, and the files that its benchmark wants beside them.

    Raises:
        ValueError: there is no prompt, a file is not as it should be, or a number is out of range.
    """
    if args.layout is not None:
        if args.prompt or args.image or args.prompts is None:
            raise ValueError("--layout takes the benchmark's own prompts; name its file with --prompts, and nothing else")
        layout = LAYOUTS[args.layout]
        entries = layout.entries(args.prompts)
        return layout.jobs(entries, args.n, args.seed), list(layout.beside(args.out, entries))
    lines = [*map(Line, args.prompt), *(read_lines(args.prompts) if args.prompts else ())]
    if args.image and not lines:
        lines = [Line()]
    lines = [replace(line, images=line.images or args.image) for line in lines]
    return jobs_of(lines, 1 if args.n is None else args.n, args.seed), []


def draw(args: Args, jobs: Sequence[Job]) -> None:
    """Draws what is not there yet; all but the pixels of source pictures is checked before the first file is written."""
    # heavy imports wait until the arguments are right, so that --help stays instant
    from model.files import sha256_of
    from sample.pictures import check_picture, open_picture
    from sample.pipeline import Pipeline

    opened = lru_cache(OPEN)(open_picture)
    sources = dict.fromkeys(path for job in jobs for path in job.line.images)
    for path in sources:
        check_picture(path)
    digests = {path: sha256_of(path) for path in sources}
    pipeline = Pipeline.from_release(args.release)
    if sources and pipeline.model.mllm.builder.images is None:
        raise ValueError(f"--release {args.release}: its MLLM sees no pictures; leave out --image and images")
    drawings = {job.name: drawing_of(args.drawing, job.line) for job in jobs}
    pipeline.check([job.line.prompt for job in jobs] + [drawing.negative for drawing in drawings.values()])
    for height, width in {(each.height, each.width) for each in drawings.values()}:
        pipeline.model.shape_of(height or pipeline.model.image_size, width or pipeline.model.image_size)
    told = {job.name: _about(job, drawings[job.name], pipeline.fingerprint, digests) for job in jobs}
    left = [job for job in jobs if not is_there(args.out / job.name, told[job.name])]
    for job, picture in drawn(pipeline, left, drawings, args.batch_size, opened):
        save(args.out / job.name, picture, told[job.name])
    if args.grid:
        _grid(args, jobs, {"release": pipeline.fingerprint, **args.drawing.told(), "software": "querybridge"})
    there = f", {len(jobs) - len(left)} of them there before" if len(left) < len(jobs) else ""
    if jobs:
        print(f"{len(jobs)} pictures in {args.out}{there}")


def drawn(
    pipeline: "Pipeline",
    jobs: Sequence[Job],
    drawings: Mapping[str, Drawing],
    batch_size: int,
    opened: Callable[[Path], "Image.Image"],
) -> Iterator[tuple[Job, "Image.Image"]]:
    """Each job with its picture once that is whole, in the order of the batches."""
    from sample.grid import tiles
    from sample.pipeline import Asked

    parts: dict[str, list[Image.Image]] = defaultdict(list)
    work = list(batches(jobs, drawings, batch_size))
    for batch in progress("drawing")(work):
        asked = [Asked(job.line.prompt, tuple(map(opened, job.line.images))) for job, _ in batch]
        pictures = pipeline(asked, [seed for _, seed in batch], drawings[batch[0][0].name])
        for (job, _), picture in zip(batch, pictures, strict=True):
            parts[job.name].append(picture)
            if len(parts[job.name]) == len(job.seeds):
                yield job, tiles(parts.pop(job.name))


def batches(jobs: Sequence[Job], drawings: Mapping[str, Drawing], size: int) -> Iterator[list[tuple[Job, int]]]:
    """Jobs and one of their seeds each, in batches of one drawing: of one shape, and all from pictures or none."""
    alike: dict[tuple[Drawing, bool], list[tuple[Job, int]]] = defaultdict(list)
    for job in jobs:
        alike[drawings[job.name], bool(job.line.images)] += [(job, seed) for seed in job.seeds]
    for pieces in alike.values():
        yield from (pieces[start : start + size] for start in range(0, len(pieces), size))


def drawing_of(drawing: Drawing, line: Line) -> Drawing:
    """The command line's settings with what a line has of its own."""
    own = {name: getattr(line, name) for name in ("height", "width", "negative")}
    return replace(drawing, **{name: value for name, value in own.items() if value is not None})


def _about(job: Job, drawing: Drawing, release: str, digests: dict[Path, str]) -> dict[str, object]:
    """What decides a picture, and what it is called."""
    line, images = job.line, " ".join(digests[path] for path in job.line.images)
    return about(line.prompt, " ".join(map(str, job.seeds)), drawing, release, id=line.id, images=images)


def _grid(args: Args, jobs: Sequence[Job], about: dict[str, object]) -> None:
    from sample.grid import Cell, Row, sheet
    from sample.pictures import open_picture

    rows = [Row(job.line.prompt, (Cell(open_picture(args.out / job.name)),)) for job in jobs]
    out = args.out.resolve()
    save(out.with_name(f"{out.name}-grid.png"), sheet(rows), about)


def _write(path: Path, text: str) -> None:
    from model.files import write_whole

    if not path.is_file() or path.read_text() != text:
        write_whole(path, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    sys.exit(run(main))
