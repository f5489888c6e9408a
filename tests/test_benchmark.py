"""The benchmark counts what it says it counts."""

import pytest
import torch

from sample.measures import read_json
from train.benchmark import main
from train.cost import kept_bytes

SMALL = [
    "metaquery",
    "--prefix-tokens",
    "24",
    "--queries",
    "4",
    "--batch-size",
    "1",
    "--width",
    "64",
    "--layers",
    "2",
    "--vocabulary",
    "1000",
    "--repeats",
    "1",
]


def test_the_prefix_keeps_no_activations(tmp_path):
    main([*SMALL, "--json", str(tmp_path / "speed.json")])
    measures = read_json(tmp_path / "speed.json")
    assert measures["speed.memory_saving"].value > 1.5  # 28 tokens through the model with a graph, or 4
    assert measures["speed.step_ratio"].value > 0
    # token passes, a backward one counted as one more: 2 x 28 against 24 + 2 x 4; the connector's are in both
    assert measures["speed.flop_ratio"].value == pytest.approx(2 * 28 / 32, rel=0.25)


def test_kept_bytes_are_those_autograd_keeps():
    x, weight = torch.randn(10, 100), torch.nn.Parameter(torch.randn(100, 3))
    assert kept_bytes(lambda: (x @ weight).sum()) == x.nbytes  # the weight is not an activation


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        main(["metaquery", "--repeats", "0"])
