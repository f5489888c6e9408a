"""A task -> its trained weights: count steps, log, preview, save, resume. Knows no model and no data format."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from model.files import write_json, write_whole
from sample.cli import sentence
from train import checkpoint
from train.lock import alone_in
from train.metrics import Metrics, MetricsConfig, Window
from train.ranks import Ranks, seed_step
from train.rollback import Skipped, refusals, roll_back
from train.saving import Saver
from train.task import Task
from train.watchdog import WatchConfig, Watchdog


@dataclass(frozen=True)
class Schedule:
    """How long, in which portions, and how often what is written."""

    steps: int = 1000
    batch_size: int = 64
    """Samples per optimizer step, over all ranks and micro-batches."""
    accumulation: int = 1
    """Micro-batches per optimizer step: more of them need less memory."""
    log_every: int = 10
    save_every: int = 500
    keep: int = 2
    """Checkpoints kept; older ones are deleted once a newer one is whole."""
    keep_every: int = 0
    """Those of every so many steps are kept for good; 0: none is."""
    keep_best: str | None = None
    """The name of a measure of the previews, like understanding.all: the checkpoint where it is best is kept as well."""
    best_is: Literal["highest", "lowest"] = "highest"
    save_in_background: bool = True
    """Train on while checkpoints are written, from a copy of the state in the hosts' memory where that holds it: 16 bytes of
    each trained parameter, spread over the ranks."""
    preview_every: int = 0
    """0: only at the end."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"schedule.{name} is {getattr(self, name)}; give 1 or more")
        if self.preview_every < 0:
            raise ValueError(f"schedule.preview_every is {self.preview_every}; give 0 (only at the end) or more")
        if self.keep_every < 0 or self.keep_every % self.save_every:
            raise ValueError(
                f"schedule.keep_every is {self.keep_every}; give 0 (none) or a multiple of save_every ({self.save_every})"
            )
        if self.keep_best and (self.preview_every == 0 or self.preview_every % self.save_every):
            raise ValueError(
                f"schedule.keep_best needs previews of what is saved, and schedule.preview_every is {self.preview_every}; "
                f"give a multiple of save_every ({self.save_every})"
            )


def fit(
    task: Task,
    schedule: Schedule,
    *,
    seed: int,
    folder: Path,
    config: dict[str, Any],
    resume: str,
    metrics: MetricsConfig,
    ranks: Ranks,
    watch: WatchConfig = WatchConfig(),
    allow_change: bool = False,
    interrupted: Sequence[str] | None = None,
) -> bool:
    """Train to the last step from wherever `folder` stands; every rank calls it.

    `config` is stored in checkpoints. `interrupted`: the list of an `interruptible` that the caller is in; None: signals
    count from here on. False when one stopped the run early, after saving. Raises `Diverged` when too
    many steps in a row were refused and going back did not help, ValueError for settings that the task does not fit, and
    OSError when the state at the end cannot be saved; any other save that fails is only told. A part that takes longer than
    `watch` allows ends the process.
    """
    if schedule.keep_best and schedule.keep_best not in task.measures():
        known = ", ".join(sorted(task.measures())) or "nothing"
        raise ValueError(
            f"schedule.keep_best is {schedule.keep_best}, and this run's previews measure {known}; name one of it"
        )
    reads = read_alike(task, ranks)
    frozen = {**task.frozen(), **reads} if ranks.first else {}
    root = folder / "checkpoints"
    keep = checkpoint.Keep(schedule.keep, schedule.keep_every, schedule.keep_best, lowest=schedule.best_is == "lowest")
    with ExitStack() as held:
        held.enter_context(alone_in(folder, ranks))  # before looking for a checkpoint: who trains there may write another
        step, samples, skipped, changed = _resume(task, folder, resume, config, frozen, allow_change, ranks)
        log = held.enter_context(Metrics(folder, metrics, ranks, first_step=step, steps=schedule.steps, settings=config))
        interrupted = held.enter_context(interruptible()) if interrupted is None else interrupted
        dog = held.enter_context(Watchdog(watch, ranks.rank, ranks.world))
        saver = held.enter_context(
            Saver(
                root,
                task.engines,
                config,
                keep,
                ranks,
                frozen,
                background=schedule.save_in_background,
                limit_seconds=watch.save_seconds,
                tell=log.event,
            )
        )
        checkpoint.set_aside(root, step, ranks)
        if ranks.first:
            write_whole(folder / "run.json", lambda path: write_json(path, config))
        log.console.print(f"{folder}: from step {step} to {schedule.steps}, sample {samples} on, {ranks.world} rank(s)")
        for line in changed:
            log.console.print(f"  changed since the checkpoint: {line}")
        if ranks.any(bool(interrupted)):  # while networks were read, say; nothing is new that could be saved
            _log_stop(log, step, interrupted)
            return False
        batches = task.batches(samples)
        clock = _Clock()
        window = Window()
        held.enter_context(_workers_named(dog))
        while step < schedule.steps:
            dog.where = f"step {step + 1}, samples {samples} to {samples + schedule.batch_size - 1}"
            _step(task, batches, window, clock, dog, schedule.accumulation, seed, step, ranks)
            why = refusals(task, log, step + 1, samples, schedule.batch_size)
            step, samples = step + 1, samples + schedule.batch_size
            if why:
                with dog.limit("save"):
                    saver.settle()
                    back = roll_back(task, root, step, samples, skipped, why, log, ranks)
                step, skipped = back.step, back.skipped
                batches, window = task.batches(samples), Window()
                clock.restart()
                continue
            last = step == schedule.steps
            stop = ranks.any(bool(interrupted))  # the engine has just waited for the device; launchers kill after 30 s
            if step % schedule.log_every == 0 or last:
                log.log(step, _line(task, window, clock, samples, schedule.batch_size, ranks))
            else:
                log.advance(step)
            if step % schedule.save_every == 0 or last or stop:
                with dog.limit("save"):
                    saver.begin(step, samples, skipped)
                    if stop:
                        saver.finish()
                clock.restart()
            saver.report()
            if stop and not last:
                _log_stop(log, step, interrupted)
                return False
            if last or (schedule.preview_every and step % schedule.preview_every == 0):
                _preview(task, folder / "previews", step, saver, log, dog, ranks)
                clock.restart()
        with dog.limit("save"):
            saver.finish()
        task.release(folder / "release")
    return True


def _log_stop(log: Metrics, step: int, interrupted: Sequence[str]) -> None:
    log.event(step, "stopped", signal=interrupted[0] if interrupted else "on another rank")


def _preview(task: Task, folder: Path, step: int, saver: Saver, log: Metrics, dog: Watchdog, ranks: Ranks) -> None:
    """The task's preview; what it measured stays with this step's checkpoint. One that cannot be written is only told."""
    measured, problem = None, ""
    with dog.limit("preview"):
        try:
            measured = task.preview(folder, step)
        except OSError as error:
            problem = sentence(error)
        ranks.barrier()
    if problem:
        log.event(step, "no preview", reason=problem)
    if measured:
        log.event(step, "preview", **measured)
        with dog.limit("save"):
            saver.note(step, measured)


def read_alike(task: Task, ranks: Ranks) -> dict[str, str]:
    """What the task reads, once it is the same on every rank: each takes its share of the samples by their numbers. Raises
    ValueError, on every rank, where it is not."""
    reads = ranks.gather(task.reads())
    others = [rank for rank, read in enumerate(reads) if read != reads[0]]
    if others:
        named = ", ".join(map(str, others[:8])) + ", ..." * (len(others) > 8)
        raise ValueError(
            f"data.sources: rank(s) {named} read other data than rank 0, so samples would be lost or come twice; see that "
            "all machines hold the same shards, under the same names"
        )
    return reads[0]


def _resume(
    task: Task,
    folder: Path,
    resume: str,
    config: dict[str, Any],
    frozen: dict[str, str],
    allow_change: bool,
    ranks: Ranks,
) -> tuple[int, int, Skipped, list[str]]:
    """Load the checkpoint that `resume` means: (step, samples, windows skipped, settings changed since)."""
    path = checkpoint.find(folder / "checkpoints", resume, ranks)
    if path is None:
        return 0, 0, [], []
    manifest = checkpoint.load(path, task.engines, ranks)
    if not allow_change:
        checkpoint.on_first(ranks, lambda: checkpoint.check_frozen(path, manifest, frozen, config))
    changed = [f"another {part}" for part in checkpoint.other_parts(manifest, frozen)]
    return manifest.step, manifest.samples, manifest.skipped, changed + checkpoint.differences(manifest.config, config)


def _step(
    task: Task,
    batches: Iterator[Any],
    window: Window,
    clock: _Clock,
    dog: Watchdog,
    accumulation: int,
    seed: int,
    step: int,
    ranks: Ranks,
) -> None:
    """One optimizer step: its micro-batches through the task. The scalars of a refused step are not averaged in."""
    scalars = []
    for micro in range(accumulation):
        with clock.waiting(), dog.limit("data"):
            batch = next(batches)
        seed_step(seed, step, micro, ranks.rank)
        with dog.limit("step"):
            scalars.append(task.step(batch))
    clock.steps += 1
    if not any(engine.last and engine.last.objection for engine in task.engines.values()):
        for values in scalars:
            window.add(values)


@contextmanager
def _workers_named(dog: Watchdog) -> Iterator[None]:
    """ValueError when the system has ended a worker of the loader: torch raises that from a signal, wherever training is."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"a process of data.workers was ended from outside at {dog.where} ({str(error).splitlines()[0].strip()}); "
            "if memory ran out, lower data.workers; run again to go on from the last checkpoint"
        ) from error


def _line(task: Task, window: Window, clock: _Clock, samples: int, batch_size: int, ranks: Ranks) -> dict[str, float]:
    """The numbers of one log line; every rank computes them, because the means are collective."""
    line: dict[str, float] = {"samples": samples, **window.means(ranks)}
    for name, engine in task.engines.items():
        prefix = "" if name == "main" else f"{name}."
        if engine.last is not None:
            line |= {f"{prefix}grad_norm": engine.last.grad_norm, f"{prefix}lr": engine.last.lr}
        line[f"{prefix}refused"] = engine.guard.refused
    for name, count in task.counts().items():
        line[name] = int(ranks.sum(torch.tensor(count, device=ranks.device)))
    return line | clock.read(batch_size)


class _Clock:
    """Wall time per step since the last reading, and how much of it was waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, so that saving and previews do not count as steps."""
        self.began, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def read(self, batch_size: int) -> dict[str, float]:
        """Seconds per step, images per second; starts anew."""
        seconds, steps = time.perf_counter() - self.began, self.steps
        line: dict[str, float] = {}
        if steps:
            line["images_per_second"] = batch_size * steps / seconds
            line["step_seconds"], line["data_seconds"] = seconds / steps, self.waited / steps
        self.restart()
        return line


@contextmanager
def interruptible() -> Iterator[list[str]]:
    """A list that the first SIGTERM, SIGINT or SIGUSR1 enters by name; a second of its kind ends the process at once, also
    while it waits for another rank."""
    caught: list[str] = []
    usual: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, usual[number])

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        usual[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
