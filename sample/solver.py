"""Noise -> data, by steps along the grid of times that training and sampling share (`Noising.grid`).

A solver sees a prediction as a function (x_t, t) and knows neither model nor guidance. Each works for flow matching and
for diffusion, because it steps in the (x0, eps) that a prediction stands for: the step from t to s of a frozen pair is
mix(x0, eps, s) - mix(x0, eps, t), which for flow matching is (s - t)(eps - x0), Euler's step of the velocity.

Shape letters: B batch, c h w latent channels, height, width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import torch

# pyright: reportPrivateImportUsage=false
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from model.noise import FlowMatching, Noising
from sample.guidance import Predict
from sample.settings import SolverName

Fresh = Callable[[], Tensor]
"""New gaussian noise [B, c, h, w], asked for once per step by a stochastic solver."""
Step = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(x_t [B, c, h, w], t [B], the next time s [B], whether that is the last, 0) -> x_s."""
After = Callable[[int, Tensor, Tensor], Tensor | None]
"""(step number from 0, its t [B], x [B, c, h, w] after it) -> the x to go on from; None ends the drawing at this x."""


class Solver(Protocol):
    """Makes what goes from one time to the next, for a drawing of `steps` steps."""

    def __call__(self, predict: Predict, noising: Noising, steps: int, fresh: Fresh) -> Step: ...


@torch.no_grad()
def solve(
    predict: Predict,
    noise: Tensor,
    steps: int,
    noising: Noising,
    method: SolverName = "dpm++",
    fresh: Fresh | None = None,
    after: After | None = None,
) -> Tensor:
    """Noise [B, c, h, w] -> data, float32. `fresh` feeds euler_maruyama; without it, torch's global generator does.

    Raises:
        ValueError: fewer than one step, or an unknown method.
    """
    if steps < 1:
        raise ValueError(f"steps: {steps} is too few; take at least one")
    if method not in SOLVERS:
        raise ValueError(f"solver: {method!r} is unknown; choose one of {', '.join(SOLVERS)}")
    step = SOLVERS[method](predict, noising, steps, fresh or (lambda: torch.randn_like(noise)))
    x = noise.float()
    grid = noising.grid(steps).to(noise.device)  # [steps + 1]
    for number, (t, s) in enumerate(pairwise(grid)):
        x = step(x, t.expand(len(x)), s.expand(len(x)), number == steps - 1)
        if after is not None:
            changed = after(number, t.expand(len(x)), x)
            if changed is None:
                break
            x = changed
    return x


def euler(predict: Predict, noising: Noising, steps: int, fresh: Fresh) -> Step:
    """First order; for diffusion this is DDIM (Song et al. 2021, eq. 12 with sigma = 0)."""
    return lambda x, t, s, last: noising.mix(*_pair(predict, x, t, noising), s)


def heun(predict: Predict, noising: Noising, steps: int, fresh: Fresh) -> Step:
    """Second order: the mean of the steps at both ends (Karras et al. 2022, alg. 1); Euler for the last step."""

    def step(x: Tensor, t: Tensor, s: Tensor, last: bool) -> Tensor:
        pair = _pair(predict, x, t, noising)
        ahead = noising.mix(*pair, s)  # x_s by Euler
        if last:
            return ahead
        later = _pair(predict, ahead, s, noising)
        return (ahead + x + noising.mix(*later, s) - noising.mix(*later, t)) / 2

    return step


def euler_maruyama(predict: Predict, noising: Noising, steps: int, fresh: Fresh) -> Step:
    """The reverse SDE with diffusion w = 2 sigma(t), whose drift adds eps (SiT, Ma et al. 2024); no noise at the end. The
    last step is one of the grid's; SiT's own, of which FIDs are published, is from 0.04."""

    def step(x: Tensor, t: Tensor, s: Tensor, last: bool) -> Tensor:
        data, eps = _pair(predict, x, t, noising)
        x = noising.mix(data, eps, s)
        if last:
            return x
        _, sigma = noising.levels(t)
        dt = (t - s)[0]  # > 0: how far towards the data
        return x - dt * eps + (2 * sigma[0] * dt).sqrt() * fresh().to(x)

    return step


def dpm_plus_plus(predict: Predict, noising: Noising, steps: int, fresh: Fresh) -> Step:
    """DPM-Solver++ (2M) of diffusers (Lu et al. 2022)."""
    return _multistep(DPMSolverMultistepScheduler, predict, noising, steps)


def unipc(predict: Predict, noising: Noising, steps: int, fresh: Fresh) -> Step:
    """UniPC of diffusers (Zhao et al. 2023), of order 2: each step corrects the one before it by what it has seen since."""
    return _multistep(UniPCMultistepScheduler, predict, noising, steps)


def _multistep(kind: Any, predict: Predict, noising: Noising, steps: int) -> Step:
    """A scheduler of diffusers on our grid: its own would start at 0.999 instead of 1 and hand out times cut to integers."""
    flow = isinstance(noising, FlowMatching)
    scheduler = kind(prediction_type="sample", use_flow_sigmas=flow)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    alpha, sigma = noising.levels(noising.grid(steps))
    scheduler.sigmas = sigma if flow else sigma / alpha

    def step(x: Tensor, t: Tensor, s: Tensor, last: bool) -> Tensor:
        data = noising.to_data(x, predict(x, t), t)
        return scheduler.step(data, 0, x, return_dict=False)[0]

    return step


SOLVERS: dict[SolverName, Solver] = {
    "dpm++": dpm_plus_plus,
    "unipc": unipc,
    "euler": euler,
    "heun": heun,
    "euler_maruyama": euler_maruyama,
}


def _pair(predict: Predict, x: Tensor, t: Tensor, noising: Noising) -> tuple[Tensor, Tensor]:
    """(x0, eps) that the prediction at (x_t, t) stands for, float32."""
    prediction = predict(x, t)
    return noising.to_data(x, prediction, t), noising.to_noise(x, prediction, t)
