"""Changes of held-out pictures, one by one and in turns -> how well a release makes them (`sample/world_edits.py`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from sample.progress import progress
from sample.settings import Drawing


@dataclass(frozen=True, kw_only=True)
class Edits:
    """Score how a release edits held-out pictures, draws them once more, draws their subjects, and obeys in three turns."""

    release: Path
    """The release folder to score."""
    split: tuple[Literal["val", "pairs"], ...] = ("val",)
    """val: seen pairs of colour and shape; pairs: scenes with held-out pairs."""
    n: int = 100
    """Edits, and as many reconstructions, subjects and conversations."""
    seed: int = 0
    """Decides pictures, words and noise."""
    batch_size: int = 32
    """Pictures drawn at once."""
    json: Path | None = None
    """Where to write the measures."""
    grid: Path | None = None
    """Where to write a PNG of the first of each kind, with verdicts."""
    html: Path | None = None
    """Where to write all of it as one page, pictures included."""
    drawing: Annotated[Drawing, OmitArgPrefixes] = Drawing()


def edits(args: Edits) -> None:
    """Draws, judges, prints the measures, and writes them where told.

    Raises:
        ValueError: a number is out of range, or the release cannot be loaded or draws too small to be read.
    """
    if args.n < 1 or args.batch_size < 1:
        raise ValueError("give --n and --batch-size of at least 1")
    from model.files import write_whole
    from sample.measures import Measure, show, write_json
    from sample.pipeline import Pipeline
    from sample.protocol import parts_of, protocol
    from sample.world_drawing import check_readable
    from sample.world_edits import Dialogue, Judged, conversing, drawer, editing, grid

    pipeline = Pipeline.from_release(args.release)
    check_readable(pipeline.model.image_size, args.drawing)
    draw = drawer(pipeline, args.drawing)
    measures: dict[str, Measure] = {}
    judged: list[Judged] = []
    held: list[Dialogue] = []
    for split in args.split:
        scores, verdicts = editing(draw, split, args.n, args.seed, args.batch_size, progress(f"editing {split}"))
        talked, dialogues = conversing(draw, split, args.n, args.seed, args.batch_size, progress(f"conversing {split}"))
        measures |= scores | talked
        judged += verdicts
        held += dialogues
    show(f"{args.release}", measures)
    told = protocol(args, parts_of(pipeline.model))
    if args.json is not None:
        write_json(args.json, measures, told)
    if args.grid is not None:
        picture = grid(judged, held)
        write_whole(args.grid, lambda temporary: picture.save(temporary, format="PNG"))
    if args.html is not None:
        from sample.report_html import edit_figures, page

        text = page(f"How {args.release} edits", measures, told, edit_figures(judged, held))
        write_whole(args.html, lambda temporary: temporary.write_text(text, encoding="utf-8"))
