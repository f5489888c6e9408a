"""The benchmark counts what it says it counts."""

import pytest
import torch

from sample.measures import read_json
from train import benchmark, plan, run, stand_in
from train.benchmark import main
from train.cost import flop, kept_bytes

SMALL = [
    "metaquery",
    "--prefix-tokens",
    "24",
    "--small.queries",
    "4",
    "--batch-size",
    "1",
    "--small.width",
    "64",
    "--small.layers",
    "2",
    "--small.vocabulary",
    "1000",
    "--repeats",
    "1",
]


def test_the_prefix_keeps_no_activations(tmp_path):
    main([*SMALL, "--json", str(tmp_path / "speed.json")])
    measures = read_json(tmp_path / "speed.json")
    assert f"torch {torch.__version__}" in (tmp_path / "speed.machine.txt").read_text()
    assert measures["speed.reading.memory_saving"].value > 1.5  # 28 tokens through the model with a graph, or 4
    assert measures["speed.step_ratio"].value > 0
    assert measures["speed.memory_saving"].value > 1
    assert measures["speed.flop_ratio"].value > 1
    parts = [
        measures[f"speed.part.{part}"].value for part in ("vae", "prefix", "queries", "connector", "decoder", "optimizer")
    ]
    assert sum(parts) == pytest.approx(measures["speed.step"].value, rel=0.9)


def test_flop_are_those_of_the_token_passes():
    """Of the language model, a backward pass counted as one more: 2 x 28 tokens against 24 + 2 x 4."""
    args = benchmark.Metaquery(prefix_tokens=24, batch_size=1, small=stand_in.Small(queries=4, width=64))
    bench = benchmark.Bench(benchmark.build(args, "meta"), args, "meta")
    counted = {plain: flop(lambda plain=plain: bench.states(plain)) for plain in (False, True)}
    assert counted[True] / counted[False] == pytest.approx(2 * 28 / 32, rel=0.05)


def test_a_recipe_is_counted_at_its_full_size():
    """To the FLOP that the plan counts for a picture by part."""
    args = benchmark.Metaquery(config="metaquery.base_sana", prefix_tokens=30, batch_size=2)
    planned = plan.plan(run.named("metaquery.base_sana")(), world=8, prefix_tokens=30)
    assert benchmark.counts(args)[False] == pytest.approx(2 * planned["plan.picture.flop"].value, rel=1e-6)


def test_kept_bytes_are_those_autograd_keeps():
    x, weight = torch.randn(10, 100), torch.nn.Parameter(torch.randn(100, 3))
    assert kept_bytes(lambda: (x @ weight).sum()) == x.nbytes  # the weight is not an activation


def test_a_joint_step_is_timed_by_part_and_against_the_official_way(tmp_path):
    main(["repae", "--batch-size", "2", "--repeats", "1", "--json", str(tmp_path / "repae.json")])
    measures = read_json(tmp_path / "repae.json")
    assert measures["speed.step_ratio"].value > 0
    parts = ("encoder", "decoder", "sit", "sit_to_align", "discriminator", "perceptual", "target")
    assert all(measures[f"speed.part.{part}"].value > 0 for part in parts)
    with pytest.raises(ValueError, match="trains no VAE with a SiT"):
        main(["repae", "--config", "repae.world_repa"])


def test_prompts_are_read_faster_together(tmp_path):
    main(["reading", "--batch-size", "6", "--pictures", "2", "--repeats", "1", "--json", str(tmp_path / "reading.json")])
    measures = read_json(tmp_path / "reading.json")
    assert measures["reading.tokens"].value < measures["reading.padded_tokens"].value
    assert measures["reading.head_tokens"].value > 8
    with pytest.raises(ValueError, match="no more pictures than prompts"):
        main(["reading", "--batch-size", "2", "--pictures", "3"])


def test_the_order_costs_no_more_for_more_samples(tmp_path):
    main(
        ["order", "--samples", "1000", "1000000000", "--places", "50", "--repeats", "2", "--json", str(tmp_path / "o.json")]
    )
    measures = read_json(tmp_path / "o.json")
    assert measures["order.1e9.memory"].value < 1.1 * measures["order.1e3.memory"].value < 4e6
    with pytest.raises(ValueError, match="at least 1"):
        main(["order", "--samples", "0"])


def test_saves_are_timed_in_both_ways(tmp_path):
    main(["saves", "--megabytes", "20", "--steps", "1", "--repeats", "1", "--json", str(tmp_path / "saves.json")])
    measures = read_json(tmp_path / "saves.json")
    assert measures["saves.size"].value == pytest.approx(20e6, rel=0.5)
    assert measures["saves.background.still"].value < measures["saves.background.whole"].value
    with pytest.raises(ValueError, match="at least 1"):
        main(["saves", "--megabytes", "0"])


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        main(["metaquery", "--repeats", "0"])
