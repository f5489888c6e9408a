"""A model in the middle of training -> one labelled picture of what it draws for fixed prompts and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.files import write_whole
from model.metaquery import MetaQuery
from model.prefix import PrefixBuilder
from sample.grid import Cell, Row, sheet
from sample.pipeline import Pipeline
from sample.settings import Drawing, Guidance


@dataclass(frozen=True)
class PreviewConfig:
    """What is drawn each time, so that pictures of different steps compare."""

    prompts: tuple[str, ...] = ()
    """Empty: no previews."""
    seed: int = 0
    """Prompt number i is drawn with seed + i."""
    steps: int = 20
    guidance: float = 3.0

    def __post_init__(self) -> None:
        try:
            self.drawing()
        except ValueError as error:
            raise ValueError(f"task.preview.{error}") from error

    def drawing(self) -> Drawing:
        """How each is drawn."""
        return Drawing(self.steps, Guidance(self.guidance))

    def check(self, builder: PrefixBuilder) -> None:
        """ValueError for a prompt that the MLLM cannot read: before a run, and not at its first preview."""
        for prompt in self.prompts:
            try:
                builder.draw([prompt])
            except ValueError as error:
                raise ValueError(f"task.preview.prompts: {error}") from error


def draw_preview(model: MetaQuery, config: PreviewConfig, path: Path) -> None:
    """Write the sheet of all prompts to `path`, a PNG."""
    seeds = range(config.seed, config.seed + len(config.prompts))
    pictures = Pipeline(model)(config.prompts, seeds, config.drawing())
    rows = [Row(prompt, (Cell(picture),)) for prompt, picture in zip(config.prompts, pictures, strict=True)]
    write_whole(path, lambda part: sheet(rows).save(part, format="PNG"))
