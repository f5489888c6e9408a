"""The loop on a real task: an interrupted run ends where a straight one does; bad steps are counted, then stop it."""

import itertools
import json
import os
import resource
import signal
import threading
from dataclasses import replace
from errno import ENOSPC
from typing import Any

import pytest

from tests.toy import BATCH, STEPS, Toy
from train import checkpoint, saving
from train.engine import KINDS, EngineConfig
from train.guard import Diverged, GuardConfig
from train.loop import Schedule, fit
from train.metrics import MetricsConfig
from train.ranks import start

CONFIG = EngineConfig(zero=1, precision="fp32", guard=GuardConfig(stop_after=3, rollbacks=0))
TWICE = replace(CONFIG, guard=GuardConfig(stop_after=2, rollbacks=2))
SCHEDULE = Schedule(steps=STEPS, batch_size=BATCH, log_every=1, save_every=2)


def train(folder, task: Toy | None = None, resume: str = "auto", **changes: Any) -> bool:
    ranks = start(60)
    schedule = Schedule(**{**SCHEDULE.__dict__, **changes})
    task = task or Toy(ranks, CONFIG)
    settings = {"schedule": {"steps": schedule.steps}, "resume": resume}
    return fit(task, schedule, seed=0, folder=folder, config=settings, resume=resume, metrics=MetricsConfig(), ranks=ranks)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder) -> list[list]:
    """What was logged of each step."""
    return [[line.get(key) for key in ("step", "loss", "grad_norm", "lr")] for line in lines(folder) if "event" not in line]


def state(folder, step: int = STEPS) -> tuple:
    """Everything a checkpoint holds but the config: hashes of all tensors, counters, positions."""
    manifest = checkpoint.verify(folder / "checkpoints" / f"step-{step:08d}")
    return manifest.sha256, manifest.counters, manifest.step, manifest.samples


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    assert train(folder)
    return folder


class Crash(Exception):
    """Stands for the power cut."""


class Crashing(Toy):
    """Dies in front of the batch that starts with this sample."""

    at = 5 * BATCH

    def step(self, batch):
        if batch[0] == self.at:
            raise Crash
        return super().step(batch)


def test_crash_and_resume_equals_straight(straight, tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, Crashing(start(60), CONFIG))
    assert checkpoint.verify(tmp_path / "checkpoints" / "step-00000004").samples == 4 * BATCH
    assert train(tmp_path)
    assert state(tmp_path) == state(straight)
    assert numbers(tmp_path) == numbers(straight)
    assert (tmp_path / "release" / "net.pt").read_bytes() == (straight / "release" / "net.pt").read_bytes()


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_undisturbed(straight, tmp_path):
    class Doubled(Toy):
        def step(self, batch):
            if batch[0] == 2 * BATCH:
                with pytest.raises(ValueError, match="another process"):
                    train(tmp_path)
            return super().step(batch)

    assert train(tmp_path, Doubled(start(60), CONFIG))
    assert state(tmp_path) == state(straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(number, straight, tmp_path, capsys):
    class Signalled(Toy):
        def step(self, batch):
            if batch[0] == 2 * BATCH:
                os.kill(os.getpid(), number)
            return super().step(batch)

    before = signal.getsignal(number)
    assert not train(tmp_path, Signalled(start(60), CONFIG), save_every=100)
    assert signal.getsignal(number) == before
    assert f"stopped, signal {number.name}" in capsys.readouterr().out
    assert not (tmp_path / "release").exists()
    assert train(tmp_path)
    assert state(tmp_path) == state(straight)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_second_signal_ends_at_once_and_what_was_saved_is_whole(straight, tmp_path, monkeypatch):
    """The first comes in step 3, the second while the save that it asked for writes its second file."""

    class Signalled(Toy):
        def step(self, batch):
            if batch[0] == 2 * BATCH:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step(batch)

    write, files = saving._write, itertools.count()

    def interrupted(*given):
        if (tmp_path / "checkpoints" / "step-00000002").exists() and next(files) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            raise SystemExit  # of this thread, as when the process ends
        return write(*given)

    monkeypatch.setattr(saving, "_write", interrupted)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, Signalled(start(60), CONFIG))
    finally:
        signal.signal(signal.SIGINT, usual)
    assert [path.name for path in checkpoint.held(tmp_path / "checkpoints")] == ["step-00000002"]
    assert (tmp_path / "checkpoints" / ".step-00000003.partial").exists()
    assert train(tmp_path)
    assert state(tmp_path) == state(straight)


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(straight, tmp_path):
    """What is trained from there on is the newest, whatever its number."""
    train(tmp_path, keep=3)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(saved) == 3
    assert train(tmp_path, resume=str(tmp_path / "checkpoints" / saved[0]), steps=STEPS - 1, save_every=1)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept[-1] == f"step-{STEPS - 1:08d}"
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "set-aside").iterdir()) == saved[1:]
    assert train(tmp_path)  # goes on from the new branch, and ends as the straight run did
    assert state(tmp_path) == state(straight)


def test_finished_run_only_writes_its_release(straight, tmp_path):
    train(tmp_path)
    saved = state(tmp_path)
    (tmp_path / "release" / "net.pt").unlink()
    assert train(tmp_path, resume="must")
    assert (tmp_path / "release" / "net.pt").exists()
    assert state(tmp_path) == saved


def test_changed_settings_are_told(tmp_path, capsys):
    train(tmp_path, steps=2)
    train(tmp_path, steps=4)
    assert "changed since the checkpoint: schedule.steps: 2 -> 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["schedule"]["steps"] == 4


def test_bad_steps_are_skipped_counted_and_logged(tmp_path):
    task = Toy(start(60), CONFIG, poison=frozenset({BATCH, 2 * BATCH}))
    assert train(tmp_path, task)
    events = [line for line in lines(tmp_path) if line.get("event") == "refused"]
    assert [(event["step"], event["samples"], event["reason"]) for event in events] == [
        (2, f"{BATCH}-{2 * BATCH - 1}", "loss is nan"),
        (3, f"{2 * BATCH}-{3 * BATCH - 1}", "loss is nan"),
    ]
    logged = {line["step"]: line for line in lines(tmp_path) if "lr" in line}
    assert [logged[step]["refused"] for step in range(1, STEPS + 1)] == [0, 1, 2, 2, 2, 2]
    assert "loss" not in logged[2]
    assert "loss" in logged[4]


def test_bad_steps_in_a_row_stop_the_run(tmp_path):
    task = Toy(start(60), CONFIG, poison=frozenset({1 * BATCH, 2 * BATCH, 3 * BATCH}))
    with pytest.raises(Diverged, match=r"3 steps in a row were refused up to step 4 \(loss is nan\)"):
        train(tmp_path, task)
    assert state(tmp_path, step=2)[2] == 2  # saved before it went wrong
    assert task.engine.steps == 4


class Watched(Toy):
    """Remembers the batches that it was given."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.seen: list[int] = []

    def step(self, batch):
        self.seen.append(batch[0] // BATCH)
        return super().step(batch)


def finite(task: Toy) -> bool:
    return all(tensor.isfinite().all() for kind in KINDS for _, tensor in task.engine.tensors(kind))


def batches_of(*numbers: int) -> frozenset[int]:
    """The first sample of each batch."""
    return frozenset(number * BATCH for number in numbers)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_run_that_diverges_goes_on_from_its_checkpoint_past_the_window(zero, tmp_path):
    """As one does that has the checkpoint from the beginning and never meets the window."""
    config = replace(TWICE, zero=zero)
    task = Watched(start(60), config, poison=batches_of(2, 3))
    assert train(tmp_path / "one", task)
    assert task.seen == [0, 1, 2, 3, 4, 5, 6, 7]
    assert finite(task)
    assert task.engine.steps == STEPS
    found = lines(tmp_path / "one")
    [event] = [line for line in found if line.get("event") == "rolled back"]
    assert (event["step"], event["from_step"], event["skipped"]) == (2, 4, f"{2 * BATCH}-{4 * BATCH - 1}")
    assert "2 steps in a row were refused up to step 4 (loss is nan)" in event["reason"]
    assert [row[0] for row in numbers(tmp_path / "one")] == list(range(1, STEPS + 1))
    end = checkpoint.manifest_of(tmp_path / "one" / "checkpoints" / f"step-{STEPS:08d}")
    assert (end.samples, end.skipped) == (8 * BATCH, [(2 * BATCH, 4 * BATCH - 1)])

    train(tmp_path / "two", Toy(start(60), config), steps=2)
    path = tmp_path / "two" / "checkpoints" / "step-00000002"
    checkpoint.rewrite(path, replace(checkpoint.manifest_of(path), samples=4 * BATCH))
    assert train(tmp_path / "two", Toy(start(60), config))
    assert numbers(tmp_path / "two")[2:] == numbers(tmp_path / "one")[2:]
    assert state(tmp_path / "two")[0] == state(tmp_path / "one")[0]


def test_a_spike_that_stays_is_left_behind_too(tmp_path):
    config = replace(TWICE, guard=replace(TWICE.guard, settle_steps=1))
    task = Watched(start(60), config, spike=batches_of(2, 3))
    assert train(tmp_path, task)
    assert task.seen == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [line["skipped"] for line in lines(tmp_path) if line.get("event") == "rolled back"] == ["16-31"]


def test_what_is_poisoned_for_ever_ends_the_run_after_its_rollbacks(tmp_path):
    task = Watched(start(60), TWICE, poison=batches_of(*range(2, 100)))
    with pytest.raises(Diverged, match=r"refused up to step 4 \(loss is nan\), after 2 rollbacks; lower optim.lr"):
        train(tmp_path, task)
    assert task.seen == [0, 1, 2, 3, 4, 5, 6, 7]  # three windows of two
    again = Watched(start(60), TWICE, poison=batches_of(*range(2, 100)))
    with pytest.raises(Diverged):
        train(tmp_path, again)
    assert again.seen == [6, 7]  # how often it went back is remembered, and how far it came
    with pytest.raises(Diverged, match=r"refused up to step 2 \(loss is nan\); lower"):
        train(tmp_path / "other", Toy(start(60), TWICE, poison=batches_of(0, 1)), save_every=5)  # nothing to go back to


def test_a_crash_after_a_rollback_goes_on_as_without_it(tmp_path):
    poison = batches_of(2, 3)
    assert train(tmp_path / "whole", Toy(start(60), TWICE, poison=poison))
    with pytest.raises(Crash):
        train(tmp_path / "cut", Crashing(start(60), TWICE, poison=poison))
    assert checkpoint.held(tmp_path / "cut" / "checkpoints")[-1].name == "step-00000002"
    resumed = Watched(start(60), TWICE, poison=poison)
    assert train(tmp_path / "cut", resumed)
    assert resumed.seen == [4, 5, 6, 7]
    assert state(tmp_path / "cut") == state(tmp_path / "whole")
    assert [line for line in lines(tmp_path / "cut") if line.get("event") == "rolled back"]


class Measured(Toy):
    """Whose previews measure one thing: 0.3, 0.9 and so on at its steps."""

    at = (0.3, 0.9, 0.9, 0.5, float("nan"), 0.4)

    def measures(self):
        return {"score"}

    def preview(self, folder, step):
        return {"score": self.at[step - 1]}


@pytest.mark.parametrize(("best_is", "kept"), [("highest", "256"), ("lowest", "156")])
def test_the_best_is_kept_beside_the_last(best_is, kept, straight, tmp_path):
    """The earliest of equals; also by a run that was interrupted after it."""
    choice: dict[str, Any] = {"save_every": 1, "preview_every": 1, "keep_best": "score", "best_is": best_is}
    train(tmp_path, Measured(start(60), CONFIG), steps=4, **choice)
    assert train(tmp_path, Measured(start(60), CONFIG), **choice)
    assert "".join(path.name[-1] for path in checkpoint.held(tmp_path / "checkpoints")) == kept
    assert state(tmp_path) == state(straight)


def test_a_measure_that_never_comes_is_named(tmp_path):
    choice: dict[str, Any] = {"save_every": 1, "preview_every": 2}
    with pytest.raises(ValueError, match="keep_best is skore, and this run's previews measure score; name one of it"):
        train(tmp_path, Measured(start(60), CONFIG), keep_best="skore", **choice)
    with pytest.raises(ValueError, match="keep_best is score, and this run's previews measure nothing"):
        train(tmp_path, keep_best="score", **choice)
    with pytest.raises(ValueError, match=r"preview_every is 0; give a multiple of save_every \(2\)"):
        Schedule(save_every=2, keep_best="score")
    assert not list(tmp_path.iterdir())


class FullDisk(Toy):
    """No file can grow beyond 700 bytes from the second batch until before batch `room`."""

    room = 4

    def step(self, batch):
        number = batch[0] // BATCH
        if number in (1, self.room):
            for thread in threading.enumerate():
                if thread.name == "saver":
                    thread.join()
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (700 if number == 1 else resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
        return super().step(batch)


@pytest.fixture
def unlimited():
    """What a test forbids itself is allowed again after it."""
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_told_and_training_goes_on(background, straight, tmp_path, capsys):
    assert train(tmp_path, FullDisk(start(60), CONFIG), save_every=1, keep=6, save_in_background=background)
    assert state(tmp_path) == state(straight)
    assert [path.name[-1] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["1", "5", "6"]
    events = [(line["step"], line["event"]) for line in lines(tmp_path) if "event" in line]
    assert events == [(1, "saved"), *((step, "not saved") for step in (2, 3, 4)), (5, "saved"), (6, "saved")]
    assert numbers(tmp_path) == numbers(straight)
    said = capsys.readouterr().out
    assert said.count("not saved, reason rank 0: ") == 3
    assert "File too large" in said
    assert said.count("it goes on once there is room") == 1


class Unseen(Toy):
    """Whose previews find no room."""

    def preview(self, folder, step):
        raise OSError(ENOSPC, os.strerror(ENOSPC), str(folder))


def test_a_preview_that_finds_no_room_is_told_and_training_goes_on(straight, tmp_path, capsys):
    assert train(tmp_path, Unseen(start(60), CONFIG), preview_every=2)
    assert state(tmp_path) == state(straight)
    assert [line["step"] for line in lines(tmp_path) if line.get("event") == "no preview"] == [2, 4, 6]
    assert "previews: No space left on device" in capsys.readouterr().out


@pytest.mark.usefixtures("unlimited", "capsys")  # pytest's own capture of what is said is a file
def test_the_last_save_must_not_fail(straight, tmp_path):
    class Full(FullDisk):
        room = 100

    with pytest.raises(OSError, match=r"step 6 is not saved \(rank 0: .*File too large.*\); mend that"):
        train(tmp_path, Full(start(60), CONFIG), save_every=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not (tmp_path / "release").exists()
    assert [path.name[-1] for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert train(tmp_path)
    assert state(tmp_path) == state(straight)


@pytest.mark.parametrize("field", ["steps", "batch_size", "accumulation", "log_every", "save_every", "keep"])
def test_impossible_schedule_is_named(field):
    with pytest.raises(ValueError, match=f"schedule.{field}"):
        replace(SCHEDULE, **{field: 0})
