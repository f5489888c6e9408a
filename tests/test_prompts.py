"""Joint training told captions: the bridge trains along, the MLLM never, and what comes out is a MetaQuery."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model import store
from sample.pipeline import Pipeline
from sample.settings import Drawing
from tests.test_repae import FP32, assert_alike
from tests.tiny_repae import BATCH, STEPS, advance, build, in_plain_torch, prompted_run, weights
from tests.toy import save
from tests.two_ranks import PROMPTED, results
from train import checkpoint
from train.ranks import start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


def test_steps_are_those_of_plain_optimizers_and_the_mllm_stays(folder):
    """Read once for two passes here, twice in plain torch; what trains of the bridge learns from the SiT's loss alone."""
    run = prompted_run(folder, FP32)
    expected, trained = in_plain_torch(run)
    task = build(run, start(60))
    before, mllm = weights(task), task.sit.teller.mllm
    frozen = mllm.fingerprint()
    seen = advance(task, run)
    for ours, theirs in zip(seen, expected, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)
    after = weights(task)
    assert_alike(after, trained)
    assert mllm.fingerprint() == frozen == task.frozen()["mllm"]
    assert mllm.prefills == STEPS
    assert not torch.equal(before["main.teller.queries.vectors"], after["main.teller.queries.vectors"])


def test_two_ranks_take_them_too(folder):
    out, first, second = results()
    assert first[PROMPTED]["digest"] == second[PROMPTED]["digest"]
    _, trained = in_plain_torch(prompted_run(folder, replace(FP32, zero=3)))
    assert_alike(torch.load(out / f"{PROMPTED}.pt"), trained)


def test_resumed_equals_straight_bit_for_bit(folder, tmp_path):
    run, ranks = prompted_run(folder, FP32), start(60)
    straight, stopped, resumed = (build(run, ranks) for _ in range(3))
    advance(straight, run)
    advance(stopped, run, 0, 2)
    path = save(stopped, tmp_path, 2)
    checkpoint.load(path, resumed.engines, ranks)
    advance(resumed, run, 2, STEPS)
    expected, found = weights(straight), weights(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_release_is_a_metaquery_that_says_the_same(folder, tmp_path):
    task = build(prompted_run(folder, FP32), start(60))
    advance(task, prompted_run(folder, FP32))
    task.preview(tmp_path, 3)
    task.release(tmp_path / "release")
    (tmp_path / "release").rename(tmp_path / "moved")
    model = store.load(tmp_path / "moved" / "bridge")
    batch = next(task.batches(0))
    latents, t = torch.randn(BATCH, 4, 8, 8), torch.linspace(0.1, 0.9, BATCH)
    with task.engines["main"].averaged() as averaged:
        expected = averaged((batch.prefix,), latents, t, torch.zeros_like(latents), False)
        x_t = task.sit.noising.mix(expected.latents, torch.zeros_like(latents), t)
    with torch.no_grad():
        torch.testing.assert_close(model(batch.prefix, x_t, t), expected.velocity)
    assert model.vae.statistics[0] == pytest.approx(task.sit.norm.statistics()[0])
    assert Pipeline(model)(["a red circle"], [0], Drawing(2))[0].size == (16, 16)
    assert all(parameter.requires_grad for parameter in task.sit.parameters())  # a release freezes copies
    again: Any = prompted_run(folder, FP32)
    told = replace(again.task.told, init=tmp_path / "moved" / "bridge")
    second = build(replace(again, task=replace(again.task, told=told, init=tmp_path / "moved" / "sit")), start(60))
    pairs: Any = ((second.sit.teller, model), (second.sit.sit, model.decoder.sit))
    for ours, theirs in pairs:
        held = theirs.state_dict()
        assert all(torch.equal(tensor, held[name]) for name, tensor in ours.state_dict().items())


def test_what_does_not_fit_is_refused(folder):
    run: Any = prompted_run(folder, FP32)
    told = run.task.told
    for changed, message in [
        (replace(run, data=replace(run.data, task="labelled")), "what task.told tells is in samples of t2i"),
        (
            replace(run, task=replace(run.task, told=replace(told, queries=65))),
            "task.told.queries makes 65 conditioning tokens and the SiT takes 64",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            build(changed, start(60))
    with pytest.raises(ValueError, match="would contradict the places"):
        replace(run.task, flip=True)
    with pytest.raises(ValueError, match=r"task.told.queries is 0; give 1 or more"):
        replace(told, queries=0)
