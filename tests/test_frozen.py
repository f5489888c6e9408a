"""Frozen is frozen: training changes what the config names, and not one bit of anything else."""

import pytest
import torch

from model.assets import fingerprint, tensors_of
from model.metaquery import MetaQuery
from model.prefix import Turn
from model.qwen import Qwen2_5_VL
from tests import tiny
from tests.two_ranks import tiny_run
from train import run
from train.metaquery import MetaQueryTask, MetaQueryTaskConfig
from train.ranks import start

SOME = ("sit.blocks.1.*", "sit.unembed.*")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.metaquery_config(folder)
    return folder


def trained(parts, folder, *overrides: str) -> tuple[MetaQueryTask, dict, dict]:
    """A task after its steps; what was measured before them and after them."""
    given = run.parse(tiny_run(parts, folder, "--schedule.steps", "3", *overrides))
    ranks = start(60)
    torch.manual_seed(0)
    assert isinstance(given.task, MetaQueryTaskConfig)
    task = given.task.build(given, ranks)
    before = measured(task.model)
    batches = task.batches(0)
    for _ in range(3):
        task.step(next(batches))
    return task, before, measured(task.model)


@torch.no_grad()
def measured(model: MetaQuery) -> dict:
    """Hashes of the frozen parts, chat logits, and a copy of what is registered."""
    turns = (Turn("user", "how many ?", (tiny.image(),)),)
    return {
        "mllm": model.mllm.fingerprint(),
        "vae": fingerprint(tensors_of(model.vae.autoencoder)),
        "logits": model.mllm.logits(model.mllm.builder([turns])),
        "state": {name: tensor.clone() for name, tensor in model.named_parameters()},
    }


def test_only_what_is_named_changes(parts, tmp_path):
    task, before, after = trained(parts, tmp_path, "--task.model.trainable", *SOME)
    names = set(before["state"])
    own = {name for name in names if name.startswith(("queries.", "connector."))}
    chosen = {name for name in names if name.startswith(("decoder.sit.blocks.1.", "decoder.sit.unembed."))}
    assert own
    assert chosen
    assert set(task.engine.shapes()) == own | chosen
    changed = {name for name in names if not torch.equal(before["state"][name], after["state"][name])}
    assert changed <= own | chosen
    assert "decoder.sit.unembed.weight" in changed
    assert before["mllm"] == after["mllm"]
    assert before["vae"] == after["vae"]
    assert torch.equal(before["logits"], after["logits"])


def test_whole_decoder_trains_and_the_mllm_does_not(parts, tmp_path):
    task, before, after = trained(parts, tmp_path)
    assert set(task.engine.shapes()) == set(before["state"])
    assert all(name.startswith(("queries.", "connector.", "decoder.")) for name in before["state"])
    assert not torch.equal(before["state"]["queries.vectors"], after["state"]["queries.vectors"])
    assert before["mllm"] == after["mllm"]
    assert torch.equal(before["logits"], after["logits"])
    assert isinstance(task.model.mllm, Qwen2_5_VL)
    assert all(p.grad is None and not p.requires_grad for p in task.model.mllm.model.parameters())


def test_frozen_queries_are_not_trained(parts, tmp_path):
    task, before, after = trained(parts, tmp_path, "--task.model.no-learned-queries")
    assert "queries.vectors" not in task.engine.shapes()
    assert torch.equal(before["state"]["queries.vectors"], after["state"]["queries.vectors"])


def test_pattern_that_matches_nothing_is_an_error(parts, tmp_path):
    with pytest.raises(ValueError, match=r"trainable 'sit\.block\.\*' matches no decoder parameter"):
        trained(parts, tmp_path, "--task.model.trainable", "sit.block.*")
