from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model import mllm
from model.decoder import SiTDecoderConfig, save_sit
from model.metaquery import build
from model.sit import SiT
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("metaquery")


@pytest.fixture(scope="module")
def config(folder):
    return tiny.metaquery_config(folder)


@pytest.fixture(scope="module")
def frozen(config):
    return mllm.load(config.mllm)


def awake(config, frozen):
    torch.manual_seed(0)
    model = build(config, mllm=frozen)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.abs().sum() == 0:
                parameter.normal_(std=0.1)
    return model


def step(model, prefix, optimizer):
    index = torch.arange(prefix.batch_size)
    x0 = torch.randn(prefix.batch_size, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t, eps = model.noising.times(index, seed=0), torch.randn_like(x0)
    prediction = model(prefix, model.noising.mix(x0, eps, t), t)
    loss = F.mse_loss(prediction, model.noising.target(x0, eps, t))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def gradient(parameter):
    assert parameter.grad is not None
    return parameter.grad.clone()


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_cached_path_gives_the_losses_and_gradients_of_the_full_graph(config, frozen):
    model = awake(config, frozen)
    queries, prefix = model.queries, frozen.builder(tiny.conversations())
    assert queries is not None
    x_t, t = torch.randn(3, *model.latent_shape), torch.rand(3)
    results = []
    for read in (frozen.read, frozen.read_full):
        model.zero_grad()
        prediction = model.decoder(x_t, t, model.connector(read(prefix, queries())))
        loss = prediction.square().mean()
        loss.backward()
        results.append((loss, prediction, [gradient(p) for p in model.parameters()]))
    (loss, prediction, gradients), (full_loss, full_prediction, full_gradients) = results
    torch.testing.assert_close(loss, full_loss, rtol=1e-5, atol=0)
    for ours, full in zip([prediction, *gradients], [full_prediction, *full_gradients], strict=True):
        assert (ours - full).abs().max() <= 1e-5 * full.abs().max()
    assert torch.equal(model(prefix, x_t, t), results[0][1])


def test_frozen_stays_frozen_while_the_rest_trains(config, frozen):
    model = awake(replace(config, trainable=("sit.blocks.1.*", "sit.embed_condition.*")), frozen)
    prefix = frozen.builder(tiny.conversations())
    fingerprint, logits = frozen.fingerprint(), frozen.logits(prefix)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    losses = [step(model, prefix, optimizer) for _ in range(5)]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert losses[-1] < losses[0]
    assert changed == trained(model)
    assert {name.split(".")[0] for name in changed} == {"queries", "connector", "decoder"}
    assert all(n.startswith(("decoder.sit.blocks.1.", "decoder.sit.embed_condition.")) for n in changed if "decoder" in n)
    assert frozen.fingerprint() == fingerprint
    assert torch.equal(frozen.logits(prefix), logits)


def test_the_frozen_parts_are_not_registered(config, frozen):
    model = build(config, mllm=frozen)
    parts = dict(model.named_children())
    assert parts.keys() == {"queries", "connector", "decoder"}
    assert [tuple(parameter.shape) for parameter in parts["queries"].parameters()] == [(4, 32)]
    assert model.image_size == 16


def test_batch_and_padding_change_nothing(config, frozen):
    model = awake(config, frozen)
    x_t, t = torch.randn(3, *model.latent_shape), torch.rand(3)
    together = model(frozen.builder(tiny.conversations()), x_t, t)
    for row, turns in enumerate(tiny.conversations()):
        alone = model(frozen.builder([turns]), x_t[row : row + 1], t[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


def test_one_prefill_conditions_many_images(config, frozen):
    model = awake(config, frozen)
    prefix = frozen.builder(tiny.conversations())
    count = frozen.prefills
    known = frozen.prefill(prefix)
    condition = model.condition(known.select([0, 0, 2]))
    assert frozen.prefills == count + 1
    torch.testing.assert_close(condition, model.condition(prefix)[[0, 0, 2]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["blocks.*", "sit.block.*", "connector.*"])
def test_a_pattern_that_matches_nothing_is_refused(config, frozen, pattern):
    with pytest.raises(ValueError, match="matches no decoder parameter"):
        build(replace(config, trainable=("sit.*", pattern)), mllm=frozen)


def test_without_patterns_the_decoder_is_frozen(config, frozen):
    model = build(replace(config, trainable=()), mllm=frozen)
    assert not any(parameter.requires_grad for parameter in model.decoder.parameters())
    assert all(parameter.requires_grad for parameter in model.connector.parameters())


def test_frozen_random_queries_do_not_train(config, frozen):
    assert "queries.vectors" not in trained(build(replace(config, learned_queries=False), mllm=frozen))


def test_prompt_states_can_stand_in_for_queries(config, frozen):
    model = awake(replace(config, read="prompt", queries=64), frozen)
    assert model.queries is None
    together = model.condition(frozen.builder(tiny.conversations()))
    assert together.shape == (3, 64, 24)
    alone = model.condition(frozen.builder(tiny.conversations()[:1]))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_parts_that_do_not_fit_are_refused(config, frozen):
    with pytest.raises(ValueError, match="channels"):
        build(replace(config, decoder=SiTDecoderConfig(sit=tiny.sit_config(latent_channels=8))), mllm=frozen)
    with pytest.raises(ValueError, match="queries is 100"):
        build(replace(config, queries=100), mllm=frozen)


def test_a_decoder_with_a_home_is_not_owned(config, frozen, folder):
    save_sit(folder / "decoder", SiT(tiny.sit_config()))
    home = replace(config, decoder=SiTDecoderConfig(path=str(folder / "decoder")), trainable=("sit.embed.*",))
    own = build(home, mllm=frozen).own_tensors()
    assert {name for name in own if name.startswith("decoder.")} == {
        "decoder.sit.embed.weight",
        "decoder.sit.embed.bias",
    }
    assert "queries.vectors" in own
