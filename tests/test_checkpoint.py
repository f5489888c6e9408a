"""A checkpoint is whole or absent: damage is found, a failed save costs nothing, and what does not fit is named."""

import shutil
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.toy import BATCH, EMA, Toy, accept, advance, digest, save
from train import checkpoint, saving
from train.checkpoint import Keep
from train.ema import decay
from train.engine import KINDS, Engine, EngineConfig
from train.optim import OptimConfig
from train.ranks import start

CONFIG = EngineConfig(zero=1, precision="fp32")
KEEP = Keep(2)


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
        save(task, tmp_path, step, KEEP)
    return tmp_path


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
    save(task, root, 3, KEEP)
    assert [path.name for path in sorted(root.iterdir())] == ["step-00000002", "step-00000003"]
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 for path in (root / "step-00000003").iterdir())


def test_those_of_every_so_many_steps_stay(task, tmp_path):
    for step in range(1, 8):
        save(task, tmp_path, step, Keep(2, every=3))
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


def poisoned(value: float) -> Toy:
    """A task that has such a number in its averages."""
    toy = Toy(start(60), CONFIG)
    state = {kind: dict(toy.engine.tensors(kind)) for kind in KINDS}
    state["average"]["head.0.bias"][3] = value
    toy.engine.load(lambda kind, key: state[kind][key], toy.engine.counters())
    return toy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_neither_written_nor_read(value, task, root):
    with pytest.raises(OSError, match=r"main.average.safetensors: head.0.bias is not finite"):
        save(poisoned(value), root, 3, KEEP)
    assert [path.name for path in sorted(root.iterdir())] == ["step-00000001", "step-00000002"]
    newest = root / "step-00000002"
    tensors = load_file(newest / "main.average.safetensors")
    tensors["head.0.bias"][3] = value
    save_file(tensors, newest / "main.average.safetensors")
    accept(newest / "main.average.safetensors")
    found, told = find(root)
    assert found == root / "step-00000001"
    assert "main.average.safetensors: head.0.bias is not finite; trying the one before it" in told[0]


def test_a_failed_save_costs_nothing(task, root, monkeypatch):
    """Fail at every point where the disk is asked for something, one after the other."""
    usual, calls, fail_at = saving.sync, 0, 1

    def sometimes(path):
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise OSError(28, "No space left on device", str(path))
        usual(path)

    for module in (saving, checkpoint):
        monkeypatch.setattr(module, "sync", sometimes)
    before = task.engine.steps
    while True:
        calls = 0
        try:
            save(task, root, 3, KEEP)
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


def test_other_data_is_refused_with_the_settings_that_changed(task, root):
    path = root / "step-00000002"
    manifest = replace(checkpoint.load(path, task.engines, start(60)), frozen={"data": "a"})
    with pytest.raises(ValueError, match=r"the data is not the one .* b here; changed since: seed: 0 -> 1\); restore it"):
        checkpoint.check_frozen(path, manifest, {"data": "b"}, {"seed": 1})


def test_images_are_counted_whatever_the_batches_were(task, root):
    fresh = Toy(start(60), CONFIG)
    counters = {**task.engine.counters(), "images": 12_345}
    held = {kind: dict(task.engine.tensors(kind)) for kind in KINDS}
    fresh.engine.load(lambda kind, name: held[kind][name], counters)
    advance(fresh, 2, 3)
    assert fresh.engine.counters()["images"] == 12_345 + BATCH
    keep = decay(EMA, 12_345 + BATCH, BATCH)
    for name, weight in fresh.engine.tensors("weights"):
        average = dict(fresh.engine.tensors("average"))[name]
        torch.testing.assert_close(average, keep * held["average"][name] + (1 - keep) * weight)


def test_differences_are_told_by_path():
    old, new = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [2]}
    assert checkpoint.differences(old, new) == ["a.c: 2 -> 3", "d: [1] -> [2]"]
