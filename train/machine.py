"""What this machine is and has. Measures of speed -> a file, and it beside: a time means nothing without its machine."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from model.files import write_whole
from sample.measures import Measure, write_json


def record(path: Path, measures: Mapping[str, Measure]) -> None:
    """Writes NAME.json, and NAME.machine.txt for `sample.report`."""
    write_json(path, measures)
    write_whole(path.with_suffix(".machine.txt"), lambda draft: draft.write_text(f"{describe()}\n"))


def describe() -> str:
    """Date, processor, GPU if there is one, and the versions of what computes."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name"))
        processor = next(names, processor)
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    packages = [f"{name} {version(name)}" for name in ("torch", "transformers", "diffusers", "deepspeed")]
    threads = f"{torch.get_num_threads()} thread(s)"
    return ", ".join(
        [f"{datetime.now(UTC):%Y-%m-%d}", processor, threads, *gpu, f"Python {platform.python_version()}", *packages]
    )


def available_memory() -> float:
    """Bytes of host memory that programs can still take: what the system says, or the container's limit less what is used of
    it and could not be given back."""
    free = [float(psutil.virtual_memory().available)]
    limits = Path("/sys/fs/cgroup")  # version 2
    if (limits / "memory.max").is_file() and (limit := (limits / "memory.max").read_text().strip()) != "max":
        counted = dict(line.split() for line in (limits / "memory.stat").read_text().splitlines())
        given_back = int(counted["file"]) - int(counted["shmem"])  # shared memory counts among the files
        used = int((limits / "memory.current").read_text()) - given_back
        free.append(float(int(limit) - used))
    return min(free)


def check_device(device: str) -> None:
    """ValueError for one that is not there."""
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device is {device}, and torch finds no GPU; give cpu")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the best of five products of large square matrices."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(timed(lambda: a @ a, device) for _ in range(5))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began
