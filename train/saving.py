"""Engines -> a checkpoint, written by all ranks in parallel: each has its share of the parameters, in files of its own.

    all ranks together    an empty partial folder; each rank's share is copied to its host's memory
    a thread of each      writes the rank's files, syncs and hashes them, and says so in part-00001.json of that folder
    rank 0's thread       waits for all parts, then gives the folder its manifest and its name, and drops old checkpoints

Training goes on beside the threads, which need no other rank. Where memory does not hold a copy of the state, it waits, and
the share passes through memory one kind of one engine at a time.
"""

from __future__ import annotations

import heapq
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from threading import Thread
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.files import read_json, sha256_of, sync, write_json, write_whole
from sample.cli import sentence
from train import checkpoint
from train.checkpoint import FORMAT, Keep, Manifest
from train.engine import KINDS, Engine
from train.machine import available_memory
from train.ranks import Ranks

Share = Iterable[tuple[str, dict[str, Tensor]]]
"""(file name, tensors by name) of what one rank writes."""
POLL_SECONDS = 0.05


@dataclass
class _Save:
    """One save; where a thread writes it, `problem` counts once that has ended."""

    step: int
    problem: str | None = "its writer died"
    kept_too_much: str | None = None
    thread: Thread | None = None
    told: bool = False


@dataclass
class Saver:
    """Writes the checkpoints of one run below `root`, one at a time; enter it around training. Every rank has one, all are
    called together."""

    root: Path
    engines: Mapping[str, Engine]
    config: dict[str, Any]
    keep: Keep
    ranks: Ranks
    frozen: Mapping[str, str] = field(default_factory=dict)
    background: bool = False
    limit_seconds: float = 0.0
    """How long rank 0 waits for the others' parts; 0: for ever."""
    tell: Callable[..., None] = lambda step, event, **facts: None
    """Takes what happens: a step, a word, and facts by name."""
    _save: _Save | None = field(default=None, init=False)
    _crowded: bool = field(default=False, init=False)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """An error does not cost what is being written; who interrupts twice does not want to wait."""
        if kind is None or issubclass(kind, Exception):
            self._join()
            self.report()

    def begin(self, step: int, samples: int, skipped: Sequence[tuple[int, int]] = ()) -> None:
        """Save the state of this moment, once the save before is done. In the background, it returns with a copy taken."""
        self.settle()
        self._save = save = _Save(step)
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
            skipped=list(skipped),
        )
        try:
            checkpoint.on_first(self.ranks, lambda: checkpoint.make_partial(self._partial(step)))
        except OSError as error:
            save.problem = sentence(error)
            return
        share = share_of(self.engines, self.ranks)
        if self.background and self._memory_holds(step):
            save.thread = Thread(target=self._write, args=(save, manifest, list(share)), name="saver", daemon=True)
            save.thread.start()
        else:
            self._write(save, manifest, share)
            self.settle()

    def settle(self) -> str | None:
        """Wait for the last save; why it failed, the same on every rank, or None when it did not."""
        if self._save is None:
            return None
        self._join()
        self.report()
        return next((problem for problem in self.ranks.gather(self._save.problem) if problem), None)

    def finish(self) -> None:
        """Wait for the last save. Raises OSError on every rank when it failed."""
        if problem := self.settle():
            assert self._save is not None
            raise OSError(f"step {self._save.step} is not saved ({problem}); mend that, and the same command goes on")

    def note(self, step: int, measures: Mapping[str, float]) -> None:
        """Rank 0 has measured the state of `step`: lay that beside its checkpoint, if there is one, and keep the best."""
        self._join()
        path = checkpoint.path_of(self.root, step)
        if not path.is_dir():
            return
        try:
            checkpoint.note(path, measures)
            checkpoint.prune(self.root, self.keep)
        except OSError as error:
            self.tell(step, "measures not noted", reason=sentence(error))

    def report(self) -> None:
        """Tell how the last save ended, if that is news."""
        save = self._save
        if save is None or save.told or (save.thread is not None and save.thread.is_alive()):
            return
        save.told = True
        if save.problem:
            self.tell(save.step, "not saved", reason=save.problem)
        else:
            self.tell(save.step, "saved", path=str(checkpoint.path_of(self.root, save.step)))
        if save.kept_too_much:
            self.tell(save.step, "an old checkpoint stays", reason=save.kept_too_much)

    def _join(self) -> None:
        if self._save is not None and self._save.thread is not None:
            self._save.thread.join()

    def _partial(self, step: int) -> Path:
        return self.root / f".step-{step:08d}.partial"

    def _memory_holds(self, step: int) -> bool:
        """Whether half of what is free on each host holds the shares of its ranks; says once when it does not."""
        owner, sizes, here = owners(self.engines, self.ranks.world), sizes_of(self.engines), socket.gethostname()
        own = 4 * len(KINDS) * sum(size for place, size in sizes.items() if owner[place] == self.ranks.rank)
        needed = sum(size for host, size in self.ranks.gather((here, own)) if host == here)
        crowded = self.ranks.any(needed > available_memory() / 2)
        if crowded and not self._crowded:
            self.tell(step, "saves hold training up", reason="memory does not hold a copy of the state")
        self._crowded |= crowded
        return not crowded

    def _write(self, save: _Save, manifest: Manifest, share: Share) -> None:
        """What one rank does without the others."""
        partial = self._partial(save.step)
        try:
            write_part(partial, share, self.ranks)
            if self.ranks.first:
                sha256 = collect_parts(partial, self.ranks.world, self.limit_seconds)
                checkpoint.publish(partial, checkpoint.path_of(self.root, save.step), replace(manifest, sha256=sha256))
            save.problem = None
        except OSError as error:
            save.problem = sentence(error)
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
        if self.ranks.first and save.problem is None:
            try:
                checkpoint.prune(self.root, self.keep)
            except OSError as error:
                save.kept_too_much = sentence(error)


def state_bytes(engines: Mapping[str, Engine]) -> int:
    """Bytes of all KINDS of every trained parameter, in float32."""
    return 4 * len(KINDS) * sum(sizes_of(engines).values())


def sizes_of(engines: Mapping[str, Engine]) -> dict[tuple[str, str], int]:
    """Numbers in each parameter, by (engine, name)."""
    return {(name, key): prod(shape) for name, engine in engines.items() for key, shape in engine.shapes().items()}


def owners(engines: Mapping[str, Engine], world: int) -> dict[tuple[str, str], int]:
    """The rank that writes each parameter, by (engine, name): the largest first, each by the rank that has least so far."""
    sizes = sizes_of(engines)
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
    if problem is not None:  # a full disk then has room for the note
        for name in sha256:
            (partial / name).unlink()
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
