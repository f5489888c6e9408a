"""A joint step as End2End-Diffusion/REPA-E writes it, to time ours against: `train/benchmark_repae.py`.

Float32 weights under autocast, a perceptual loss in float32 that looks at real pictures anew, the other networks frozen for
one sum of the VAE's losses, real and false pictures through the discriminator one after the other (and gradients to the real
ones), the cosine of the alignment in a loop over samples, torch's attention and AdamW as they come, an average of the SiT in
a loop over its tensors, upsampling before convolutions, nothing compiled."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import LabelledBatch
from model.attention import fused
from model.noise import noise
from model.perceptual import FeaturesConfig, load_perceptual
from model.upsample import split_upsampling
from train.config import Run
from train.loss import gaussian_kl, squared_error
from train.ranks import Ranks
from train.repae import POSTERIOR, Networks, RepaeTaskConfig


class Official:
    """The official step over the networks of a joint run."""

    def __init__(self, config: RepaeTaskConfig, networks: Networks, run: Run, ranks: Ranks) -> None:
        self.config, self.networks, self.ranks, self.seed = config, networks, ranks, run.seed
        self.distance = networks.distance
        if isinstance(config.perceptual, FeaturesConfig):  # in float32, as LPIPS is either way
            slow = replace(config.perceptual, target=replace(config.perceptual.target, dtype="float32"))
            self.distance = load_perceptual(slow, networks.targets).to(ranks.device)
        self.modules = {name: module.to(ranks.device) for name, module in networks.modules.items()}
        split_upsampling(self.modules["vae"])
        self.average = copy.deepcopy(self.modules["main"])
        optims = {"vae": self.config.vae_optim, "discriminator": self.config.discriminator_optim}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, module in self.modules.items():
            optim = optims.get(name) or run.optim
            self.optimizers[name] = torch.optim.AdamW(module.parameters(), optim.lr, optim.betas)

    def step(self, batch: LabelledBatch) -> None:
        """VAE, discriminator, SiT, each clipped and stepped by itself; the average follows."""
        with fused():
            self._step(batch)
        for kept, new in zip(self.average.parameters(), self.modules["main"].parameters(), strict=True):
            kept.data.mul_(0.9999).add_(new.data, alpha=0.0001)

    def _step(self, batch: LabelledBatch) -> None:
        networks, weights, device = self.networks, self.config.losses, self.ranks.device
        judge, vae = self.modules.get("discriminator"), self.modules["vae"]
        sit: Any = self.modules["main"]
        shape = networks.coder.latent_shape(batch.levels)
        told: Any = self.config.told
        told = tuple(part.to(device) for part in told(batch, self.seed, len(batch.index)))
        t, eps = (part.to(device) for part in (sit.noising.times(batch.index, 0), noise(batch.index, 0, shape)))
        posterior, pixels = noise(batch.index, POSTERIOR, shape).to(device), batch.pixels.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                grid = sit.sit.grid(eps)
                seen = [target(pixels, grid) for target in networks.targets]
            latents, mean, logvar, rebuilt = vae(pixels, posterior)
            self._freeze(True)
            guesses = sit(told, latents, t, eps, False, align_only=True).guesses
            off, kl = rebuilt.float() - pixels, gaussian_kl(mean, logvar).flatten(1).sum(1).mean()
            loss = weights.l1 * off.abs().mean() + weights.kl * kl + weights.align * _looped(guesses, seen)
            if self.distance is not None:
                loss = loss + weights.perceptual * self.distance(rebuilt.float(), pixels).mean()
            if judge is not None:
                loss = loss - weights.adversarial * judge(rebuilt).mean()
        self._update("vae", loss)
        self._freeze(False)
        with torch.autocast(device.type, torch.bfloat16):
            if judge is not None:
                real, false = judge(pixels.detach().requires_grad_(True)), judge(rebuilt.detach())
                self._update("discriminator", 0.5 * (F.relu(1 - real).mean() + F.relu(1 + false).mean()))
            predicted = sit(told, latents.detach(), t, eps, True)
            target = sit.noising.target(predicted.latents, eps, t)
            loss = squared_error(predicted.velocity, target).mean() + self.config.align * _looped(predicted.guesses, seen)
        self._update("main", loss)

    def _freeze(self, frozen: bool) -> None:
        for name in ("main", "discriminator"):
            if name in self.modules:
                self.modules[name].requires_grad_(not frozen)

    def _update(self, name: str, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules[name].parameters(), 1.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()


def _looped(guesses: Any, seen: list[Tensor]) -> Tensor:
    """The cosine of each picture's tokens, one picture after the other."""
    total = torch.zeros(())
    for guess, target in zip(guesses, seen, strict=True):
        for a, b in zip(guess, target, strict=True):
            a, b = F.normalize(a.float(), dim=-1), F.normalize(b, dim=-1)
            total = total.to(a) - (a * b).sum(-1).mean() / len(guess)
    return total / max(1, len(seen))
