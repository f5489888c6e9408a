"""Rows C1, C6, C12, C13 and C16: a save that is cut off, has no room or takes its time."""

import os
import random
import shutil
import signal
import stat
import time
from functools import partial
from pathlib import Path

from torch import nn

from tests.chaos.processes import die_at, fork, launch, until, wait
from tests.chaos.rows import Outcome, row
from tests.test_checkpoint import KEEP, find
from tests.test_loop import FullDisk, lines, train
from tests.toy import BATCH, Toy, advance, digest, save
from train import checkpoint
from train.ema import EmaConfig
from train.engine import Engine, EngineConfig
from train.optim import OptimConfig
from train.ranks import start
from train.saving import Saver

PLAIN = EngineConfig(zero=0, precision="fp32")  # without collectives, so that a fork of the process can save
SHARDED = EngineConfig(zero=1, precision="fp32")


def saved(folder: Path, steps: int = 2, config: EngineConfig = PLAIN) -> tuple[Toy, dict[str, str]]:
    """A task that saved after each of so many steps; the digest of everything by the name of the checkpoint."""
    task, digests = Toy(start(60), config), {}
    for step in range(1, steps + 1):
        advance(task, step - 1, step)
        digests[save(task, folder, step, KEEP).name] = digest(task.engine)
    return task, digests


def loads(path: Path | None, digests: dict[str, str]) -> bool:
    """Whether a checkpoint can be gone on from, and is that of its step to the last bit."""
    if path is None:
        return False
    fresh = Toy(start(60), PLAIN)
    checkpoint.load(path, fresh.engines, start(60))
    return digest(fresh.engine) == digests[path.name]


@row(
    "C1",
    "kill -9 at any moment of a save",
    "the checkpoint before it loads, and what is partial is cleaned up",
    "0 unloadable of >= 50 moments",
    trials=80,
    fast=6,
)
def killed_in_a_save(trials: int, folder: Path) -> Outcome:
    """Half of them before one request to the system after the other, half at random moments of two ranks that save."""
    outcome = Outcome()
    at_random = _killed_at_random(trials - trials // 2, folder)
    task, digests = saved(folder / "whole")
    shutil.rmtree(folder / "whole" / "step-00000002")
    root = folder / "run"

    def write(point: int) -> None:
        count = die_at(point, root)
        save(task, root, 2, KEEP)
        (folder / "count").write_text(str(count()))

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(folder / "whole", root)

    fresh()
    assert wait([fork(partial(write, -1), folder / "log")]) == [0]
    moments = int((folder / "count").read_text())
    tried = sorted(random.Random(0).sample(range(moments), min(moments, trials // 2)))
    for point in tried:
        fresh()
        (code,) = wait([fork(partial(write, point), folder / "log")])
        found, _ = find(root)
        whole = code == -signal.SIGKILL and loads(found, digests)
        save(task, root, 3, KEEP)
        left = [path.name for path in root.iterdir() if not path.name.startswith("step-")]
        outcome.add(whole and not left, f"killed at request {point} of {moments}: found {found}, left behind {left}")
    for root, codes in at_random:
        held = checkpoint.held(root)
        found, told = find(root)
        if found is not None:
            checkpoint.load(found, task.engines, start(60))
        outcome.add(found == held[-1], f"killed at random: of {held} found {found}; {told}; exit codes {codes}")
    outcome.seen = f"{len(tried)} of a save's {moments} requests to the system, {len(at_random)} random moments on 2 ranks"
    return outcome


def _killed_at_random(trials: int, folder: Path) -> list[tuple[Path, list[int]]]:
    """What is left of two ranks that do little but save when one of them is killed, and their exit codes."""
    draw, done = random.Random(1), []

    def work(rank: int, root: Path) -> None:
        task = Toy(start(60), SHARDED)
        for step in range(1, 10_000):
            advance(task, step - 1, step)
            save(task, root, step, KEEP)

    for trial in range(trials):
        root = folder / f"random-{trial}"
        pids = launch(2, partial(work, root=root), folder / "log")
        until(lambda root=root: checkpoint.held(root))
        time.sleep(draw.random() / 4)
        os.kill(draw.choice(pids), signal.SIGKILL)
        done.append((root, wait(pids, 20)))
    return done


@row(
    "C6",
    "the disk is full in a save",
    "said once a save; training goes on; the checkpoints before stay",
    "training goes on from save to save",
)
def disk_full(_: int, folder: Path) -> Outcome:
    """The system refuses larger files from the second save to the fourth, on one rank and on two."""
    outcome = Outcome()
    for world in (1, 2):
        for background in (True, False):
            run = folder / f"{world}-{background}"

            def work(rank: int, run: Path = run, background: bool = background) -> None:
                train(run, FullDisk(start(60), SHARDED), save_every=1, keep=6, save_in_background=background)

            codes = wait(launch(world, work, Path(os.devnull)), 60)  # what is said is under the same limit
            told = [line["step"] for line in lines(run) if line.get("event") == "not saved"]
            held = [path.name[-1] for path in checkpoint.held(run / "checkpoints")]
            good = codes == [0] * world and told == [2, 3, 4] and held == ["1", "5", "6"]
            outcome.add(good, f"{world} rank(s): exit codes {codes}, not saved {told}, held {held}")
    return outcome


@row(
    "C12",
    "kill -9 while old checkpoints go",
    "never fewer than two whole ones; the new one is whole before an old one goes",
    "0 lost",
    trials=24,
    fast=6,
)
def killed_in_pruning(trials: int, folder: Path) -> Outcome:
    """Before each of the last requests of a save that has an old checkpoint to remove."""
    outcome = Outcome()
    task, digests = saved(folder / "whole", steps=3)
    shutil.rmtree(folder / "whole")
    saved(folder / "whole")
    root = folder / "run"

    def write(point: int) -> None:
        count = die_at(point, root)
        save(task, root, 3, KEEP)
        (folder / "count").write_text(str(count()))

    shutil.copytree(folder / "whole", root)
    assert wait([fork(partial(write, -1), folder / "log")]) == [0]
    moments = int((folder / "count").read_text())
    for point in range(max(0, moments - trials), moments):
        shutil.rmtree(root)
        shutil.copytree(folder / "whole", root)
        (code,) = wait([fork(partial(write, point), folder / "log")])
        whole = [path for path in checkpoint.held(root) if _is_whole(path)]
        good = code == -signal.SIGKILL and len(whole) >= 2 and loads(find(root)[0], digests)
        outcome.add(
            good, f"killed at request {point} of {moments}: whole are {[path.name for path in whole]}, exit code {code}"
        )
    return outcome


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.verify(path)
    except ValueError:
        return False
    return True


@row("C13", "others must read what was saved", "permissions as the umask says", "0644 under umask 022")
def permissions(_: int, folder: Path) -> Outcome:
    """Each file under each usual umask."""
    outcome = Outcome()
    task = Toy(start(60), PLAIN)
    for umask in (0o022, 0o027, 0o002, 0o077):
        usual = os.umask(umask)
        path = save(task, folder / f"{umask:o}", 1, KEEP)
        os.umask(usual)
        for file in path.iterdir():
            mode = stat.S_IMODE(file.stat().st_mode)
            outcome.add(mode == 0o666 & ~umask, f"{file.name} has {mode:o} under umask {umask:o}")
    return outcome


@row(
    "C16",
    "a preemption leaves little time to save",
    "a save fits into it",
    "< 2 s for 100 MB",
    trials=3,
    fast=0,
)
def time_of_a_save(trials: int, folder: Path) -> Outcome:
    """6.25 million parameters: weights, two moments and averages in float32 are 100 MB. Fsynced and hashed."""
    outcome, speeds = Outcome(), []
    engine = Engine(
        nn.Sequential(*(nn.Linear(1250, 1250) for _ in range(4))), optim=OptimConfig(), config=PLAIN, ema=EmaConfig(),
        ranks=start(60), batch_size=BATCH, accumulation=1, total_steps=1,
    )  # fmt: skip
    saver = Saver(folder, {"main": engine}, {}, KEEP, start(60))
    for step in range(1, trials + 1):
        began = time.monotonic()
        saver.begin(step, 0)
        saver.finish()
        seconds = time.monotonic() - began
        size = sum(file.stat().st_size for file in checkpoint.path_of(folder, step).iterdir()) / 1e6
        speeds.append(size / seconds)
        outcome.add(seconds * 100 / size < 2, f"{size:.0f} MB took {seconds:.2f} s")
    outcome.seen = f"{min(speeds):,.0f} to {max(speeds):,.0f} MB/s"
    return outcome
