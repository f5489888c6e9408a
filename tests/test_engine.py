"""Every ZeRO stage on two ranks does what plain torch does on one, resumes bit for bit, and refuses bad steps together."""

import copy
import json
import shutil

import pytest
import torch

from model.connector import Connector, ConnectorConfig
from model.files import read_tensors
from tests.toy import BATCH, CLIP_NORM, STEPS, Toy, advance, digest, plain_torch
from tests.two_ranks import CASES, SAVED_AT, ZERO_STAGES, losses, results, tiny_run
from train import checkpoint, run
from train.compiled import compile_blocks
from train.engine import KINDS, EngineConfig, deepspeed_config
from train.ranks import start

NAMES = [f"{zero}-{precision}" for zero, precision in CASES]
FP32 = [name for name in NAMES if "fp32" in name]


@pytest.fixture(scope="module")
def plain():
    return plain_torch(SAVED_AT)


def test_plain_torch_is_clipped_here(plain):
    assert min(plain[1]) < CLIP_NORM < max(plain[1])


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradient_norms_equal_plain_torch(name, plain):
    seen = results()[1][name]
    tolerance = 1e-5 if name in FP32 else 5e-3
    assert seen["losses"] == pytest.approx(plain[0], rel=tolerance)
    assert seen["grad_norms"] == pytest.approx(plain[1], rel=tolerance * 5)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_equals_straight_bit_for_bit(name):
    seen = results()[1][name]
    assert seen["resumed"] == seen["straight"]


@pytest.mark.parametrize("name", FP32)
def test_checkpoint_moves_to_another_stage(name, plain):
    assert results()[1][name]["moved_losses"] == pytest.approx(plain[0][SAVED_AT:], rel=1e-5)


@pytest.mark.parametrize("name", FP32)
def test_checkpoint_moves_to_one_rank(name, plain):
    ranks = start(60)
    task = Toy(ranks, EngineConfig(zero=2, precision="fp32", clip_norm=CLIP_NORM))
    path = results()[0] / name / f"step-{SAVED_AT:08d}"
    manifest = checkpoint.load(path, task.engines, ranks)
    assert (manifest.step, manifest.samples, manifest.world) == (SAVED_AT, SAVED_AT * BATCH, 2)
    assert {f"main.weights.0000{rank}-of-00002.safetensors" for rank in (1, 2)} <= manifest.sha256.keys()
    steps = advance(task, SAVED_AT, STEPS)
    assert [step.loss for step in steps] == pytest.approx(plain[0][SAVED_AT:], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_averages_are_those_of_plain_torch(name, plain):
    _, first, second = results()
    assert first[name]["averages"] == second[name]["averages"]
    assert first[name]["answer"] == second[name]["answer"]
    for key, expected in plain[2].items():
        torch.testing.assert_close(
            torch.tensor(first[name]["averages"][key]), expected, atol=1e-5 if name in FP32 else 1e-2, rtol=0
        )


@pytest.mark.parametrize("name", NAMES)
def test_nan_on_one_rank_is_refused_by_both(name):
    _, first, second = results()
    for seen in (first[name], second[name]):
        assert seen["objection"] == "loss is nan"
        assert seen["refused"] == 1
        assert seen["unchanged"]
        assert seen["goes_on"]


def test_two_ranks_go_back_together_past_what_one_refuses(tmp_path):
    """To where one rank comes with the same batches."""
    out, first, second = results()
    root = out / "diverging" / "checkpoints"
    end = checkpoint.verify(root / f"step-{STEPS:08d}")
    assert first["diverging"]["digest"] == second["diverging"]["digest"]
    assert (end.world, end.samples, end.skipped) == (2, (STEPS + 2) * BATCH, [(2 * BATCH, 4 * BATCH - 1)])
    assert [path.name[-1] for path in sorted(root.iterdir())] == ["4", "6"]

    alone = Toy(start(60), EngineConfig(zero=1, precision="fp32"))
    advance(alone, 0, 2)
    advance(alone, 4, 8)
    moved = Toy(start(60), EngineConfig(zero=1, precision="fp32"))
    checkpoint.load(root / f"step-{STEPS:08d}", moved.engines, start(60))
    for kind in KINDS:
        for (name, ours), (_, theirs) in zip(moved.engine.tensors(kind), alone.engine.tensors(kind), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=f"{kind} of {name}")


def test_a_checkpoint_that_one_rank_does_not_see_is_refused_by_both():
    _, first, second = results()
    for seen in (first["diverging"], second["diverging"]):
        assert "elsewhere is not a checkpoint" in seen["problem"]
        assert seen["seconds"] < 60  # of the 300 that ranks wait for each other


def test_ranks_that_read_different_data_are_refused():
    out, first, second = results()
    for seen in (first["diverging"], second["diverging"]):
        assert "rank(s) 1 read other data than rank 0" in seen["unlike"]
    assert not (out / "unlike").exists()


def test_metaquery_on_two_ranks_has_the_losses_of_one(tmp_path):
    parts = results()[0]
    run.main(tiny_run(parts, tmp_path / "one"))
    expected = losses(tmp_path / "one")
    assert len(expected) == 6
    outs = [parts / f"tiny-{zero}" for zero in ZERO_STAGES]
    for zero in ZERO_STAGES:
        assert losses(parts / f"tiny-{zero}") == pytest.approx(expected, rel=1e-5), f"ZeRO {zero}"
    alone, *spread = (read_tensors(out / "release" / "model.safetensors") for out in [tmp_path / "one", *outs])
    for tensors in spread:
        torch.testing.assert_close(tensors, alone, atol=1e-5, rtol=1e-4)


def test_accumulation_changes_nothing_on_one_rank():
    ranks = start(60)
    config = EngineConfig(zero=1, precision="fp32", clip_norm=CLIP_NORM)
    whole, parts = Toy(ranks, config), Toy(ranks, config, accumulation=4)
    expected = [step.loss for step in advance(whole, 0, STEPS)]
    assert [step.loss for step in advance(parts, 0, STEPS)] == pytest.approx(expected, rel=1e-5)
    assert digest(whole.engine) != digest(parts.engine)  # rounding differs: the comparison above is not of one object


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("0")])
def test_an_offloaded_optimizer_takes_the_same_steps_and_resumes(name):
    seen = results()[1][name]
    assert seen["offloaded_losses"] == pytest.approx(seen["losses"], rel=1e-6 if name in FP32 else 1e-3)
    assert seen["offloaded_resumed"] == seen["offloaded"]


def test_spike_is_refused_once_the_loss_has_settled():
    ranks = start(60)
    config = EngineConfig(zero=1, precision="fp32")
    settled = EngineConfig(zero=1, precision="fp32", guard=type(config.guard)(settle_steps=2))
    early, late = (Toy(ranks, c, spike=frozenset({2 * BATCH})) for c in (config, settled))
    assert advance(early, 0, 3)[-1].objection is None
    objection = advance(late, 0, 3)[-1].objection
    assert objection is not None
    assert "over 20 times the usual" in objection


def test_trained_names_are_exactly_the_unfrozen():
    task = Toy(start(60), EngineConfig(zero=1, precision="fp32"))
    assert set(task.engine.shapes()) == {
        "queries", "norm.weight", "norm.bias", "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias",
    }  # fmt: skip


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="give a multiple of 6"):
        deepspeed_config(EngineConfig(), batch_size=8, accumulation=2, world=3)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization: stage is 3 there and 1 in the run"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 there and 1.0 in the run"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is not read"),
        ([], "is no JSON object"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "set engine.offload_optimizer as well"),
    ],
)
def test_contradicting_deepspeed_json_is_refused(tmp_path, theirs, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match=message):
        deepspeed_config(EngineConfig(deepspeed_json=path), batch_size=8, accumulation=1, world=1)


def test_agreeing_deepspeed_json_is_merged(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_clipping": "auto", "zero_optimization": {"stage": 1, "overlap_comm": False}}))
    merged = deepspeed_config(EngineConfig(deepspeed_json=path), batch_size=8, accumulation=1, world=1)
    assert merged["gradient_clipping"] == 1.0
    assert merged["zero_optimization"] == {"stage": 1, "overlap_comm": False}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, and there is none")
def test_compiled_blocks_train_alike():
    """The outermost stacks, each block once; state keeps its names. The engine takes the same steps with them."""
    torch.manual_seed(0)
    plain = Connector(ConnectorConfig(layers=2), 32, 16)
    compiled = copy.deepcopy(plain)
    x = torch.randn(2, 5, 32)
    plain(x).square().mean().backward()
    assert compile_blocks(compiled) == 2
    compiled(x).square().mean().backward()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_settings_that_cannot_be_had_together_are_refused():
    with pytest.raises(ValueError, match=r"engine.compile with engine.zero 3"):
        EngineConfig(zero=3, compile=True)
    with pytest.raises(ValueError, match=r"engine.offload_optimizer with engine.zero 0"):
        EngineConfig(zero=0, precision="fp32", offload_optimizer=True)


def test_zero_0_needs_fp32():
    with pytest.raises(ValueError, match=r"engine\.precision is bf16 with engine\.zero 0"):
        EngineConfig(zero=0, precision="bf16")
