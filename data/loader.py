"""Data config -> an endless iterator of batches whose position is one integer.

The global batch at position `samples` holds sample numbers samples .. samples + size - 1; rank r of w takes every w-th,
from the r-th on. data/order.py says where each number comes from, so the same numbers meet in the same global batch on
any number of ranks and workers, and a resumed run neither repeats nor loses a sample.
"""

import hashlib
import itertools
import logging
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset

from data.dropout import Dropout
from data.order import Order
from data.records import DRAWN, BadSample, Record, Task, to_record
from data.shards import Shards, ShardSource
from data.source import Source, WorldSource

MAX_BAD_IN_A_ROW = 100
MAX_BAD_SHARE = 0.01
MIN_READ_TO_JUDGE = 1_000  # samples, before the share of bad ones counts

log = logging.getLogger(__name__)

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
    dropout: Dropout = field(default_factory=Dropout)
    workers: int = 0  # processes that prepare batches; 0 prepares them in the training process


def open_source(config: World | Shards, task: Task, image_size: int) -> Source:
    """The random-access source that `config` names; the world is rendered at `image_size` pixels a side."""
    if isinstance(config, World):
        return WorldSource(config.seed, config.split, task, image_size)
    if config.latents is not None and task not in (*DRAWN, "labelled"):
        raise ValueError(f"data.sources latents stand for pictures to draw, and data.task {task} draws none; leave them out")
    return ShardSource(config.urls, config.latents, keep_pictures=task in ("i2i", "labelled"))


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
        yield from DataLoader(
            self,
            batch_size=None,
            sampler=positions,
            num_workers=self._workers,
            collate_fn=_unchanged,
            generator=generator,
            worker_init_fn=_outlive_signals,
        )


@dataclass(frozen=True)
class _Fetched:
    batch: Any  # None: too many bad samples in a row
    rejects: Counter[tuple[str, str]]  # (source, reason) -> samples


class _Batches(Positions[_Fetched]):
    """Position -> this rank's rows of the global batch there. Pure, so that any worker can do it."""

    def __init__(self, config: Data, collate: Collate, rows: range, seed: int):
        super().__init__(rows, config.workers)
        self._names = [source.split if isinstance(source, World) else source.urls for source in config.sources]
        self._sources = [open_source(source, config.task, config.image_size) for source in config.sources]
        weights = [source.weight for source in config.sources]
        self._order = Order([len(source) for source in self._sources], weights, seed)
        self._identity = (seed, weights)
        self._task: Task = config.task
        self._collate = collate

    def fingerprint(self) -> str:
        """sha256 of the sources, their shares and the seed."""
        sha = hashlib.sha256(repr(self._identity).encode())
        for source in self._sources:
            sha.update(source.fingerprint().encode())
        return sha.hexdigest()

    def __getitem__(self, position: int) -> _Fetched:
        samples = self.numbers(position)
        rejects: Counter[tuple[str, str]] = Counter()
        records = []
        for sample in samples:
            record = self._record(sample, rejects)
            if record is None:
                return _Fetched(None, rejects)
            records.append(record)
        return _Fetched(self._collate(records, samples), rejects)

    def _record(self, sample: int, rejects: Counter[tuple[str, str]]) -> Record | None:
        """The record at this sample number; in place of a bad one, the next good one of the same source."""
        place = self._order.place(sample)
        source, name = self._sources[place.source], self._names[place.source]
        for ahead in range(MAX_BAD_IN_A_ROW):
            index = place.index + ahead
            try:
                record = to_record(self._task, source.read(index % len(source) if len(source) else index))
                if isinstance(self._collate, Selective):
                    self._collate.check(record)
                return record
            except BadSample as bad:
                rejects[name, bad.reason] += 1
                log.debug("source %s, sample %d: %s", name, index, bad.reason)
        return None


class Loader:
    """Endless batches for one rank. `samples`, the global samples handed out so far, is the whole state: set it to resume.

    `collate` turns this rank's records and their global sample numbers into a batch (data/batch.py). ValueError when the
    data is too bad to go on: past 1 % rejects, or 100 in a row."""

    def __init__(
        self, config: Data, collate: Collate, batch_size_per_rank: int, rank: int = 0, world_size: int = 1, seed: int = 0
    ):
        if batch_size_per_rank < 1:
            raise ValueError(f"the batch size per rank is {batch_size_per_rank}; give at least one sample to every rank")
        if config.workers < 0:
            raise ValueError(f"data.workers is {config.workers}; give 0 or the number of worker processes")
        self.samples = 0
        self.rejects: Counter[tuple[str, str]] = Counter()  # (source, reason) -> samples this rank had to replace
        self._read = 0  # samples this rank has handed out since it started
        self._global_batch = batch_size_per_rank * world_size
        self._batches = _Batches(config, collate, range(rank, self._global_batch, world_size), seed)

    def fingerprint(self) -> str:
        """sha256 of what decides which sample a number stands for: every source, its share and the seed."""
        return self._batches.fingerprint()

    def __iter__(self) -> Iterator[Any]:
        """Batches from `samples` on. `samples` moves when a batch is handed out, however far the workers have read ahead."""
        self._batches.samples = self.samples
        for fetched in self._batches:
            self.rejects += fetched.rejects
            self._read += len(self._batches.rows)
            self._judge(fetched)
            self.samples += self._global_batch
            yield fetched.batch

    def _judge(self, fetched: _Fetched) -> None:
        bad = self.rejects.total()
        counts = "; ".join(f"{count} x {reason} ({source})" for (source, reason), count in self.rejects.most_common(5))
        if fetched.batch is None:
            raise ValueError(f"{MAX_BAD_IN_A_ROW} samples in a row cannot be used: {counts}; check data.sources, data.task")
        if self._read >= MIN_READ_TO_JUDGE and bad > MAX_BAD_SHARE * self._read:
            raise ValueError(f"{bad} of {self._read} samples cannot be used: {counts}; repair or remove that source")


def _unchanged(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """Launchers and terminals signal the whole process group; the training saves then, and its workers leave with it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
