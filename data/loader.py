"""Data config -> an endless iterator of batches whose position is one integer.

The global batch at position `samples` holds sample numbers samples .. samples + size - 1; rank r of w takes every w-th,
from the r-th on. data/order.py says where each number comes from, so the same numbers meet in the same global batch on
any number of ranks and workers, and a resumed run neither repeats nor loses a sample.
"""

import hashlib
import itertools
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset

from data.buckets import Buckets
from data.dropout import Dropout
from data.order import BucketedOrder, Order, Place, quotas
from data.pools import Pool, pools_of
from data.quality import MAX_BAD_IN_A_ROW, Quality
from data.records import DRAWN, BadSample, Record, Task, to_record
from data.shards import Shards, ShardSource
from data.source import Source, WorldSource
from data.storage import CacheConfig
from data.stream import StreamSource

T = TypeVar("T", covariant=True)
Collate = Callable[[Sequence[Any], Sequence[int]], Any]  # (records, sample numbers) -> batch


@runtime_checkable
class Selective(Protocol):
    """A collate that refuses some records."""

    def check(self, record: Any) -> None:
        """BadSample for a record that no batch of this collate can hold."""
        ...


@dataclass(frozen=True)
class World:
    """Samples of the generated world, endless."""

    seed: int = 0
    split: str = "train"
    weight: float = 1.0  # this source's share of the samples, relative to the others'


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    sources: tuple[World | Shards, ...] = (World(),)
    task: Task = "t2i"
    image_size: int = 64  # pixels a side
    max_aspect: float = 1.0  # above 1: batches of pictures up to so many times as long as wide, of about the same area
    bucket_step: int = 64  # pixels of which their sides are multiples
    dropout: Dropout = field(default_factory=Dropout)
    workers: int = 0  # processes that prepare batches; 0 prepares them in the training process
    max_bad_share: float = 0.01  # of samples that cannot be used and are replaced, in all or of a shard; more ends the run
    cache: CacheConfig = field(default_factory=CacheConfig)

    @property
    def buckets(self) -> Buckets | None:
        """The shapes of batches; None where every picture becomes a square."""
        return None if self.max_aspect == 1 else Buckets(self.image_size, self.max_aspect, self.bucket_step)

    def name(self, source: int) -> str:
        """What a source is called in logs."""
        config = self.sources[source]
        return config.split if isinstance(config, World) else config.urls


def open_source(data: Data, config: World | Shards, seed: int = 0, rank: int = 0, world_size: int = 1) -> Source:
    """The source that `config`, one of the data's, names. A world is rendered at its image size; a stream gives the part of
    this rank."""
    if isinstance(config, World):
        return WorldSource(config.seed, config.split, data.task, data.image_size)
    if config.stream:
        if data.buckets is not None:
            raise ValueError("data.max_aspect: the shapes of a stream's pictures are not known; set its stream to 0")
        return StreamSource(config.urls, config.stream, seed, rank, world_size)
    if config.latents is not None and data.task not in (*DRAWN, "labelled"):
        raise ValueError(
            f"data.sources latents stand for pictures to draw, and data.task {data.task} draws none; leave them out"
        )
    if config.latents is not None and data.buckets is not None:
        raise ValueError("data.sources latents are those of squares; leave them out, or set data.max_aspect to 1")
    keep = data.task in ("i2i", "labelled")
    return ShardSource(config.urls, config.latents, keep, shapes=data.buckets is not None, cache=data.cache)


class Positions(Dataset[T]):
    """Endless batches by the number of their first sample; set `samples` to go on from there."""

    def __init__(self, rows: range, workers: int) -> None:
        self.samples = 0
        self.rows, self._workers = rows, workers

    def numbers(self, position: int) -> list[int]:
        """This rank's sample numbers of the batch at `position`."""
        return [position + row for row in self.rows]

    def __iter__(self) -> Iterator[T]:
        """Batches from `samples` on, prepared by the config's workers."""
        positions = itertools.count(self.samples, self.rows.stop)
        generator = torch.Generator().manual_seed(0)  # DataLoader would draw from the global stream otherwise
        for batch in DataLoader(
            _Careful(self),
            batch_size=None,
            sampler=positions,
            num_workers=self._workers,
            collate_fn=_unchanged,
            generator=generator,
            worker_init_fn=_outlive_signals,
        ):
            if isinstance(batch, ValueError | OSError):
                raise batch
            yield batch


class _Careful(Dataset[Any]):
    """Gives an error that the user can mend as a result: torch would make a worker's whole traceback its message."""

    def __init__(self, positions: Positions[Any]) -> None:
        self._positions = positions

    def __getitem__(self, position: int) -> Any:
        try:
            return self._positions[position]
        except (ValueError, OSError) as error:
            return error


@dataclass(frozen=True)
class _Fetched:
    batch: Any  # None: too many bad samples in a row
    read: Counter[str]  # samples by the name of their source
    looked_at: Counter[str]  # by their shard, replaced ones included
    rejects: Counter[tuple[str, str]]  # (shard, reason) -> samples


class _Batches(Positions[_Fetched]):
    """Position -> this rank's rows of the global batch there. Pure, so that any worker can do it (but for streams)."""

    def __init__(self, config: Data, collate: Collate, rows: range, seed: int, batch_size: int):
        super().__init__(rows, config.workers)
        self._task: Task = config.task
        self._collate = collate
        self._check = collate.check if isinstance(collate, Selective) else None  # asked once: a Protocol is slow to tell
        self._sources = [open_source(config, source, seed, rows.start, rows.step) for source in config.sources]
        weights, buckets = [source.weight for source in config.sources], config.buckets
        by_source = [pools_of(config.name(number), source, buckets) for number, source in enumerate(self._sources)]
        self._pools = list(itertools.chain(*by_source))
        lengths = [[len(pool) for pool in pools] for pools in by_source]
        if buckets is None:
            self._order = Order([length for (length,) in lengths], weights, seed)
            self._identity = (seed, quotas(weights))
        else:
            self._order = BucketedOrder(lengths, weights, seed, batch_size)
            self._identity = (seed, quotas(weights), buckets, batch_size)

    def __iter__(self) -> Iterator[_Fetched]:
        self.begin(self.samples)
        yield from super().__iter__()

    def begin(self, samples: int) -> None:
        """Streams start anew, for what comes after global sample number `samples`."""
        for source in self._sources:
            if isinstance(source, StreamSource):
                source.begin(samples)

    def fingerprint(self) -> str:
        """sha256 of the sources, their shares and the seed."""
        sha = hashlib.sha256(repr(self._identity).encode())
        for source in self._sources:
            sha.update(source.fingerprint().encode())
        return sha.hexdigest()

    def __getitem__(self, position: int) -> _Fetched:
        samples = self.numbers(position)
        places = [self._order.place(sample) for sample in samples]
        self._fetch(places)
        fetched = _Fetched(None, Counter(), Counter(), Counter())
        records = []
        for place in places:
            record = self._record(self._pools[place.pool], place.index, fetched)
            if record is None:
                return fetched
            records.append(record)
        return replace(fetched, batch=self._collate(records, samples))

    def _fetch(self, places: Sequence[Place]) -> None:
        wanted: defaultdict[int, list[int]] = defaultdict(list)
        for place in places:
            wanted[place.pool].append(self._pools[place.pool].number(place.index))
        for pool, numbers in wanted.items():
            self._pools[pool].source.fetch(numbers)

    def _record(self, pool: Pool, index: int, fetched: _Fetched) -> Record | None:
        """The record at this index of a pool; in place of a bad one, the next good one."""
        fetched.read[pool.name] += 1
        for ahead in range(MAX_BAD_IN_A_ROW):
            number, reason = pool.number(index + ahead), None
            try:
                record = to_record(self._task, pool.source.read(number))
                if self._check is not None:
                    self._check(record)
                return record
            except BadSample as bad:
                reason = bad.reason
            finally:
                origin = pool.source.origin(number)  # of a stream, known only now
                fetched.looked_at[origin] += 1
                if reason is not None:
                    fetched.rejects[origin, reason] += 1
        return None


class Loader:
    """Endless batches for one rank. `samples`, the global samples handed out so far, is the whole state: set it to resume.

    `collate` turns this rank's records and their global sample numbers into a batch (data/batch.py). Where the data has
    buckets, the `batch_size` samples of an optimizer step, over all ranks and micro-batches, are of one shape; by default,
    those of one micro-batch. ValueError when the data is too bad to go on (data/quality.py)."""

    def __init__(
        self,
        config: Data,
        collate: Collate,
        batch_size_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        batch_size: int | None = None,
    ):
        if batch_size_per_rank < 1:
            raise ValueError(f"the batch size per rank is {batch_size_per_rank}; give at least one sample to every rank")
        if config.workers < 0:
            raise ValueError(f"data.workers is {config.workers}; give 0 or the number of worker processes")
        self.samples = 0
        self.quality = Quality(config.max_bad_share)
        self.read = Counter({config.name(number): 0 for number in range(len(config.sources))})  # by source, since it started
        self._global_batch = batch_size_per_rank * world_size
        self._whole = 1 if config.buckets is None else batch_size or self._global_batch  # samples that share a shape
        rows = range(rank, self._global_batch, world_size)
        self._batches = _Batches(config, collate, rows, seed, batch_size or self._global_batch)

    @property
    def rejects(self) -> Counter[tuple[str, str]]:
        """(shard, reason) -> samples this rank had to replace since it started."""
        return self.quality.rejects

    def fingerprint(self) -> str:
        """sha256 of what decides which sample a number stands for: every source, its share and the seed."""
        return self._batches.fingerprint()

    def first(self) -> Any:
        """The batch at sample 0, for what shows how far a training is; nothing is counted. Ask for it before iterating: of a
        stream, it is the beginning of a pass. ValueError when its data is too bad."""
        self._batches.begin(0)
        fetched = self._batches[0]
        if fetched.batch is None:
            self.quality.judge(fetched.looked_at, fetched.rejects, whole=False)
        return fetched.batch

    def __iter__(self) -> Iterator[Any]:
        """Batches from `samples` on. `samples` moves when a batch is handed out, however far the workers have read ahead.
        ValueError where `samples` lies within what is to be of one shape."""
        if self.samples % self._whole:
            raise ValueError(
                f"schedule.batch_size is {self._whole}, and with data.max_aspect a batch has one shape: to go on from "
                f"sample {self.samples:,}, give a size that divides it"
            )
        self._batches.samples = self.samples
        for fetched in self._batches:
            self.read.update(fetched.read)
            self.quality.judge(fetched.looked_at, fetched.rejects, whole=fetched.batch is not None)
            self.samples += self._global_batch
            yield fetched.batch


def _unchanged(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """Launchers and terminals signal the whole process group; the training saves then, and its workers leave with it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
