"""Sample numbers -> items to pack into shards, made by one process or several, in order either way."""

import io
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from data.pack import Item
from data.source import WorldSource

CHUNK = 64  # samples that a process makes at a time


@dataclass(frozen=True)
class Maker:
    """Sample number -> the sample that the loader would get from `data.source.WorldSource`, ready to be packed."""

    task: Literal["t2i", "chat", "edit"]
    seed: int
    split: str
    size: int

    def __call__(self, index: int) -> Item:
        raw = WorldSource(self.seed, self.split, self.task, self.size).read(index)
        image = None if raw["image"] is None else png(raw["image"])
        sources = tuple(png(source) for source in raw.get("sources", ()))
        mask = png(raw["mask"]) if raw.get("mask") else None
        world = {"seed": self.seed, "split": self.split, "index": index}
        return Item(raw["txt"], image, sources, raw["json"] | {"world": world}, mask)


@contextmanager
def in_order(make: Maker, n: int, workers: int) -> Iterator[Iterator[Item]]:
    """make(0), make(1), ... make(n - 1), by so many processes at once, or by this one if 0."""
    if workers == 0:
        yield map(make, range(n))
        return
    methods = multiprocessing.get_all_start_methods()
    method = "fork" if "fork" in methods else "spawn"  # fork spares each process the import of torch, which none uses
    ends = signal.signal, (signal.SIGTERM, signal.SIG_DFL)  # a handler of this process's would outlive the pool's end
    with multiprocessing.get_context(method).Pool(workers, *ends) as pool:
        yield pool.imap(make, range(n), CHUNK)


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
