"""Processes that can be killed: forked from one that has imported everything, so that a rank starts in milliseconds.

The forking process must hold no thread and no process group; __main__ sees to that by forking once for each row.
"""

import ctypes
import itertools
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

HUNG = 1000
"""In place of the exit code of a process that had to be killed because it did not end."""
PR_SET_PDEATHSIG = 1


def fork(work: Callable[[], object], log: Path, group: int = 0) -> int:
    """The pid of a child that does `work`, leads or joins a process group, and ends with its parent. Its exit code: 0, that
    of SystemExit, or 1 after any other exception, which `log` then holds like all that it prints."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, group or pid)
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, group)
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launch(world: int, work: Callable[[int], object], log: Path) -> list[int]:
    """The pids of so many ranks in one process group, each doing work(rank) in the environment that launchers set."""
    port, pids = free_port(), []
    for rank in range(world):

        def ranked(rank: int = rank) -> None:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            work(rank)

        pids.append(fork(ranked, log, group=pids[0] if pids else 0))
    return pids


def torchrun(world: int, work: Callable[[], object], log: Path, shutdown_seconds: int = 30) -> int:
    """The pid of torchrun's own agent over so many ranks."""

    def agent() -> None:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world,
            local_addr="127.0.0.1",
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            start_method="fork",
            signals_to_handle="SIGTERM,SIGINT,SIGUSR1",
            shutdown_timeout=shutdown_seconds,
            logs_specs=DefaultLogsSpecs(log_dir=str(log.parent / "agent")),
        )
        elastic_launch(config, work)()

    return fork(agent, log)


def wait(pids: list[int], seconds: float = 60) -> list[int]:
    """The exit codes, negative for a signal. Those that have not ended in time are killed, and count as HUNG."""
    until, codes = time.monotonic() + seconds, dict.fromkeys(pids, HUNG)
    left = set(pids)
    while left and time.monotonic() < until:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                left.discard(pid)
        time.sleep(0.005)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return list(codes.values())


def until(holds: Callable[[], object], seconds: float = 60) -> bool:
    """Whether something came to hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


def die_at(point: int, folder: Path) -> Callable[[], int]:
    """Kill this process, as a power cut would, just before it asks the system for the point-th time (from 0) for something
    in `folder`. Returns what counts how often it has."""
    asked, here = itertools.count(), str(folder)
    seen = [0]

    def look(event: str, arguments: tuple) -> None:
        if event.startswith(("open", "os.", "shutil.")) and any(here in str(argument) for argument in arguments):
            seen[0] += 1
            if next(asked) == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    return lambda: seen[0]
