"""A run's folder -> nobody else trains there meanwhile."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path

from train.ranks import Ranks


@contextmanager
def alone_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Nobody else trains in `folder` meanwhile: two that write one run would mix their steps. Raises ValueError, on every
    rank, when another process does, or the folder cannot be written. The system lets go of it however this process ends;
    a file system without locks is taken as it is."""
    problem, new = None, False
    with ExitStack() as held:
        if ranks.first:
            try:
                new = not folder.exists()
                folder.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context((folder / ".lock").open("a+"))
                flock(lock, LOCK_EX | LOCK_NB)
                lock.truncate(0)
                print(f"pid {os.getpid()} on {platform.node()}", file=lock, flush=True)
            except BlockingIOError:
                seconds = max(0.0, time.time() - (folder / ".lock").stat().st_mtime)
                problem = (
                    f"out: another process ({(folder / '.lock').read_text().strip()}) is training in {folder} "
                    f"for {seconds:,.0f} s; wait for it, stop it, or give another --out"
                )
            except OSError as error:
                if error.errno not in (ENOSYS, ENOLCK, EOPNOTSUPP):
                    problem = f"out: {folder} cannot be written ({error.strerror}); give another --out"
        if problem := ranks.share(problem):
            raise ValueError(problem)
        try:
            yield
        except ValueError:
            if new and [*folder.iterdir()] == [folder / ".lock"]:  # refused before anything came of it
                shutil.rmtree(folder)
            raise
