"""A training that hangs -> one that ends, saying where: the stacks of all threads, the step and its samples.

A rank that waits for ever keeps all others waiting, and a machine that is paid for. Each part of a step has a limit; past it
the process prints what it was doing and ends with exit code 6, upon which the launcher ends the others.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

HUNG = 6
"""The exit code."""
PARTS = {"data": "reading a batch", "step": "a step", "save": "saving", "preview": "a preview"}
""""X" has its limit in watch.X_seconds."""


@dataclass(frozen=True)
class WatchConfig:
    """How many seconds a part of training may take before the run is given up; 0: as many as it likes. Keep them below
    `engine.timeout_seconds`, after which ranks that wait for another give up without saying for whom."""

    data_seconds: float = 480.0
    """For a batch."""
    step_seconds: float = 480.0
    """For a micro-batch through forward, backward and optimizer; the first may compile."""
    save_seconds: float = 480.0
    """For a checkpoint."""
    preview_seconds: float = 480.0
    """For what is drawn or asked on the way, while the other ranks wait."""

    def __post_init__(self) -> None:
        for part in PARTS:
            if self.seconds(part) < 0:
                raise ValueError(f"watch.{part}_seconds is {self.seconds(part)}; give 0 (no limit) or more")

    def seconds(self, part: str) -> float:
        """The limit of one of PARTS."""
        return getattr(self, f"{part}_seconds")


class Watchdog:
    """Watches one process from a thread of its own; enter it around training. `where` says what it is at."""

    def __init__(self, config: WatchConfig, rank: int, world: int = 1, tick_seconds: float = 1.0) -> None:
        self.where = "the start"
        self._config, self._tick = config, tick_seconds
        self._who = f"rank {rank} hangs" + ", or waits for one that hangs or is gone" * (world > 1)
        self._due: tuple[float, str] | None = None  # (time.monotonic at which it is given up, what would be said)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def limit(self, part: str) -> Iterator[None]:
        """What happens inside, one of PARTS, may take as long as the config says."""
        if seconds := self._config.seconds(part):
            what = f"{PARTS[part]} (watch.{part}_seconds)"
            said = f"{self._who}: {what} has taken over {seconds:g} s at {self.where}"
            self._due = time.monotonic() + seconds, said
        try:
            yield
        finally:
            self._due = None

    def _watch(self) -> None:
        while not self._stop.wait(self._tick):
            due = self._due
            if due is not None and time.monotonic() > due[0]:
                print(f"\n{due[1]}; its threads:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                os._exit(HUNG)
