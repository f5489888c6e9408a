from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]

from model.noise import Diffusion, DiffusionConfig, FlowConfig, FlowMatching, build_noising, noise

ALL = [
    FlowConfig(),
    FlowConfig(shift=3.0, time="logit_normal", mean=0.5, std=0.7),
    DiffusionConfig("epsilon"),
    DiffusionConfig("v"),
]


def pair():
    random = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 8, 8, generator=random), torch.randn(4, 3, 8, 8, generator=random)


@pytest.mark.parametrize("config", ALL)
def test_zero_is_data_and_one_is_noise(config):
    noising, (x0, eps) = build_noising(config), pair()
    assert torch.equal(noising.mix(x0, eps, torch.zeros(4)), x0)
    atol = 1e-6 if isinstance(config, FlowConfig) else 0.5  # Stable Diffusion's last step keeps 7 % of the data
    torch.testing.assert_close(noising.mix(x0, eps, torch.ones(4)), eps, atol=atol, rtol=0)


@pytest.mark.parametrize("config", ALL)
def test_the_target_leads_back_to_data_and_noise(config):
    noising, (x0, eps), t = build_noising(config), pair(), torch.tensor([0.05, 0.3, 0.7, 0.95])
    x_t, target = noising.mix(x0, eps, t), noising.target(x0, eps, t)
    torch.testing.assert_close(noising.to_data(x_t, target, t), x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(noising.to_noise(x_t, target, t), eps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_diffusion_is_that_of_diffusers(prediction):
    ours, (x0, eps) = Diffusion(DiffusionConfig(prediction)), pair()
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    steps: Any = torch.tensor([0, 10, 500, 999])
    t = (steps + 1) / 1000
    torch.testing.assert_close(ours.mix(x0, eps, t), theirs.add_noise(x0, eps, steps), atol=1e-5, rtol=1e-5)
    if prediction == "v":
        velocity = theirs.get_velocity(x0, eps, steps)
        torch.testing.assert_close(ours.target(x0, eps, t), velocity, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", ALL)
def test_times_and_noise_are_functions_of_the_address(config):
    noising, index = build_noising(config), torch.tensor([7, 123456789, 2, 7])
    t, eps = noising.times(index, seed=3), noise(index, 3, (2, 4, 4))
    assert t.dtype == eps.dtype == torch.float32
    for row in range(4):
        assert t[row] == noising.times(index[row : row + 1], seed=3)
        assert torch.equal(eps[row], noise(index[row : row + 1], 3, (2, 4, 4))[0])
    assert t[0] == t[3]
    assert torch.equal(eps[0], eps[3])
    assert t[0] != noising.times(index[:1], seed=4)
    assert not torch.equal(eps[0], noise(index[:1], 4, (2, 4, 4))[0])


def test_times_have_the_declared_distribution():
    index = torch.arange(5000)
    uniform = FlowMatching().times(index, seed=0).sort().values
    assert (uniform - torch.linspace(0, 1, 5000)).abs().max() < 0.03  # Kolmogorov-Smirnov, p = 1e-4
    logits = FlowMatching(FlowConfig(time="logit_normal", mean=0.5, std=0.7)).times(index, seed=0).logit()
    assert abs(float(logits.mean()) - 0.5) < 0.03
    assert abs(float(logits.std()) - 0.7) < 0.03
    steps = Diffusion().times(index, seed=0) * 1000
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.min() >= 1
    assert steps.max() <= 1000


def test_shift_moves_training_and_sampling_alike():
    plain, shifted = FlowMatching(), FlowMatching(FlowConfig(shift=3.0))
    index = torch.arange(100)
    t = plain.times(index, seed=0)
    torch.testing.assert_close(shifted.times(index, seed=0), 3 * t / (1 + 2 * t))
    grid = plain.grid(10)
    torch.testing.assert_close(shifted.grid(10), 3 * grid / (1 + 2 * grid))
    assert grid[0] == 1
    assert grid[-1] == 0
    assert len(grid) == 11


def test_noise_is_gaussian_and_apart_from_times():
    eps = noise(torch.arange(200), 0, (1000,))
    assert abs(float(eps.mean())) < 0.01
    assert abs(float(eps.std()) - 1) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([eps[:, 0], FlowMatching().times(torch.arange(200), 0)]))[0, 1])) < 0.25


def test_levels_keep_float32_where_bfloat16_would_not():
    t = torch.tensor([0.001, 0.5004])
    alpha, sigma = FlowMatching().levels(t)
    x_t = FlowMatching().mix(torch.ones(2, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16), t)
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t[:, 0], alpha)
    assert torch.equal(alpha + sigma, torch.ones(2))


def test_a_shift_must_be_positive():
    with pytest.raises(ValueError, match=r"noise\.shift is 0"):
        FlowMatching(FlowConfig(shift=0))
