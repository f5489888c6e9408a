import pytest
import torch

from model.connector import Connector, ConnectorConfig, grown, rotate
from model.prefilled import Looked


@pytest.mark.parametrize(("width", "millions"), [(896, 315.8), (2048, 1621.0), (3584, 4946.7)])
def test_parameter_counts_are_the_published_ones(width, millions):
    with torch.device("meta"):
        connector = Connector(ConnectorConfig(layers=24), width, 2304)
    assert round(sum(p.numel() for p in connector.parameters()) / 1e6, 1) == millions


def test_it_looks_both_ways_and_knows_the_order():
    torch.manual_seed(0)
    connector = Connector(ConnectorConfig(layers=2), 64, 24)
    for parameter in connector.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    states = torch.randn(1, 5, 64)
    out = connector(states)
    changed = states.clone()
    changed[0, 4] += 1
    assert (connector(changed)[0, 0] - out[0, 0]).abs().max() > 1e-3
    assert (connector(states.flip(1)).flip(1) - out).abs().max() > 1e-3


def test_rows_do_not_meet():
    connector = Connector(ConnectorConfig(layers=2), 64, 24)
    states = torch.randn(3, 5, 64)
    torch.testing.assert_close(connector(states)[1:2], connector(states[1:2]))


@pytest.mark.parametrize("gain", [1.0, 5.5**0.5])
def test_the_output_has_the_rms_that_the_decoder_expects(gain):
    out = Connector(ConnectorConfig(layers=1), 64, 24, gain)(torch.randn(2, 5, 64))
    torch.testing.assert_close(out.square().mean(-1).sqrt(), torch.full((2, 5), gain), rtol=1e-2, atol=0)


def test_no_layers_leave_a_projection_of_each_query():
    connector = Connector(ConnectorConfig(layers=0), 64, 24)
    states = torch.randn(2, 5, 64)
    torch.testing.assert_close(connector(states)[:, 2:3], connector(states[:, 2:3]))


def test_checkpointed_gradients_are_the_same():
    states = torch.randn(2, 5, 64)
    gradients = []
    for activation_checkpointing in (False, True):
        torch.manual_seed(0)
        config = ConnectorConfig(layers=2, activation_checkpointing=activation_checkpointing)
        connector = Connector(config, 64, 24)
        connector(states).sin().sum().backward()
        gradients.append([p.grad for p in connector.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_rotation_shows_distances_only():
    """<rotate(q) at m, rotate(k) at n> depends on m - n."""
    q, k = torch.randn(2, 8, dtype=torch.float64)
    rows = rotate(q.expand(1, 1, 6, 8)) @ rotate(k.expand(1, 1, 6, 8)).transpose(-1, -2)
    for offset in range(-3, 4):
        diagonal = rows[0, 0].diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)


def test_heads_must_split_the_width():
    with pytest.raises(ValueError, match=r"connector\.heads 5"):
        Connector(ConnectorConfig(layers=1, heads=5), 64, 24)


def looking(layers: int = 2) -> Connector:
    torch.manual_seed(0)
    return Connector(ConnectorConfig(layers=layers, looks=True), 64, 24, seen_width=48)


def test_what_it_sees_counts_and_padding_does_not():
    connector, states = looking(), torch.randn(2, 5, 64)
    seen, ages = torch.randn(2, 6, 48), torch.tensor([[0, 0, -2, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    out = connector(states, Looked(seen, ages))
    trimmed = connector(states[:1], Looked(seen[:1, 2:], ages[:1, 2:]))
    torch.testing.assert_close(out[:1], trimmed)
    torch.testing.assert_close(out[1:], connector(states[1:], Looked(seen[1:, :0], ages[1:, :0])))
    torch.testing.assert_close(out[1:], connector(states[1:]))
    for other in (ages[:1, 2:] * 2, -ages[:1, 2:]):  # older, or words for pictures
        assert (out[:1] - connector(states[:1], Looked(seen[:1, 2:], other))).abs().max() > 1e-3


def test_a_connector_that_has_grown_says_what_it_said():
    """Further layers and eyes add nothing before they learn, and every tensor of the smaller one has to be there."""
    small, large = Connector(ConnectorConfig(layers=1), 64, 24), looking(3)
    states, looked = torch.randn(2, 5, 64), Looked(torch.randn(2, 4, 48), torch.ones(2, 4, dtype=torch.long))
    large.load_state_dict(grown(small.state_dict(), large))
    torch.testing.assert_close(large(states, looked), small(states))
    damaged = {name: tensor for name, tensor in small.state_dict().items() if name != "layers.0.qkv.weight"}
    assert "layers.0.qkv.weight" not in grown(damaged, large)
