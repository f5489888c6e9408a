"""A run, on the ranks that will train it -> one page that says whether it would go, before hours are spent on it.

    python -m train.doctor metaquery.world
    torchrun --nproc_per_node 8 -m train.doctor metaquery.xlarge_sana --data.sources.0.urls 'shards/t2i/*.tar'

The same words as for train.run, under the same launcher. Looked at are versions and settings on every rank, what the network
between them takes, the folder of the run as each rank sees it, the signals that the launcher passes on, the data, and one
whole step, whose weights are thrown away: nothing of the run is written. Exit code 1 when something would go wrong.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data.loader import World
from data.shard_index import index_shards, kept_index
from data.shards import Shards, expand
from data.storage import is_url
from model.files import dump_config, write_whole
from sample import cli
from train import checkpoint
from train.config import Run
from train.ranks import Lost, Ranks, others_answer, start
from train.saving import state_bytes

PACKAGES = ("torch", "deepspeed", "transformers", "diffusers", "webdataset", "safetensors")
REDUCED_BYTES = 16 << 20
PATIENCE_SECONDS = 60.0  # for ranks that do not answer, and for a file to be seen by all of them


@dataclass(frozen=True)
class Finding:
    """What one look found on one rank."""

    said: str
    problem: str | None = None
    reads: dict[str, str] | None = None
    """sha256 of the data by name, which is one on all ranks."""


Look = Callable[[Run, Ranks], Finding]


def main(argv: list[str] | None = None) -> None:
    """Looks at everything, prints one table on rank 0. Raises SystemExit(1) when something would go wrong."""
    from train.run import parse

    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if words else 2)
    run = parse(words)
    run = replace(run, engine=replace(run.engine, timeout_seconds=PATIENCE_SECONDS))
    ranks = start(PATIENCE_SECONDS)
    looks: dict[str, Look] = {
        "versions": versions,
        "settings": settings,
        "network": network,
        "signals": signals,
        "folder": folder,
        "data": data,
        "step": step,
    }
    table, well = Table("what", "found", "would go wrong", show_lines=True), True
    for name, look in looks.items():
        mine = _careful(look, run, ranks)
        if mine.problem and ranks.world > 1:  # now, because others may wait elsewhere for this rank, and end without a table
            print(f"rank {ranks.rank}: {name}: {mine.problem}", file=sys.stderr, flush=True)
        try:
            with others_answer():
                found = ranks.gather(mine)
        except Lost as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        problems = {f"rank {rank}: {each.problem}" for rank, each in enumerate(found) if each.problem}
        others = [rank for rank, each in enumerate(found) if each.reads != found[0].reads]
        if others and not problems:
            problems = {f"rank {rank}: it reads other data than rank 0; see that it has the same shards" for rank in others}
        table.add_row(name, "\n".join(sorted({each.said for each in found})), "\n".join(sorted(problems)))
        if problems:  # what comes next may wait for a rank that cannot answer
            well = False
            break
    if ranks.first:
        Console().print(table)
    ranks.leave()
    if not well:
        raise SystemExit(1)


def versions(run: Run, ranks: Ranks) -> Finding:
    """Python and the packages that decide numbers; the same everywhere."""
    mine = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    said = ", ".join(f"{name} {number}" for name, number in mine.items())
    other = next((name for each in ranks.gather(mine) for name in mine if each[name] != mine[name]), None)
    return Finding(said, other and f"ranks have different versions of {other}; install the same everywhere")


def settings(run: Run, ranks: Ranks) -> Finding:
    """The resolved run; the same everywhere."""
    mine = dump_config(run)
    alike = all(each == mine for each in ranks.gather(mine))
    said = f"{run.name}: {ranks.world} rank(s), ZeRO {run.engine.zero}, {run.engine.precision}, on {ranks.device.type}"
    return Finding(said, None if alike else "ranks were started with different settings; give all of them the same words")


def network(run: Run, ranks: Ranks) -> Finding:
    """A sum over ranks: whether it is right, and how fast."""
    if ranks.world == 1:
        return Finding("one rank alone")
    values = torch.full((REDUCED_BYTES // 4,), float(ranks.rank + 1), device=ranks.device)
    expected = ranks.world * (ranks.world + 1) / 2
    right = bool((ranks.sum(values.clone()) == expected).all())
    began = time.perf_counter()
    float(ranks.sum(values)[0])  # waits for the device
    seconds = time.perf_counter() - began
    slowest = max(ranks.gather(seconds))
    said = f"all-reduce of {REDUCED_BYTES >> 20} MiB: {REDUCED_BYTES / slowest / 1e6:,.0f} MB/s"
    return Finding(said, None if right else "an all-reduce gave a wrong sum; check the network and its drivers")


def signals(run: Run, ranks: Ranks) -> Finding:
    """Whether a scheduler's early warning reaches the ranks: torchrun passes on what it is told to."""
    passed = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")
    if passed is None:
        return Finding("no torchrun above: signals reach the ranks as they are sent")
    missing = "SIGUSR1" not in passed.split(",")
    advice = "; for schedulers that warn by SIGUSR1 give torchrun --signals-to-handle SIGTERM,SIGINT,SIGUSR1"
    return Finding(f"torchrun passes on {passed}" + advice * missing)


def folder(run: Run, ranks: Ranks) -> Finding:
    """Whether the run's folder can be written, is one and the same for all ranks, and has room."""
    place = run.folder.absolute()
    existing = _existing(place)
    name, problem = f".doctor-{uuid.uuid4().hex}", None
    if ranks.first:
        try:
            write_whole(existing / name, lambda path: path.write_text(name))
        except OSError as error:
            problem = f"{existing} cannot be written ({error.strerror}); give another --out"
    name, problem = ranks.share((name, problem))
    if problem:
        return Finding(f"{place}", problem)
    until = time.monotonic() + (10.0 if ranks.world > 1 else 0.0)
    while not (seen := (existing / name).is_file()) and time.monotonic() < until:
        time.sleep(0.1)
    ranks.barrier()
    if ranks.first:
        (existing / name).unlink()
    free = shutil.disk_usage(existing).free
    said = f"{place}: {free / 1e9:,.1f} GB free"
    return Finding(said, None if seen else f"rank 0 writes to {existing} and this rank does not see it; give a shared --out")


def data(run: Run, ranks: Ranks) -> Finding:
    """The shards that are named, and how many were indexed ahead."""
    return Finding("\n".join(_source(source, run) for source in run.data.sources))


def _source(source: World | Shards, run: Run) -> str:
    if isinstance(source, World):
        return "a generated world, endless"
    paths = expand(source.urls)
    if source.stream:
        return f"{source.urls}: {len(paths):,} shards, streamed: a resumed run may repeat samples"
    if is_url(paths[0]):
        samples, cache = sum(map(len, index_shards(paths))), run.data.cache
        held = f"through a cache of {cache.gigabytes:g} GB on each machine"
        return f"{source.urls}: {len(paths):,} shards, {samples:,} samples, {held}"
    indexed = sum(kept_index(path, digest=False, shapes=run.data.buckets is not None) is not None for path in paths)
    size = sum(os.path.getsize(path) for path in paths)
    missing = len(paths) - indexed
    advice = f"; {missing:,} not indexed yet: python -m data.index {source.urls!r}" if missing else ""
    return f"{source.urls}: {len(paths):,} shards, {size / 1e9:,.2f} GB{advice}"


def step(run: Run, ranks: Ranks) -> Finding:
    """Builds the task, reads a batch and takes one optimizer step; what that takes, and what a checkpoint will."""
    aside = run.folder.with_name(f".{run.folder.name}.{ranks.share(uuid.uuid4().hex[:8])}.doctor")  # for a fresh MLLM
    try:
        task: Any = replace(run, out=aside).build(ranks)
    finally:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
    batches = task.batches(0)
    began = time.perf_counter()
    held = [next(batches) for _ in range(run.schedule.accumulation)]
    read = time.perf_counter() - began
    scalars = [task.step(batch) for batch in held][-1]
    loss = ", ".join(f"{name} {float(value):.4g}" for name, value in scalars.items())
    seconds = time.perf_counter() - began - read
    objection = next((e.last.objection for e in task.engines.values() if e.last and e.last.objection), None)
    size = state_bytes(task.engines)
    there, schedule = len(checkpoint.held(run.folder / "checkpoints")), run.schedule
    for_good = schedule.steps // schedule.keep_every if schedule.keep_every else 0
    wanted = schedule.keep + for_good + bool(schedule.keep_best) + 1  # a new one is whole before an old one goes
    more = size * max(1, wanted - there)
    free = shutil.disk_usage(_existing(run.folder.absolute())).free
    memory = ""
    if ranks.device.type == "cuda":
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        memory = f"; peak {torch.cuda.max_memory_allocated() / 1e9:,.1f} of {total / 1e9:,.1f} GB"
    said = (
        f"read in {max(ranks.gather(read)):.2f} s, stepped in {max(ranks.gather(seconds)):.2f} s (the first is slow): {loss}"
        f"{memory if ranks.first else ''}\na checkpoint takes {size / 1e9:,.2f} GB, all to come {more / 1e9:,.2f} GB"
    )
    if objection:
        return Finding(said, f"the first step is refused: {objection}; look at the data and the starting weights")
    fewer = ", or lower schedule.keep, or raise keep_every" * (more > size)
    full = f"the disk has {free / 1e9:,.2f} GB free; make room{fewer}"
    return Finding(said, full if free < more else None, task.reads())


def _careful(look: Look, run: Run, ranks: Ranks) -> Finding:
    """What a look finds; what it raises for the user is a problem."""
    try:
        return look(run, ranks)
    except (ValueError, OSError) as error:
        return Finding("", cli.sentence(error))
    except RuntimeError as error:  # out of memory, a rank that does not answer
        return Finding("", f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


if __name__ == "__main__":
    sys.exit(cli.run(main))
