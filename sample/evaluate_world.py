"""Held-out scenes of the generated world -> how often a release draws what it is asked for (`sample/world_suite.py`, judged
by the pixel reader), and how well its MLLM answers questions about held-out pictures (`sample/world_answers.py`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from sample.progress import progress
from sample.settings import Drawing


@dataclass(frozen=True, kw_only=True)
class World:
    """Score a release on held-out scenes of the generated world."""

    release: Path
    """The release folder to score."""
    split: tuple[Literal["val", "pairs", "counts"], ...] = ("val",)
    """val: seen pairs of colour and shape; pairs: held-out pairs; counts: more objects than training shows."""
    n: int = 100
    """Prompts for each category; 0 leaves drawing out."""
    images: int = 200
    """Pictures to ask the MLLM about; 0 leaves understanding out."""
    seed: int = 0
    """Decides prompts, pictures and questions."""
    think: bool = False
    """A plan of each picture is written first and drawn from too, as `sample.chat --think` does; one picture at a time."""
    batch_size: int = 32
    """Pictures drawn, and questions asked, at once."""
    json: Path | None = None
    """Where to write the measures."""
    grid: Path | None = None
    """Where to write a PNG of the first pictures of each category, with verdicts."""
    html: Path | None = None
    """Where to write all of it as one page, pictures included."""
    drawing: Annotated[Drawing, OmitArgPrefixes] = Drawing()


def world(args: World) -> None:
    """Draws, asks, prints the measures, and writes them where told.

    Raises:
        ValueError: a number is out of range, or the release cannot be loaded or draws too small to be read.
    """
    if args.n < 0 or args.images < 0 or args.n + args.images == 0 or args.batch_size < 1:
        raise ValueError("give --n or --images above 0, none below, and a --batch-size of at least 1")
    if args.grid is not None and not args.n:
        raise ValueError("--grid shows drawn pictures; give --n above 0, or leave it out")
    # heavy imports wait until the arguments are right, so that --help stays instant
    from model.files import write_whole
    from sample.measures import Measure, show, write_json
    from sample.pipeline import Pipeline
    from sample.protocol import parts_of, protocol
    from sample.session import Session
    from sample.world_answers import exams, understanding
    from sample.world_drawing import Judged, check_readable, drawing, picture_of
    from sample.world_suite import suite

    pipeline = Pipeline.from_release(args.release)
    if args.images and pipeline.model.mllm.builder.images is None:
        raise ValueError(f"--images {args.images}: the MLLM of {args.release} reads text alone; give --images 0")
    if args.n:
        check_readable(pipeline.model.image_size, args.drawing)

    def draw(prompts, seeds):
        if not args.think:
            return pipeline(prompts, seeds, args.drawing)
        pairs = zip(prompts, seeds, strict=True)
        return [Session(pipeline).draw(text, seed=seed, drawing=args.drawing, think=True) for text, seed in pairs]

    measures: dict[str, Measure] = {}
    judged: list[Judged] = []
    for split in args.split if args.n else ():
        name = "generation" if split == "val" else f"generation.{split}"
        asked = suite(args.seed, split, args.n)
        scores, verdicts = drawing(draw, asked, name, args.seed, args.batch_size, progress(f"drawing {split}"))
        measures |= scores
        judged += verdicts
    if args.images:
        asked = exams(args.seed, "val", args.images)
        measures |= understanding(pipeline.model.mllm, asked, args.batch_size, progress("asking"))
    show(f"{args.release}", measures)
    told = protocol(args, parts_of(pipeline.model))
    if args.json is not None:
        write_json(args.json, measures, told)
    if args.grid is not None:
        picture = picture_of(judged)
        write_whole(args.grid, lambda temporary: picture.save(temporary, format="PNG"))
    if args.html is not None:
        from sample.report_html import page, world_figures

        text = page(f"What {args.release} draws and understands", measures, told, world_figures(judged))
        write_whole(args.html, lambda temporary: temporary.write_text(text, encoding="utf-8"))
