"""The plan against published sizes, against a real step, and against what a real engine holds."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.metaquery import blueprint, build
from model.prefix import Prefix
from sample.measures import read_json
from tests import tiny
from train import plan, run
from train.config import Run
from train.cost import kept_bytes
from train.engine import EngineConfig
from train.metaquery import MetaQueryTaskConfig
from train.ranks import start

MILLION = 1e6
SIZES = {  # millions of parameters: MLLM, connector with Sana, as published
    "base": (893.7, 315.8),
    "large": (3754.6, 1621.0),
    "xlarge": (8292.2, 4946.7),
}


@pytest.mark.parametrize("name", [name for name in run.names() if "_sana" in name or "_sd" in name])
def test_every_recipe_builds_at_full_size_and_has_the_published_parameters(name):
    config = run.named(name)().task
    assert isinstance(config, MetaQueryTaskConfig)
    model = blueprint(plan.shaped(config.model))
    millions = {part: plan._size(module) / MILLION for part, module in plan.parts(model).items()}
    size, decoder = name.removeprefix("metaquery.").split("_")[:2]
    mllm, connector = SIZES[size]
    assert millions["mllm"] == pytest.approx(mllm, abs=0.1)
    if decoder == "sana":
        assert millions["connector"] == pytest.approx(connector, abs=0.1)
        assert millions["decoder"] == pytest.approx(1604.5, abs=0.1)
        assert model.image_size == 512
        assert plan._trained(model) == pytest.approx(sum(millions[p] for p in ("queries", "connector", "decoder")) * MILLION)
    else:
        assert millions["decoder"] == pytest.approx(859.5, abs=0.1)
        assert plan._trained(model.decoder) == 0
    assert all(parameter.is_meta for parameter in model.parameters())


def a_run(folder, **engine) -> Run:
    base = run.named("metaquery.tiny")()
    assert isinstance(base.task, MetaQueryTaskConfig)
    task = replace(base.task, model=tiny.metaquery_config(folder, trainable=("sit.blocks.*",)))
    data = replace(base.data, image_size=16)
    return replace(base, task=task, data=data, engine=EngineConfig(**engine))


@pytest.mark.parametrize("looks", [False, True])
def test_flop_are_those_of_a_real_step(tmp_path, looks):
    config = tiny.metaquery_config(tmp_path)
    config = replace(config, connector=replace(config.connector, looks=looks))
    model = build(config)
    flop = plan.flops(blueprint(config), prefix_tokens=20)
    ids = torch.ones(1, 20, dtype=torch.long)
    prefix = Prefix(ids, ids.bool(), torch.arange(20).expand(3, 1, -1), lengths=(20,))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the only one that is counted here
        pixels = torch.zeros(1, 3, 16, 16)
        model(prefix, torch.randn_like(model.vae.encode(pixels)), torch.rand(1)).sum().backward()
    assert sum(flop.values()) == pytest.approx(counter.get_total_flops())


def test_kept_bytes_are_those_of_a_real_forward(tmp_path):
    config = tiny.metaquery_config(tmp_path)
    model = build(config)
    states = torch.randn(1, 4, 32, requires_grad=True)
    kept = plan.activation_bytes(blueprint(config), prefix_tokens=20)
    assert kept["connector"] == pytest.approx(kept_bytes(lambda: model.connector(states)), rel=0.05)
    assert kept["prefix"] == 0


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "autocast")])
def test_bytes_are_those_that_an_engine_holds(tmp_path, zero, precision):
    config = a_run(tmp_path, zero=zero, precision=precision)
    assert isinstance(config.task, MetaQueryTaskConfig)
    told = plan.plan(config, world=1, prefix_tokens=20)
    task = config.task.build(config, start(60))
    shards = task.engine._shards
    states = [tensor for flat in shards.flats for tensor in shards.optimizer.state[flat].values() if tensor.ndim]
    held = sum(tensor.nbytes for tensor in states) + (sum(flat.nbytes for flat in shards.flats) if zero else 0)
    assert told["plan.rank.optimizer.bytes"].value == pytest.approx(held, rel=0.01)  # DeepSpeed pads its flats
    weights = sum(parameter.nbytes for parameter in task.model.parameters() if parameter.requires_grad)
    assert told["plan.rank.weights.bytes"].value == weights
    task.step(next(task.batches(0)))


def test_zero_shards_what_it_says(tmp_path):
    def bytes_at(zero: int, world: int) -> dict[str, float]:
        measures = plan.plan(a_run(tmp_path, zero=zero, precision="bf16"), world, prefix_tokens=20)
        return {kind: measures[f"plan.rank.{kind}.bytes"].value for kind in ("weights", "gradients", "optimizer")}

    alone, apart = bytes_at(1, 1), [bytes_at(zero, 4) for zero in (1, 2, 3)]
    assert [ours["optimizer"] * 4 for ours in apart] == [alone["optimizer"]] * 3
    assert [ours["gradients"] == alone["gradients"] for ours in apart] == [True, False, False]
    assert [ours["weights"] == alone["weights"] for ours in apart] == [True, True, False]


def test_the_plan_is_an_option_of_the_run(tmp_path, capsys):
    run.main(["metaquery.base_sd", "--plan", "--world", "4"])
    assert "base_sd on 4 rank(s), ZeRO 1" in capsys.readouterr().out
    path = tmp_path / "plan.json"
    run.main(["metaquery.world", "--plan", "--task.model.queries", "8", "--json", str(path)])
    measures = read_json(path)
    assert measures["plan.queries.parameters"].value == 8 * 192
    assert measures["plan.step.tokens"].value == 64 * 158
    with pytest.raises(ValueError, match="vae is no MetaQuery run that draws"):
        run.main(["world.vae", "--plan"])
    with pytest.raises(ValueError, match="give --world and --prefix-tokens of at least 1"):
        run.main(["metaquery.world", "--plan", "--world", "0"])
