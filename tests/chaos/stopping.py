"""Rows R1 to R5, R8 and R9: a training that is stopped, hangs or loses a process."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.loader import Data, Loader, World
from tests.chaos.processes import launch, torchrun, until, wait
from tests.chaos.rows import Outcome, row
from tests.test_loop import SCHEDULE, lines, state, train
from tests.toy import BATCH, Toy
from train import checkpoint, doctor, run, saving
from train.engine import EngineConfig
from train.loop import fit
from train.metrics import MetricsConfig
from train.ranks import start
from train.watchdog import HUNG, WatchConfig

CONFIG = EngineConfig(zero=1, precision="fp32")
SAVED = os.EX_TEMPFAIL
FOR_EVER = 1_000_000


def trained(folder: Path, task: Toy, **schedule: Any) -> None:
    """What `python -m train.run` does with a task, exit code included."""
    if not train(folder, task, **schedule):
        raise SystemExit(SAVED)


class Slow(Toy):
    """Takes a hundredth of a second longer for a step, and says when it has begun."""

    folder: Path

    def step(self, batch):
        (self.folder / "begun").touch()
        time.sleep(0.01)
        return super().step(batch)


@row(
    "R1",
    "SIGTERM to one rank, or to torchrun's agent",
    "agreed by all ranks within a step, saved, exit 75; the run goes on",
    "20 of 20 saved",
    trials=20,
    fast=2,
)
def preempted(trials: int, folder: Path) -> Outcome:
    """One run, stopped so many times at random moments and started again; at its end it is one that was never stopped."""
    outcome, draw, took, before = Outcome(), random.Random(0), [], 0
    run = folder / "run"
    run.mkdir()

    def work(rank: int) -> None:
        task = Slow(start(60), CONFIG)
        task.folder = run
        try:
            trained(run, task, steps=FOR_EVER, save_every=FOR_EVER, log_every=100)
        finally:
            (run / f"ended-{rank}").touch()

    for trial in range(trials):
        (run / "begun").unlink(missing_ok=True)
        by_agent = trial % 2 == 1
        if by_agent:
            pids = [torchrun(2, lambda: work(int(os.environ["RANK"])), folder / "log")]
        else:
            pids = launch(2, work, folder / "log")
        until((run / "begun").exists)
        time.sleep(draw.random() / 2)
        os.kill(pids[0] if by_agent else draw.choice(pids), signal.SIGTERM)
        began = time.monotonic()
        codes = wait(pids)
        took.append(time.monotonic() - began)
        newest = checkpoint.held(run / "checkpoints")[-1:]
        step = checkpoint.verify(newest[0]).step if newest else 0
        told = lines(run)[-1]
        good = step > before and told.get("event") == "stopped" and told["step"] == step
        good = good and (by_agent or codes == [SAVED, SAVED])
        outcome.add(
            good, f"{'agent' if by_agent else 'rank'}: exit codes {codes}, step {before} to {step}, last said {told}"
        )
        before = step

    def straight(rank: int) -> None:
        trained(folder / "straight", Toy(start(60), CONFIG), steps=before, save_every=before)

    codes = wait(launch(2, straight, folder / "log"), 200)
    alike = codes == [0, 0] and state(folder / "straight", before) == state(run, before)
    outcome.add(alike, f"after {before} steps the run is not the one that was never stopped")
    outcome.seen = f"all ended within {max(took):.1f} s; after {before:,} steps bit for bit the run that was never stopped"
    return outcome


class Numbers:
    """Collate: the sample numbers of a batch."""

    def __call__(self, records: Sequence[Any], indices: Sequence[int]) -> range:
        return range(indices[0], indices[-1] + 1)


class Reading(Toy):
    """Reads a loader with a worker; what happens `after` three batches happens while the next is awaited."""

    after: Callable[[], None] = staticmethod(lambda: None)
    workers = 1

    def batches(self, samples: int) -> Iterator[range]:
        loader = Loader(Data(sources=(World(),), image_size=16, workers=self.workers), Numbers(), BATCH)
        loader.samples = samples
        for numbers in loader:
            yield numbers
            if numbers[0] == 3 * BATCH:
                self.after()
                time.sleep(0.3)


@row(
    "R2",
    "a signal to the whole process group, as Slurm, Ctrl-C and Kubernetes send it",
    "loader workers live on, the run saves",
    "no worker lost in 3 start methods x 3 signals",
    trials=9,
    fast=2,
)
def whole_group(trials: int, folder: Path) -> Outcome:
    """fork, spawn and forkserver; each stopped run then goes on to the end of one that was not."""
    outcome = Outcome()
    assert wait(launch(1, lambda rank: trained(folder / "straight", Reading(start(60), CONFIG)), folder / "log")) == [0]
    cases = [(m, n) for m in ("fork", "forkserver", "spawn") for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    for method, number in cases[:trials]:
        run = folder / f"{method}-{number.name}"

        def work(rank: int, method: str = method, number: signal.Signals = number, run: Path = run) -> None:
            multiprocessing.set_start_method(method)
            task = Reading(start(60), CONFIG)
            task.after = lambda: os.killpg(0, number)
            trained(run, task)

        codes = wait(launch(1, work, folder / "log"), 120)
        again = wait(launch(1, lambda rank, run=run: trained(run, Reading(start(60), CONFIG)), folder / "log"))
        good = (codes, again) == ([SAVED], [0]) and state(run) == state(folder / "straight")
        outcome.add(good, f"{method}, {number.name}: exit codes {codes}, then {again}")
    return outcome


@row("R3", "a save takes longer than the launcher usually waits", "the launcher waits", "a save of 40 s ends", fast=0)
def long_save(_: int, folder: Path) -> Outcome:
    """torchrun's agent with the patience that launch/ gives it."""
    outcome = Outcome()
    run = folder / "run"
    run.mkdir()

    class Patient(saving.Saver):
        def begin(self, *given: Any, **named: Any) -> None:
            time.sleep(40)
            super().begin(*given, **named)

    def work() -> None:
        from train import loop

        loop.Saver = Patient
        task = Slow(start(120), CONFIG)
        task.folder = run
        trained(run, task, steps=FOR_EVER, save_every=FOR_EVER)

    agent = torchrun(2, work, folder / "log", shutdown_seconds=300)
    until((run / "begun").exists)
    time.sleep(0.5)
    os.kill(agent, signal.SIGTERM)
    began = time.monotonic()
    wait([agent], 120)
    held = checkpoint.held(run / "checkpoints")
    outcome.add(held and checkpoint.verify(held[-1]), f"saved {held}")
    outcome.seen = f"ended after {time.monotonic() - began:.0f} s"
    return outcome


@row("R4", "torchrun was not told to pass on SIGUSR1", "the doctor says so, and how to", "said")
def not_passed_on(_: int, folder: Path) -> Outcome:
    """What the launcher tells its ranks, and none above them."""
    outcome, given = Outcome(), run.named("metaquery.tiny")()
    for passed, warned in (("SIGTERM,SIGINT,SIGHUP,SIGQUIT", True), ("SIGTERM,SIGINT,SIGUSR1", False), (None, False)):
        os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)
        if passed is not None:
            os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = passed
        said = doctor.signals(given, start(60)).said
        outcome.add(("--signals-to-handle" in said) == warned, f"{passed}: said {said!r}")
    return outcome


PHASES = ("batches", "step", "preview", "saving", "waiting for a save", "release")


@row(
    "R5",
    "a signal in any phase; and a second one",
    "the phase ends and is saved; the second ends at once and what is saved is whole",
    "one unit of work; nothing corrupted",
    trials=3,
    fast=1,
)
def any_phase(trials: int, folder: Path) -> Outcome:
    """Reading, stepping, previewing, saving and releasing, with one signal or two."""
    outcome = Outcome()

    class Signalled(Toy):
        phase, sent, twice, number = "", 0, False, signal.SIGTERM

        def send(self, phase: str) -> None:
            if phase == self.phase and self.sent == 0:
                self.sent = 1
                for _ in range(1 + self.twice):
                    os.kill(os.getpid(), self.number)

        def batches(self, samples):
            for batch in super().batches(samples):
                if batch[0] == 2 * BATCH:
                    self.send("batches")
                yield batch

        def step(self, batch):
            if batch[0] == 2 * BATCH:
                self.send("step")
            return super().step(batch)

        def preview(self, folder, step):
            self.send("preview")

        def release(self, folder):
            self.send("release")
            super().release(folder)

    class Saver(saving.Saver):
        def begin(self, *given: Any, **named: Any) -> None:
            task.send("saving")
            super().begin(*given, **named)

        def settle(self) -> str | None:
            task.send("waiting for a save")
            return super().settle()

    task: Any = None
    schedule: dict[str, Any] = {"preview_every": 2}

    def work(rank: int, run: Path, phase: str, twice: bool, number: signal.Signals) -> None:
        nonlocal task
        from train import loop

        loop.Saver = Saver
        task = Signalled(start(60), CONFIG)
        task.phase, task.twice, task.number = phase, twice, number
        trained(run, task, **schedule)

    straight = partial(work, run=folder / "straight", phase="", twice=False, number=signal.SIGTERM)
    assert wait(launch(1, straight, folder / "log")) == [0]
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[:trials]
    for number in numbers:
        for phase in PHASES:
            for twice in (False, True):
                run = folder / f"{phase}-{twice}-{number.name}"
                stopped = partial(work, run=run, phase=phase, twice=twice, number=number)
                codes = wait(launch(1, stopped, folder / "log"), 30)
                went_on = partial(work, run=run, phase="", twice=False, number=number)
                again = wait(launch(1, went_on, folder / "log"), 30)
                once = [0] if phase == "release" else [SAVED]  # then training has ended already
                ended = [1] if number == signal.SIGINT else [-number]  # Python's KeyboardInterrupt
                good = codes == (ended if twice else once) and again == [0] and state(run) == state(folder / "straight")
                outcome.add(good, f"{number.name} {'twice ' * twice}in {phase}: exit codes {codes}, then {again}")
    return outcome


@row(
    "R8",
    "one rank hangs, or dies",
    "it says where and exits 6, the others end too",
    "limit of 3 s + 5 s",
    trials=3,
    fast=1,
)
def hangs_or_dies(trials: int, folder: Path) -> Outcome:
    """In a step, in reading, in a save; by kill -9. On two ranks."""
    outcome, slowest = Outcome(), 0.0

    class Hanging(Toy):
        where = ""

        def hang(self, where: str, rank: int) -> None:
            if self.where == where and self.ranks.rank == rank:
                (folder / "hangs").touch()
                time.sleep(600)

        def batches(self, samples):
            for batch in super().batches(samples):
                if batch[0] >= 3 * BATCH:
                    self.hang("data", 1)
                yield batch

        def step(self, batch):
            if batch[0] >= 3 * BATCH:
                self.hang("step", 1)
                if self.where == "dies" and self.ranks.rank == 1:
                    (folder / "hangs").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().step(batch)

    patience = 3 if trials > 1 else 20  # one is of a busy moment
    watch = WatchConfig(data_seconds=patience, step_seconds=patience, save_seconds=patience)

    def work(rank: int, where: str, run: Path) -> None:
        ranks = start(60)
        task = Hanging(ranks, CONFIG)
        task.where = where
        fit(task, SCHEDULE, seed=0, folder=run, config={}, resume="auto", metrics=MetricsConfig(), ranks=ranks, watch=watch)

    for trial in range(trials):
        for where in ("data", "step", "dies"):
            (folder / "hangs").unlink(missing_ok=True)
            log = folder / f"{where}-{trial}.log"
            pids = launch(2, partial(work, where=where, run=folder / f"{where}-{trial}"), log)
            until((folder / "hangs").exists)
            began = time.monotonic()
            codes = wait(pids, 30 * patience)
            seconds = time.monotonic() - began
            slowest, said = max(slowest, seconds), log.read_text()
            right = codes == [codes[0], -signal.SIGKILL] if where == "dies" else codes[1] == HUNG and "rank 1 hangs" in said
            good = (
                right
                and 0 not in codes
                and seconds < (8 if trials > 1 else 120)
                and "step 4, samples 24 to 31" in said + "step 4, samples 24 to 31" * (where == "dies")
            )
            outcome.add(good, f"{where}: exit codes {codes} after {seconds:.1f} s")
    outcome.seen = f"all ranks ended within {slowest:.1f} s"
    return outcome


@row(
    "R9",
    "the system kills a loader worker (out of memory)",
    "one sentence with the samples, exit 2; the same command goes on",
    "ends in < 30 s",
    trials=5,
    fast=1,
)
def worker_killed(trials: int, folder: Path) -> Outcome:
    """kill -9 of a worker between two batches."""
    outcome, slowest = Outcome(), 0.0
    assert wait(launch(1, lambda rank: trained(folder / "straight", Reading(start(60), CONFIG)), folder / "log")) == [0]

    def kill() -> None:
        (worker,) = [child for child in multiprocessing.active_children() if child.pid]
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)

    def work(rank: int, run: Path) -> None:
        task = Reading(start(60), CONFIG)
        task.after = kill
        try:
            trained(run, task)
        except ValueError as error:
            print(error)
            raise SystemExit(2) from error

    for trial in range(trials):
        run, log = folder / str(trial), folder / f"{trial}.log"
        began = time.monotonic()
        codes = wait(launch(1, partial(work, run=run), log), 60)
        slowest = max(slowest, time.monotonic() - began)
        again = wait(launch(1, lambda rank, run=run: trained(run, Reading(start(60), CONFIG)), folder / "log"))
        said = "was ended from outside" in log.read_text()
        good = (codes, again) == ([2], [0]) and said and slowest < 30 and state(run) == state(folder / "straight")
        outcome.add(good, f"exit codes {codes}, then {again}; {log.read_text()[-300:]}")
    outcome.seen = f"ended within {slowest:.1f} s, start included"
    return outcome
