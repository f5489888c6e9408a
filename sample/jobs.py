"""One thread that does all the work with a model: neither transformers nor our caches may be used from two at once.

A job is a function of `tell`. What it tells comes out of an iterator, as it is told; where it tells something, it can end.
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")
Tell = Callable[[T], None]


class Stopped(Exception):
    """Nobody listens to a job any more, or all jobs were ended."""


class Jobs:
    """Done one after another, each for at most `seconds`."""

    def __init__(self, seconds: float):
        if not seconds > 0:
            raise ValueError(f"seconds: {seconds} leaves no time for a job; give a positive number")
        self.seconds = seconds
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._closed = Event()

    def stream(self, job: Callable[[Tell[T]], None]) -> Generator[T, None, None]:
        """What `job(tell)` tells. It waits for the jobs before it; closing the iterator ends it where it tells next, and
        so does the end of its time.

        Raises:
            ValueError: the time is over.
            Stopped: `close` was called; and whatever the job raises.
        """
        if self._closed.is_set():
            raise Stopped
        running = _Job(job, self.seconds, self._closed)
        future = self._thread.submit(running.run)
        future.add_done_callback(running.finish)
        try:
            yield from running.heard()
            if future.cancelled():
                raise Stopped
            future.result()
        finally:
            running.left.set()

    def close(self) -> None:
        """Ends the job that is running where it tells next; those that wait are never begun."""
        self._closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)


class _Job(Generic[T]):
    def __init__(self, work: Callable[[Tell[T]], None], seconds: float, closed: Event):
        self.work, self.seconds, self.closed = work, seconds, closed
        self.left = Event()
        self.deadline = 0.0
        self.told: SimpleQueue[tuple[T] | None] = SimpleQueue()  # None: no more

    def run(self) -> None:
        self.deadline = monotonic() + self.seconds
        self._go_on()
        self.work(self.tell)

    def tell(self, value: T) -> None:
        self._go_on()
        self.told.put((value,))

    def finish(self, _: Future[None]) -> None:
        self.told.put(None)

    def heard(self) -> Iterator[T]:
        while (value := self.told.get()) is not None:
            yield value[0]

    def _go_on(self) -> None:
        if self.left.is_set() or self.closed.is_set():
            raise Stopped
        if monotonic() > self.deadline:
            raise ValueError(f"this took longer than {self.seconds:g} seconds; ask for less, or start with --seconds")
