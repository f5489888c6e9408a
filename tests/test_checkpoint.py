"""A checkpoint is whole or absent: damage is found, a failed save costs nothing, and what does not fit is named."""

import shutil
import stat

import pytest
from torch import nn

from tests.toy import BATCH, Toy, advance, digest
from train import checkpoint
from train.engine import Engine, EngineConfig
from train.optim import OptimConfig
from train.ranks import start

CONFIG = EngineConfig(zero=1, precision="fp32")


@pytest.fixture(scope="module")
def task():
    """A task a few steps into its training."""
    toy = Toy(start(60), CONFIG)
    advance(toy, 0, 2)
    return toy


@pytest.fixture
def root(task, tmp_path):
    """Two checkpoints of it."""
    for step in (1, 2):
        save(task, tmp_path, step)
    return tmp_path


def save(task, root, step: int, keep: int = 2, every: int = 0):
    kept = checkpoint.Keep(keep, every)
    return checkpoint.save(root, step, step * BATCH, task.engines, {"seed": 0}, kept, start(60))


def find(root, resume="auto"):
    told: list[str] = []
    return checkpoint.find(root, resume, start(60), told.append), told


def test_everything_comes_back(task, root):
    fresh = Toy(start(60), CONFIG)
    assert digest(fresh.engine) != digest(task.engine)
    manifest = checkpoint.load(root / "step-00000002", fresh.engines, start(60))
    assert digest(fresh.engine) == digest(task.engine)
    assert (manifest.step, manifest.samples, manifest.config) == (2, 2 * BATCH, {"seed": 0})


def test_files_are_readable_by_others_and_old_ones_go(task, root):
    save(task, root, 3)
    assert [path.name for path in sorted(root.iterdir())] == ["step-00000002", "step-00000003"]
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 for path in (root / "step-00000003").iterdir())


def test_those_of_every_so_many_steps_stay(task, tmp_path):
    for step in range(1, 8):
        save(task, tmp_path, step, keep=2, every=3)
    assert [path.name[-1] for path in checkpoint.held(tmp_path)] == ["3", "6", "7"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no manifest"])
def test_damage_is_found_and_the_one_before_is_taken(root, damage):
    newest = root / "step-00000002"
    file = newest / ("manifest.json" if damage == "no manifest" else "main.exp_avg.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "flip":
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-10])
    else:
        file.unlink()
    found, told = find(root)
    assert found == root / "step-00000001"
    assert len(told) == 1
    assert str(newest) in told[0]
    with pytest.raises(ValueError, match="step-00000002"):
        find(root, str(newest))


def test_a_failed_save_costs_nothing(task, root, monkeypatch):
    """Fail at every point where the disk is asked for something, one after the other."""
    usual, calls, fail_at = checkpoint.sync, 0, 1

    def sometimes(path):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(28, "No space left on device", str(path))
        usual(path)

    monkeypatch.setattr(checkpoint, "sync", sometimes)
    before = task.engine.steps
    while True:
        calls = 0
        try:
            save(task, root, 3)
        except OSError:
            newest, told = find(root)
            assert newest is not None
            assert not told
            fail_at += 1
        else:
            break
    assert fail_at > 6  # five files, the manifest, the folder
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
    assert task.engine.steps == before


def test_resume_modes(root, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    assert find(empty) == (None, [])
    assert find(empty, "never") == (None, [])
    assert find(root, "must")[0] == root / "step-00000002"
    assert find(root, str(root / "step-00000001"))[0] == root / "step-00000001"
    with pytest.raises(ValueError, match="resume is must"):
        find(empty, "must")
    with pytest.raises(ValueError, match=r"resume is never, but .* holds step-00000002"):
        find(root, "never")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        find(root, str(empty))


def test_never_starts_over_in_silence(root):
    for path in root.iterdir():
        shutil.rmtree(path)
        path.mkdir()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is valid"):
        find(root)


def test_another_module_is_refused_by_name(task, root):
    ranks = start(60)
    engine = Engine(
        nn.Linear(3, 3), optim=OptimConfig(), config=CONFIG, ema=task.engine.ema, ranks=ranks, batch_size=BATCH,
        accumulation=1, total_steps=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"main\.bias is absent there and \(3,\) in this run"):
        checkpoint.load(root / "step-00000002", {"main": engine}, ranks)
    with pytest.raises(ValueError, match=r"trains \['main'\], this run trains \['other'\]"):
        checkpoint.load(root / "step-00000002", {"other": engine}, ranks)


def test_differences_are_told_by_path():
    old, new = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [2]}
    assert checkpoint.differences(old, new) == ["a.c: 2 -> 3", "d: [1] -> [2]"]
