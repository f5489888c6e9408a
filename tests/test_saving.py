"""A checkpoint that several ranks wrote holds what one rank alone would have written, and any number of ranks reads it."""

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.toy import BATCH, Toy, advance, digest, save
from train import checkpoint, saving
from train.checkpoint import Keep
from train.engine import KINDS, EngineConfig
from train.ranks import Ranks, start
from train.saving import Saver, collect_parts, owners, share_of, write_part

CONFIG = EngineConfig(zero=1, precision="fp32")


@pytest.fixture(scope="module")
def task():
    """A task a few steps into its training."""
    toy = Toy(start(60), CONFIG)
    advance(toy, 0, 2)
    return toy


def written_by(world: int, task: Toy, root):
    """The checkpoint of step 2 as that many ranks write it, one after the other."""
    manifest = checkpoint.manifest_of(save(task, root, 2))
    partial = root / ".step-00000002.partial"
    checkpoint.make_partial(partial)
    for rank in range(world):
        ranks = Ranks(rank, world, torch.device("cpu"))
        write_part(partial, share_of(task.engines, ranks), ranks)
    sha256 = collect_parts(partial, world)
    checkpoint.publish(partial, root / "step-00000002", replace(manifest, sha256=sha256, world=world))
    return root / "step-00000002"


@pytest.mark.parametrize("world", [2, 3, 16])
def test_what_several_ranks_write_is_what_one_does(world, task, tmp_path):
    """Also with more ranks than there are parameters."""
    alone, together = save(task, tmp_path / "alone", 2), written_by(world, task, tmp_path / "together")
    checkpoint.verify(together)
    for kind in KINDS:
        files = sorted(together.glob(f"main.{kind}.*"))
        count = min(world, len(task.engine.shapes()))
        assert [file.name for file in files] == [
            f"main.{kind}.{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
        ]
        parts = [load_file(file) for file in files]
        merged = {name: tensor for part in parts for name, tensor in part.items()}
        whole = load_file(alone / f"main.{kind}.safetensors")
        assert sum(len(part) for part in parts) == len(whole)
        assert merged.keys() == whole.keys()
        assert all(torch.equal(merged[name], tensor) for name, tensor in whole.items())
    fresh = Toy(start(60), replace(CONFIG, zero=2))
    checkpoint.load(together, fresh.engines, start(60))
    assert digest(fresh.engine) == digest(task.engine)


def test_parameters_are_spread_evenly_and_the_same_way_each_time(task):
    owner = owners(task.engines, 2)
    assert owner == owners(task.engines, 2)
    sizes = {name: torch.Size(shape).numel() for name, shape in task.engine.shapes().items()}
    loads = [sum(sizes[key] for (_, key), of in owner.items() if of == rank) for rank in (0, 1)]
    assert sum(loads) == sum(sizes.values())
    assert max(loads) - min(loads) <= max(sizes.values()) / 2


def test_a_checkpoint_of_the_first_format_still_loads(task, tmp_path):
    path = save(task, tmp_path, 2)
    manifest = path / "manifest.json"
    old = json.loads(manifest.read_text()) | {"format": 1}
    manifest.write_text(json.dumps({key: value for key, value in old.items() if key in FIRST_FORMAT}))
    fresh = Toy(start(60), CONFIG)
    checkpoint.load(path, fresh.engines, start(60))
    assert digest(fresh.engine) == digest(task.engine)
    checkpoint.verify(path)
    manifest.write_text(json.dumps(old | {"format": 3}))
    with pytest.raises(ValueError, match="has checkpoint format 3; this program reads up to 2"):
        checkpoint.verify(path)


FIRST_FORMAT = ("format", "step", "samples", "world", "zero", "counters", "config", "sha256", "frozen")


def test_what_one_rank_cannot_write_fails_the_save(task, tmp_path):
    checkpoint.make_partial(partial := tmp_path / ".step-00000002.partial")
    first, second = (Ranks(rank, 2, torch.device("cpu")) for rank in (0, 1))
    write_part(partial, share_of(task.engines, first), first)
    with pytest.raises(OSError, match=r"rank 1 has not written its part in 0.1 s"):
        collect_parts(partial, 2, limit_seconds=0.1)
    write_part(partial, share_of(task.engines, first), first)
    write_part(partial, [("folder/main.weights.safetensors", {"queries": torch.zeros(1)})], second)
    with pytest.raises(OSError, match=r"rank 1: .*No such file"):
        collect_parts(partial, 2)


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_training_goes_on_beside_a_save_of_the_state_before(zero, tmp_path, monkeypatch):
    """The writer waits until training has changed everything; it still writes what one writes that holds training up."""
    config, ranks = replace(CONFIG, zero=zero), start(60)
    expected = Toy(ranks, config)
    advance(expected, 0, 2)
    held_up = checkpoint.verify(save(expected, tmp_path / "held-up", 2))
    task, write, trained = Toy(ranks, config), saving._write, threading.Event()
    advance(task, 0, 2)
    before = digest(task.engine)

    def late(*given):
        assert trained.wait(60)
        return write(*given)

    monkeypatch.setattr(saving, "_write", late)
    told = []
    saver = Saver(
        tmp_path, task.engines, {"seed": 0}, Keep(2), ranks, background=True, tell=lambda *what, **_: told.append(what)
    )
    saver.begin(2, 2 * BATCH)
    advance(task, 2, 4)
    assert digest(task.engine) != before
    assert not checkpoint.held(tmp_path)
    assert not told
    trained.set()
    saver.begin(4, 4 * BATCH)  # waits for the one before
    assert told == [(2, "saved")]
    saver.finish()
    assert told == [(2, "saved"), (4, "saved")]
    assert checkpoint.verify(tmp_path / "step-00000002") == held_up
    assert checkpoint.verify(tmp_path / "step-00000004").sha256 != held_up.sha256


def test_what_memory_does_not_hold_is_written_at_once_and_told_once(task, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "available_memory", lambda: 0.0)
    told = []
    saver = Saver(tmp_path, task.engines, {}, Keep(2), start(60), background=True, tell=lambda *what, **_: told.append(what))
    for step in (1, 2):
        saver.begin(step, step * BATCH)
        checkpoint.verify(tmp_path / f"step-0000000{step}")
    assert told == [(1, "saves hold training up"), (1, "saved"), (2, "saved")]


def test_an_error_in_training_does_not_cost_the_save(task, tmp_path):
    def crash():
        with Saver(tmp_path, task.engines, {}, Keep(1), start(60), background=True) as saver:
            saver.begin(2, 2 * BATCH)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    checkpoint.verify(tmp_path / "step-00000002")


def test_killed_anywhere_in_a_save_leaves_two_that_load(tmp_path):
    """At each of the times when a file or a folder is opened, made, renamed or removed; the last prunes the oldest."""
    task = Toy(start(60), replace(CONFIG, zero=0))  # whose state a forked process reads without the process group
    task.engines = {"main": task.engine, "other": task.engine}
    for step in (1, 2):
        save(task, tmp_path / "before", step, Keep(2))
    killed = 0
    while True:
        root = Path(shutil.copytree(tmp_path / "before", tmp_path / f"killed-{killed}"))
        if _ends(lambda root=root: save(task, root, 3, Keep(2)), after=killed) == 0:
            break
        killed += 1
        valid = [path for path in checkpoint.held(root) if _is_valid(path)]
        assert len(valid) >= 2, f"killed at {killed}: {sorted(root.iterdir())}"
        assert checkpoint.find(root, "must", start(60), warn=pytest.fail) == valid[-1]
        save(task, root, 4, Keep(2))
        assert len(list(root.iterdir())) == 2
    assert killed >= 50
    assert [path.name for path in checkpoint.held(root)] == ["step-00000002", "step-00000003"]


def _ends(work, after: int) -> int:
    """How a process ends that does `work` and is killed at its so-many-th touch of the disk: 0 when it had fewer."""
    process = os.fork()
    if process == 0:
        touches = 0

        def count(event, given):
            nonlocal touches
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir"):
                if touches == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                touches += 1

        sys.addaudithook(count)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _is_valid(path) -> bool:
    try:
        checkpoint.verify(path)
    except ValueError:
        return False
    return True
