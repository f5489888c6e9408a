"""Shards read from end to end as they come, without an index: for a first look at shards elsewhere.

What is lost against indexed shards, whose order is a function of the seed alone: the order depends on the number of ranks
and workers; samples mix only within a buffer; a resumed run begins the shards anew, in another order, so that some samples
come twice and some later. What is kept: any number of shards serves any number of ranks, each shard is read equally often,
all ranks take equally many steps, and no damage is silent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import count, islice
from random import Random
from typing import Any, BinaryIO, NamedTuple

from torch.utils.data import get_worker_info

from data.address import draw, permute
from data.records import BadSample
from data.shard_index import MAX_BYTES, Damaged, members_of
from data.shards import check_sizes, decode_members, expand
from data.storage import TRIES, is_url, store_of, unreached, unsigned, wait


class _Packed(NamedTuple):
    shard: str
    key: str
    members: dict[str, bytes]  # by extension; none where the shard is damaged from here on


class StreamSource:
    """The samples of all shards that a pattern names, one after the other; endless."""

    def __init__(self, urls: str, buffer: int, seed: int, rank: int = 0, world_size: int = 1):
        """buffer: samples, encoded, among which the next is drawn, in every worker."""
        self._shards, self._buffer, self._seed = expand(urls), buffer, seed
        self._rank, self._world_size = rank, world_size
        self._start = 0
        self._stream: Iterator[_Packed] | None = None
        self._at = urls

    def __len__(self) -> int:
        return 0

    def begin(self, samples: int) -> None:
        """Start a new order, from which whatever comes after global sample number `samples` is drawn."""
        self._start, self._stream = samples, None

    def origin(self, index: int) -> str:
        """The shard of the sample read last."""
        return self._at

    def fingerprint(self) -> str:
        """The names of the shards: which sample a number stands for is not known before."""
        return repr(list(map(unsigned, self._shards)))

    def fetch(self, indices: object) -> None:
        """Nothing: they come in their order."""

    def read(self, index: int) -> dict[str, Any]:
        """The next sample, decoded, whatever its number; BadSample where a member is broken or a shard ends early."""
        if self._stream is None:
            self._stream = self._shuffled()
        self._at, key, members = next(self._stream)
        if not members:
            raise BadSample("a shard is damaged")
        check_sizes({extension: len(data) for extension, data in members.items()})
        return decode_members(key, members) | {"latent": None}

    def _shuffled(self) -> Iterator[_Packed]:
        """Each sample drawn from a buffer that the next of the stream then fills."""
        worker = get_worker_info()
        streams = self._world_size * (worker.num_workers if worker else 1)
        number = self._rank * (streams // self._world_size) + (worker.id if worker else 0)
        chance = Random(draw(self._seed, "stream", self._start, number))
        samples = self._in_order(number, streams)
        held = list(islice(samples, self._buffer))
        for sample in samples:
            place = chance.randrange(len(held))
            held[place], sample = sample, held[place]
            yield sample

    def _in_order(self, number: int, streams: int) -> Iterator[_Packed]:
        """Every so many-th shard of all passes through all shards, each pass in another order."""
        empty: set[str] = set()  # shards of this stream
        for turn in count(number, streams):
            epoch, position = divmod(turn, len(self._shards))
            shard = self._shards[permute(position, len(self._shards), self._seed, "stream", self._start, epoch)]
            empty.add(shard)
            for sample in _samples(shard):
                yield sample
                empty.discard(shard)
            if len(empty) == len(self._shards):
                raise ValueError(f"data.sources urls: {shard} and the others hold no sample; name others")


def _samples(shard: str) -> Iterator[_Packed]:
    """The samples of a shard; at last one without members if it is damaged. OSError where it does not come."""
    given, store = 0, store_of(shard) if is_url(shard) else None
    for attempt in range(TRIES):
        wait(attempt)
        try:
            with _open(shard, store) as file:
                for sample in islice(_grouped(file, shard), given, None):
                    yield sample
                    given += 1
            return
        except Damaged:
            yield _Packed(shard, "", {})
            return
        except Exception as error:
            if store is None and not isinstance(error, OSError):
                raise
            problem = unreached(shard, error)
            if attempt == TRIES - 1 or isinstance(problem, FileNotFoundError):
                raise problem from error


def _open(shard: str, store: Any) -> AbstractContextManager[BinaryIO]:
    return open(shard, "rb") if store is None else store.open(shard, "rb", cache_type="readahead")


def _grouped(file: BinaryIO, shard: str) -> Iterator[_Packed]:
    """Neighbours of one key are a sample."""
    held = _Packed(shard, "", {})
    for key, extension, header in members_of(file, shard):
        if key != held.key and held.members:
            yield held
        if key != held.key:
            held = _Packed(shard, key, {})
        file.seek(header.offset_data)
        limit = MAX_BYTES[extension.rpartition(".")[2]]
        held.members[extension] = file.read(min(header.size, limit + 1))  # one more than may be tells that it is too large
    if held.members:
        yield held
