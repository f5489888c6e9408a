"""Engines -> a checkpoint, written by all ranks in parallel: each has its share of the parameters, in files of its own.

all ranks together    an empty partial folder; each rank's share is gathered to it, one kind of one engine at a time
each rank             writes its files, syncs and hashes them, and says so in part-00001.json of that folder
rank 0                waits for all parts, then gives the folder its manifest and its name
"""

from __future__ import annotations

import heapq
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.files import read_json, sha256_of, sync, write_json, write_whole
from sample.cli import sentence
from train import checkpoint
from train.checkpoint import FORMAT, Keep, Manifest
from train.engine import KINDS, Engine
from train.ranks import Ranks

Share = Iterable[tuple[str, dict[str, Tensor]]]
"""(file name, tensors by name) of what one rank writes."""
POLL_SECONDS = 0.05


@dataclass
class Saver:
    """Writes the checkpoints of one run below `root`. Every rank has one, and they are called together."""

    root: Path
    engines: Mapping[str, Engine]
    config: dict[str, Any]
    keep: Keep
    ranks: Ranks
    frozen: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    limit_seconds: float = 0.0
    """How long rank 0 waits for the others' parts; 0: for ever."""

    def save(self, step: int, samples: int) -> Path:
        """Write `root/step-<step>` whole, then drop those that are not to be kept. Raises OSError on every rank when one
        rank cannot write."""
        final, partial = self.root / f"step-{step:08d}", self.root / f".step-{step:08d}.partial"
        checkpoint.on_first(self.ranks, lambda: checkpoint.empty(partial))
        manifest = Manifest(
            FORMAT,
            step,
            samples,
            world=self.ranks.world,
            zero=max(engine.config.zero for engine in self.engines.values()),
            counters={name: engine.counters() for name, engine in self.engines.items()},
            config=self.config,
            sha256={},
            frozen=dict(self.frozen),
        )
        write_part(partial, share_of(self.engines, self.ranks), self.ranks)
        checkpoint.on_first(self.ranks, lambda: self._publish(partial, final, manifest))
        return final

    def _publish(self, partial: Path, final: Path, manifest: Manifest) -> None:
        """Rank 0's end of a save; of one that failed, nothing stays."""
        try:
            sha256 = collect_parts(partial, self.ranks.world, self.limit_seconds)
            checkpoint.publish(partial, final, replace(manifest, sha256=sha256), self.keep)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def owners(engines: Mapping[str, Engine], world: int) -> dict[tuple[str, str], int]:
    """The rank that writes each parameter, by (engine, name): the largest first, each by the rank that has least so far."""
    sizes = {(name, key): prod(shape) for name, engine in engines.items() for key, shape in engine.shapes().items()}
    loads = [(0, rank) for rank in range(world)]
    owner = {}
    for place in sorted(sizes, key=lambda place: (-sizes[place], place)):
        load, owner[place] = loads[0]
        heapq.heapreplace(loads, (load + sizes[place], owner[place]))
    return owner


def share_of(engines: Mapping[str, Engine], ranks: Ranks) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What this rank writes: copies in host memory, one kind of one engine at a time. All ranks iterate together, to the
    end."""
    owner = owners(engines, ranks.world)
    for name, engine in engines.items():
        writers = sorted({rank for (of, _), rank in owner.items() if of == name})
        mine = {key for (of, key), rank in owner.items() if (of, rank) == (name, ranks.rank)}
        part = f".{writers.index(ranks.rank) + 1:05d}-of-{len(writers):05d}" if mine and len(writers) > 1 else ""
        for kind in KINDS:
            tensors = dict(engine.tensors(kind, mine))
            if tensors:
                yield f"{name}.{kind}{part}.safetensors", tensors
        if ranks.first and (buffers := engine.buffers()):
            yield f"{name}.buffers.safetensors", {key: buffer.to("cpu", copy=True) for key, buffer in buffers.items()}


def write_part(partial: Path, share: Share, ranks: Ranks) -> None:
    """Write this rank's files, and a note of their sha256 or of the reason why not. What fails is not raised here: to gather
    the rest of a share takes all ranks."""
    sha256: dict[str, str] = {}
    problem = None
    for name, tensors in share:
        try:
            if problem is None:
                sha256[name] = _write(partial / name, tensors)
        except (ValueError, OSError) as error:
            problem = f"rank {ranks.rank}: {sentence(error)}"
            for written in (*sha256, name):  # a full disk then has room for the note
                (partial / written).unlink(missing_ok=True)
    write_whole(_note(partial, ranks.rank), lambda draft: write_json(draft, {"sha256": sha256, "problem": problem}))


def collect_parts(partial: Path, world: int, limit_seconds: float = 0.0) -> dict[str, str]:
    """The sha256 of all ranks' files by name, once no rank writes any more; their notes go. Raises OSError when a rank could
    not, or is not done in time."""
    began, missing = time.monotonic(), set(range(world))
    parts = []
    while missing:
        found = {path.name for path in partial.iterdir()}  # listed anew, because network file systems remember absence
        for rank in [rank for rank in sorted(missing) if _note(partial, rank).name in found]:
            parts.append(read_json(_note(partial, rank)))
            _note(partial, rank).unlink()
            missing.remove(rank)
        if limit_seconds and missing and time.monotonic() - began > limit_seconds:
            raise OSError(f"rank {min(missing)} has not written its part in {limit_seconds:g} s")
        if missing:
            time.sleep(POLL_SECONDS)
    if problems := [part["problem"] for part in parts if part["problem"]]:
        raise OSError(problems[0])
    return dict(sorted(item for part in parts for item in part["sha256"].items()))


def _note(partial: Path, rank: int) -> Path:
    return partial / f"part-{rank + 1:05d}.json"


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors durably; their file's sha256. Raises OSError, and ValueError for what is no state to go on from."""
    checkpoint.check_finite(path, tensors.items())
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes 0600; the folder's mode knows the umask
    sync(path)
    return sha256_of(path)
