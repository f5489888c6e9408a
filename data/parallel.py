"""Work on many shards at once, in the order of the shards, with a progress bar."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def bar(what: str) -> Progress:
    """A progress bar that counts and estimates."""
    return Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())


def each_shard(work: Callable[[str], T], paths: Sequence[str], jobs: int, what: str) -> Iterator[T]:
    """work(path) for every shard, by `jobs` processes (0: one a core; a single job stays in this one)."""
    if jobs < 0:
        raise ValueError(f"--jobs is {jobs}; give 0 (one process for each core) or more")
    jobs = min(jobs or os.cpu_count() or 1, len(paths))
    with bar(what) as progress:
        if jobs == 1:
            yield from progress.track(map(work, paths), total=len(paths))
            return
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            yield from progress.track(pool.map(work, paths), total=len(paths))
