"""What decays, the schedule at its corners, and a withheld step that changes nothing."""

import pytest
import torch
from torch import nn

from model.connector import Connector, ConnectorConfig
from model.queries import Queries
from model.sit import SiT
from tests import tiny
from train.optim import AdamW, OptimConfig, adamw, learning_rate, split


def names(module: nn.Module, chosen: list[nn.Parameter]) -> set[str]:
    ids = {id(p) for p in chosen}
    return {name for name, p in module.named_parameters() if id(p) in ids}


def test_only_weight_matrices_decay():
    module = nn.ModuleDict({"queries": Queries(4, 32), "connector": Connector(ConnectorConfig(layers=1), 32, 24)})
    module["sit"] = SiT(tiny.sit_config())
    decayed, free = (names(module, chosen) for chosen in split(module))
    assert decayed | free == {name for name, _ in module.named_parameters()}
    assert not decayed & free
    parameters = dict(module.named_parameters())
    assert all(parameters[name].ndim >= 2 and name.endswith(".weight") for name in decayed)
    assert "queries.vectors" in free
    assert all(name in free for name in parameters if name.endswith("bias") or "norm" in name)


def test_frozen_and_tied_parameters():
    module = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "frozen": nn.Linear(3, 3)})
    module["head"].weight = module["embed"].weight
    module["frozen"].requires_grad_(False)
    decayed, free = split(module)
    assert not decayed
    assert names(module, free) == {"embed.weight", "head.bias"}


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no parameter is trainable"):
        adamw(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


def test_schedule_at_its_corners():
    config = OptimConfig(lr=2.0, warmup_steps=4, floor=0.1)
    rates = [learning_rate(config, step, 104) for step in range(110)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert max(rates) == rates[4] == 2.0
    assert rates[54] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[104:] == pytest.approx([0.2] * 6)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(OptimConfig(lr=2.0, warmup_steps=0, decay="constant"), 50, 100) == 2.0


def test_withheld_step_changes_nothing():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    optimizer = adamw(layer, OptimConfig(lr=0.1))
    assert isinstance(optimizer, AdamW)
    before = [p.detach().clone() for p in layer.parameters()]
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.withhold = True
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, layer.parameters(), strict=True))
    optimizer.withhold = False
    optimizer.step()
    assert not torch.equal(before[0], layer.weight)


@pytest.mark.parametrize(("field", "value"), [("lr", 0.0), ("floor", 1.5), ("warmup_steps", -1)])
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"optim.{field}"):
        OptimConfig(**{field: value})
