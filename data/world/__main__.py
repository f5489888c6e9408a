"""The generated world as files: shards to train on, a check of the pixel reader, and a picture to look at.

python -m data.world shards --split train --n 20000 --task t2i --out shards/world
python -m data.world check --n 10000
python -m data.world preview --task edit --out edits.png
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data.pack import write_shards
from data.world.check import KINDS, Tally, check, tally
from data.world.items import Maker, in_order, png
from data.world.preview import preview
from data.world.reader import LEAST_SIZE
from model.files import write_json, write_whole

DESCRIPTION = "The generated world as files: shards to train on, a check of the pixel reader, and a picture to look at."
Split = Literal["train", "val", "pairs", "counts"]


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Write samples as tar shards in img2dataset's layout; the same bytes for a seed, whatever the number of workers.

    t2i: picture, caption, scene. chat: picture and messages, or messages alone. edit: KEY.source0.png is the picture before,
    KEY.png the one after, the text says what to do, and the json holds both scenes."""

    out: Path
    """Folder to create; it appears when everything is written, or not at all."""
    split: Split = "train"
    """train; val: unseen scenes of the same kind; pairs: each holds a held-out colour and shape; counts: five objects."""
    n: int = 20_000
    """Samples."""
    task: Literal["t2i", "chat", "edit"] = "t2i"
    """What the samples are for."""
    seed: int = 0
    size: int = 64
    """Pixels a side."""
    workers: int = 0
    """Processes that make samples beside the one that writes them; 0: none."""
    shard_size: int = 10_000
    """Samples in a shard."""

    def run(self) -> int:
        """Write the shards and say where they are."""
        _at_least(1, n=self.n, size=self.size)
        _at_least(0, workers=self.workers)
        with in_order(Maker(self.task, self.seed, self.split, self.size), self.n, self.workers) as items:
            written = write_shards(range(self.n), lambda _: next(items), self.out, self.shard_size)
        print(f"samples {written.samples:,}, shards {written.shards:,}: {self.out}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Check:
    """Read clean renders of all splits, and a tenth as many of each damaged or deceptive kind; exit code 1 if a clean one
    is misread.

    clean: as rendered. soft: mild blur and noise. sketchy: wavy outlines, a tint, specks. blurred: strongly. crossfade: two
    scenes at once. morph: half way between two shapes. noise. "wrong" counts readings that call themselves clear but are not
    what the picture shows; of a crossfade, morph or noise every clear reading is wrong."""

    n: int = 10_000
    """Clean renders."""
    seed: int = 0
    size: int = 64
    """Pixels a side."""
    json: Path | None = None
    """File to write the measures to."""

    def run(self) -> int:
        """Read, print a table, write the measures."""
        _at_least(1, n=self.n)
        _at_least(LEAST_SIZE, size=self.size)
        pictures = {kind: self.n if kind == "clean" else -(-self.n // 10) for kind in KINDS}
        results = track(check(pictures, self.seed, self.size), "reading", total=sum(pictures.values()))
        tallies = tally(results)
        table = Table("pictures", "n", "right", "wrong, yet called clear", "ms of CPU each")
        for t in tallies.values():
            table.add_row(t.kind, f"{t.pictures:,}", _percent(t.right, t), _percent(t.wrong, t), f"{t.milliseconds:.2f}")
        Console().print(table)
        if self.json is not None:
            measures = {name: value for t in tallies.values() for name, value in t.measures().items()}
            write_whole(self.json, lambda path: write_json(path, measures))
        return 0 if tallies["clean"].right == tallies["clean"].pictures else 1


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Draw a page of scenes with their captions, or of edits (before, after, changed pixels) with their instructions."""

    out: Path
    """PNG file to write."""
    split: Split = "train"
    task: Literal["t2i", "edit"] = "t2i"
    n: int = 32
    """Scenes or edits."""
    seed: int = 0
    size: int = 128
    """Pixels a side of each picture."""
    columns: int = 8

    def run(self) -> int:
        """Draw the page and write it."""
        _at_least(1, n=self.n, size=self.size, columns=self.columns)
        page = png(preview(self.seed, self.split, self.task, self.n, self.size, self.columns))
        write_whole(self.out, lambda path: path.write_bytes(page))
        print(self.out)
        return 0


def _at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise ValueError(f"--{name} is {value}; give at least {least}")


def _percent(count: int, tally: Tally) -> str:
    return f"{100 * count / tally.pictures:.2f} %"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 if the check found a misread clean render, 2 with one sentence for input that cannot be used."""
    command = tyro.cli(Shards | Check | Preview, args=arguments, prog="python -m data.world", description=DESCRIPTION)
    try:
        return command.run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
