"""A checkpoint that several ranks wrote holds what one rank alone would have written, and any number of ranks reads it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.toy import Toy, advance, digest, save
from train import checkpoint
from train.checkpoint import Keep
from train.engine import KINDS, EngineConfig
from train.ranks import Ranks, start
from train.saving import collect_parts, owners, share_of, write_part

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
    checkpoint.empty(partial)
    for rank in range(world):
        ranks = Ranks(rank, world, torch.device("cpu"))
        write_part(partial, share_of(task.engines, ranks), ranks)
    sha256 = collect_parts(partial, world)
    checkpoint.publish(partial, root / "step-00000002", replace(manifest, sha256=sha256, world=world), Keep(1))
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
    checkpoint.empty(partial := tmp_path / ".step-00000002.partial")
    first, second = (Ranks(rank, 2, torch.device("cpu")) for rank in (0, 1))
    write_part(partial, share_of(task.engines, first), first)
    with pytest.raises(OSError, match=r"rank 1 has not written its part in 0.1 s"):
        collect_parts(partial, 2, limit_seconds=0.1)
    write_part(partial, share_of(task.engines, first), first)
    write_part(partial, [("folder/main.weights.safetensors", {"queries": torch.zeros(1)})], second)
    with pytest.raises(OSError, match=r"rank 1: .*No such file"):
        collect_parts(partial, 2)
