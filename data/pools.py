"""A source -> the pools that an order draws from: all of it, or one for each aspect-ratio bucket."""

from dataclasses import dataclass

import numpy as np

from data.buckets import Buckets
from data.shards import ShardSource
from data.source import Source


@dataclass(frozen=True)
class Pool:
    """All samples of a source, or those of one bucket."""

    name: str
    source: Source
    members: np.ndarray | None = None  # their numbers in the source; None: all

    def __len__(self) -> int:
        """How many there are; 0 means endless."""
        return len(self.source) if self.members is None else len(self.members)

    def number(self, index: int) -> int:
        """The number in the source of sample `index`; after the last comes the first."""
        if self.members is not None:
            return int(self.members[index % len(self.members)])
        return index % len(self.source) if len(self.source) else index


def pools_of(name: str, source: Source, buckets: Buckets | None) -> list[Pool]:
    """One, or one for every bucket that has samples. Sources other than shards have squares."""
    if buckets is None or not isinstance(source, ShardSource):
        return [Pool(name, source)]
    found = buckets.nearest(source.shapes)
    number = np.uint32 if len(source) < 1 << 32 else np.int64  # half the memory, and there may be a hundred million
    members = (np.flatnonzero(found == bucket).astype(number) for bucket in range(len(buckets.shapes)))
    return [Pool(name, source, numbers) for numbers in members if len(numbers)]
