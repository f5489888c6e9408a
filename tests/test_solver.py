"""Solvers against a gaussian whose best prediction and whose exact solution are known in closed form."""

import pytest
import torch
from torch import Tensor

from model.noise import Diffusion, DiffusionConfig, FlowConfig, FlowMatching, Noising
from sample.settings import SolverName
from sample.solver import SOLVERS, solve

MEAN, STD = 1.5, 0.4
NOISINGS = {
    "flow": FlowMatching(),
    "flow, shift 3": FlowMatching(FlowConfig(shift=3.0)),
    "epsilon": Diffusion(DiffusionConfig("epsilon")),
    "v": Diffusion(DiffusionConfig("v")),
}


class Gaussian:
    """The best prediction for data ~ N(MEAN, STD^2); remembers the times it was asked at."""

    def __init__(self, noising: Noising):
        self.noising, self.asked = noising, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert x.shape[0] == t.shape[0]
        assert t.dtype == torch.float32
        self.asked.append(t[0].item())
        alpha, sigma = (level.reshape(-1, 1, 1, 1) for level in self.noising.levels(t))
        pull = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return self.noising.target(MEAN + alpha * STD**2 * pull, sigma * pull, t)

    def exact(self, noise: Tensor) -> Tensor:
        """The probability flow keeps each point's quantile: the same number of deviations from the mean at every t."""
        alpha, sigma = self.noising.levels(torch.ones(1))
        return MEAN + STD * (noise - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


def noise(rows: int = 8) -> Tensor:
    return torch.randn(rows, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def error(noising: Noising, method: SolverName, steps: int) -> float:
    toy = Gaussian(noising)
    return (solve(toy, noise(), steps, noising, method) - toy.exact(noise())).abs().max().item()


@pytest.mark.parametrize("kind", NOISINGS)
@pytest.mark.parametrize(("method", "bound"), [("euler", 0.04), ("heun", 0.02), ("dpm++", 0.02), ("unipc", 0.02)])
def test_solvers_reach_the_exact_solution(kind, method, bound):
    assert error(NOISINGS[kind], method, 256) < bound


@pytest.mark.parametrize("kind", ["flow", "flow, shift 3"])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_twice_the_steps_shrink_the_error_by_the_order(kind, method, order):
    """Not for diffusion: there sigma falls like the root of t, so the last step stays first order for every solver."""
    coarse, fine = (error(NOISINGS[kind], method, steps) for steps in (64, 128))
    assert coarse / fine == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("kind", ["flow", "flow, shift 3"])
@pytest.mark.parametrize("method", ["dpm++", "unipc"])
def test_multistep_solvers_beat_euler_at_thirty_steps(kind, method):
    assert error(NOISINGS[kind], method, 30) < error(NOISINGS[kind], "euler", 30) / 4


@pytest.mark.parametrize("kind", NOISINGS)
def test_the_stochastic_solver_draws_the_gaussian(kind):
    """Mean, variance and the covariance of neighbours; 250 steps are the protocol of SiT and REPA-E. In diffusion sigma
    falls like the root of t, and the last of its steps is too long."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(1000, 4, 4, 4, generator=generator)
    drawn = solve(
        Gaussian(NOISINGS[kind]),
        start,
        250,
        NOISINGS[kind],
        "euler_maruyama",
        lambda: torch.randn(start.shape, generator=generator),
    )
    off = drawn - drawn.mean()
    assert drawn.mean().item() == pytest.approx(MEAN, rel=0.02)
    assert off.square().mean().item() == pytest.approx(STD**2, rel=0.02 if "flow" in kind else 0.04)
    assert (off[..., 1:] * off[..., :-1]).mean().item() == pytest.approx(0, abs=0.02 * STD**2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("method", SOLVERS)
def test_every_solver_asks_at_the_shared_times(method, shift):
    """From exactly 1, along the shifted grid that training's noise schedule defines, unrounded."""
    noising = FlowMatching(FlowConfig(shift=shift))
    toy = Gaussian(noising)
    solve(toy, noise(), 7, noising, method)
    u = torch.linspace(1, 0, 8)[:-1]
    assert sorted(set(toy.asked), reverse=True) == pytest.approx((shift * u / (1 + (shift - 1) * u)).tolist(), abs=1e-6)


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("kind", NOISINGS)
def test_one_step_is_the_predictions_data(kind, method):
    toy = Gaussian(NOISINGS[kind])
    data = NOISINGS[kind].to_data(noise(), toy(noise(), torch.ones(8)), torch.ones(8))
    assert torch.allclose(solve(toy, noise(), 1, NOISINGS[kind], method), data, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="steps: 0"):
        solve(Gaussian(NOISINGS["flow"]), noise(), 0, NOISINGS["flow"])
    with pytest.raises(ValueError, match="choose one of dpm\\+\\+"):
        solve(Gaussian(NOISINGS["flow"]), noise(), 1, NOISINGS["flow"], "ddim")  # pyright: ignore[reportArgumentType]
