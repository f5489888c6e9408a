"""Data -> noisy data and the target to predict, for flow matching and for diffusion.

Time runs from t = 0 (data) to t = 1 (noise) everywhere; x_t = alpha(t) x0 + sigma(t) eps, in float32. Noise and time
are addressed: functions of (seed, sample number), so batch, rank and resume change nothing. Letters: B batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

_TIME, _NOISE = 0, 1  # what an address is drawn for; keeps the two streams apart


@dataclass(frozen=True)
class FlowConfig:
    """Rectified flow: a straight line from data to noise, velocity predicted.

    `shift` > 1 moves times towards noise (Esser et al. 2024, eq. 23), in training and in sampling alike."""

    shift: float = 1.0
    time: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0  # of the logit, for logit_normal
    std: float = 1.0


@dataclass(frozen=True)
class DiffusionConfig:
    """DDPM with Stable Diffusion's scaled-linear betas; noise or v predicted."""

    prediction: Literal["epsilon", "v"] = "epsilon"
    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012


NoiseConfig = FlowConfig | DiffusionConfig


class Noising(Protocol):
    """What losses and solvers share. x0, eps, x_t, prediction: [B, ...] float32; t: [B] float32 in [0, 1]."""

    def times(self, index: Tensor, seed: int) -> Tensor:
        """Training times [B] for sample numbers `index` [B]."""
        ...

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t), sigma(t): the shares of data and noise in x_t, shaped like t."""
        ...

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps."""
        ...

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the decoder has to predict at (x_t, t)."""
        ...

    def to_data(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The x0 that the prediction stands for."""
        ...

    def to_noise(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The eps that the prediction stands for."""
        ...

    def grid(self, steps: int) -> Tensor:
        """Times of a sampler, [steps + 1], from 1 (noise) to 0 (data)."""
        ...


def build_noising(config: NoiseConfig) -> Noising:
    """The schedule that `config` describes."""
    return FlowMatching(config) if isinstance(config, FlowConfig) else Diffusion(config)


def noise(index: Tensor, seed: int, shape: Sequence[int]) -> Tensor:
    """Gaussian noise [B, *shape] float32 on CPU; row i depends on (seed, index[i]) alone."""
    rows = [_stream(seed, int(i), _NOISE).standard_normal(tuple(shape), dtype=np.float32) for i in index]
    return torch.from_numpy(np.stack(rows))


class FlowMatching:
    """x_t = (1 - t) x0 + t eps; the prediction is dx/dt = eps - x0 (Liu et al. 2022; Lipman et al. 2022)."""

    def __init__(self, config: FlowConfig = FlowConfig()):
        if config.shift <= 0:
            raise ValueError(f"noise.shift is {config.shift}; give a positive number (1 leaves times as they are)")
        self.config = config

    def times(self, index: Tensor, seed: int) -> Tensor:
        config = self.config
        if config.time == "uniform":
            t = _uniform(index, seed)
        else:
            logits = [_stream(seed, int(i), _TIME).standard_normal() for i in index]
            t = torch.sigmoid(config.mean + config.std * torch.tensor(logits, dtype=torch.float32))
        return self._shifted(t)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return _mix(self.levels(t), x0, eps)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps.float() - x0.float()

    def to_data(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        return x_t.float() - _like(t, x_t) * prediction.float()

    def to_noise(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        return x_t.float() + (1 - _like(t, x_t)) * prediction.float()

    def grid(self, steps: int) -> Tensor:
        return self._shifted(torch.linspace(1, 0, steps + 1))

    def _shifted(self, t: Tensor) -> Tensor:
        shift = self.config.shift
        return shift * t / (1 + (shift - 1) * t)


class Diffusion:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) eps (Ho et al. 2020, eq. 4).

    Predicted is eps, or v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022).
    DDPM step k of K is t = (k + 1) / K; abar(0) = 1, and between steps log abar is linear."""

    def __init__(self, config: DiffusionConfig = DiffusionConfig()):
        self.config = config
        root = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.train_steps)
        log_abar = np.concatenate([[0.0], np.log1p(-(root**2)).cumsum()])
        self._log_abar = torch.from_numpy(log_abar)  # [K + 1] float64, where it is asked for; entry 0 is data

    def times(self, index: Tensor, seed: int) -> Tensor:
        steps = self.config.train_steps
        return ((_uniform(index, seed) * steps).floor().clamp(max=steps - 1) + 1) / steps

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = (t.double() * self.config.train_steps).clamp(0, self.config.train_steps)
        low = place.floor().long().clamp(max=self.config.train_steps - 1)
        if self._log_abar.device != t.device:  # once, and not at each step of a drawing
            self._log_abar = self._log_abar.to(t.device)
        table = self._log_abar
        log_abar = torch.lerp(table[low], table[low + 1], place - low)
        return (0.5 * log_abar).exp().float(), (-torch.expm1(log_abar)).sqrt().float()

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return _mix(self.levels(t), x0, eps)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.config.prediction == "epsilon":
            return eps.float()
        alpha, sigma = (_like(level, x0) for level in self.levels(t))
        return alpha * eps.float() - sigma * x0.float()

    def to_data(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (_like(level, x_t) for level in self.levels(t))
        if self.config.prediction == "epsilon":
            return (x_t.float() - sigma * prediction.float()) / alpha
        return alpha * x_t.float() - sigma * prediction.float()

    def to_noise(self, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        if self.config.prediction == "epsilon":
            return prediction.float()
        alpha, sigma = (_like(level, x_t) for level in self.levels(t))
        return sigma * x_t.float() + alpha * prediction.float()

    def grid(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1)


def _stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    """Philox is counter-based: its key is the address, so nothing has to be drawn in order."""
    key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=purpose << 192))


def _uniform(index: Tensor, seed: int) -> Tensor:
    return torch.tensor([_stream(seed, int(i), _TIME).random(dtype=np.float32) for i in index])


def _mix(levels: tuple[Tensor, Tensor], x0: Tensor, eps: Tensor) -> Tensor:
    alpha, sigma = (_like(level, x0) for level in levels)
    return alpha * x0.float() + sigma * eps.float()


def _like(t: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] float32 on x's device, to multiply x with."""
    return t.to(device=x.device, dtype=torch.float32).reshape(-1, *[1] * (x.ndim - 1))
