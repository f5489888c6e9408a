"""How long a REPA-E step takes, by part, and against the official way to write it: `python -m train.benchmark repae`.

The official way is that of End2End-Diffusion/REPA-E: float32 weights under autocast, a perceptual loss in float32 that
looks at real pictures anew, the other networks frozen for one sum of the VAE's losses, real and false pictures through the
discriminator one after the other (and gradients to the real ones), the cosine of the alignment in a loop over samples,
torch's attention and AdamW as they come, an average of the SiT in a loop over its tensors, upsampling before convolutions,
nothing compiled. Ours is the engines' step as the run configures it; and that with half of each batch rebuilt, which is no
longer the same step. They take turns in one process, on the same batch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import LabelledBatch
from model.attention import fused
from model.noise import noise
from model.perceptual import FeaturesConfig
from model.upsample import split_upsampling
from sample.measures import Measure, show, spread
from train.loss import gaussian_kl, squared_error
from train.machine import record
from train.prompts import PromptsTold
from train.ranks import Ranks, start
from train.repae import POSTERIOR, RepaeTask, RepaeTaskConfig


@dataclass(frozen=True, kw_only=True)
class Repae:
    """Time a REPA-E step, whole and by part, against the official way of writing it."""

    config: str = "repae.world"
    """A joint run of configs/repae.py."""
    batch_size: int = 32
    compile: bool = False
    """Compile the repeated blocks, in our step alone."""
    repeats: int = 7
    """Timed steps of each way."""
    json: Path | None = None
    """Where to write the measures."""


def repae(args: Repae) -> None:
    """Measures, prints and writes.

    Raises:
        ValueError: a size is below 1, or the run trains no VAE, SiT and discriminator together.
    """
    from train.run import parse

    if min(args.batch_size, args.repeats) < 1:
        raise ValueError("give a batch size and repeats of at least 1")
    run = parse([args.config])
    config = run.task
    if not isinstance(config, RepaeTaskConfig) or config.sit is None or not config.train_vae:
        raise ValueError(f"config {args.config!r} trains no VAE with a SiT; give a joint run of configs/repae.py")
    if isinstance(config.told, PromptsTold):
        raise ValueError(f"config {args.config!r} is told captions, whose reading is timed by itself; give one told labels")
    run = replace(run, schedule=replace(run.schedule, batch_size=args.batch_size, accumulation=1))
    ranks = start(60)
    plain = replace(run, engine=replace(run.engine, zero=0, precision="fp32", compile=False))
    slow = config.perceptual
    if isinstance(slow, FeaturesConfig):  # LPIPS is in float32 either way
        slow = replace(slow, target=replace(slow.target, dtype="float32"))
    official = Official(replace(config, perceptual=slow).build(plain, ranks), ranks)
    ours = config.build(replace(run, engine=replace(run.engine, compile=args.compile or run.engine.compile)), ranks)
    half = replace(config, recon_fraction=0.5).build(replace(run, engine=ours.engines["main"].config), ranks)
    batch: LabelledBatch = next(ours.batches(0))
    ways: dict[str, Callable[[], Any]] = {
        "step": partial(ours.step, batch),
        "official_step": partial(official.step, batch),
        "half_step": partial(half.step, batch),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(args.repeats + 1):
        for way, step in ways.items():
            elapsed = timed(step, ranks)
            if repeat:  # the first of each warms up
                seconds[way].append(elapsed)
    measures = {f"speed.{way}": spread(elapsed, "s") for way, elapsed in seconds.items()}
    for name in ("step", "half_step"):
        ratios = [theirs / mine for mine, theirs in zip(seconds[name], seconds["official_step"], strict=True)]
        measures[f"speed.{name}_ratio"] = spread(ratios, "x")
    measures["speed.images"] = Measure(args.batch_size / measures["speed.step"].value, n=args.repeats, unit="1/s")
    for part, step in parts(ours, batch.pixels.to(ranks.device), ranks).items():
        measures[f"speed.part.{part}"] = spread([timed(step, ranks) for _ in range(args.repeats + 1)][1:], "s")
    show(f"{args.config} on {ranks.device}, {torch.get_num_threads()} thread(s), batches of {args.batch_size}", measures)
    if args.json is not None:
        record(args.json, measures)


def timed(step: Callable[[], Any], ranks: Ranks) -> float:
    """Seconds until the device has done it."""
    wait = torch.cuda.synchronize if ranks.device.type == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


def parts(task: RepaeTask, pixels: Tensor, ranks: Ranks) -> dict[str, Callable[[], Any]]:
    """Each network on its own: forward, and backward to weights or inputs as in the step."""
    coder: Any = copy.deepcopy(task.coder.autoencoder)
    dtype = coder.dtype
    size = (len(pixels), task.coder.latent_channels, *(side // task.coder.factor for side in pixels.shape[-2:]))
    latents = torch.zeros(size, device=ranks.device, requires_grad=True)
    told, t = task.config.told, torch.full((len(pixels),), 0.5, device=ranks.device)
    words, places = (part.to(ranks.device) for part in told(next(task.batches(0)), 0, len(pixels)))
    shown = pixels.clone().requires_grad_()
    half = torch.autocast(ranks.device.type, torch.bfloat16, enabled=task.engines["main"].config.precision != "fp32")

    def both(forward: Callable[[], Tensor]) -> None:
        with half:
            made = forward()
        made.float().mean().backward()

    made: dict[str, Callable[[], Any]] = {
        "encoder": lambda: both(lambda: coder.encode(pixels.to(dtype)).latent_dist.mode()),
        "decoder": lambda: both(lambda: coder.decode(latents.to(dtype)).sample),
        "sit": lambda: both(lambda: copied["main"]((words, places), latents, t, latents.detach(), True).velocity),
        "sit_to_align": lambda: both(
            lambda: copied["main"]((words, places), latents, t, latents.detach(), False, align_only=True).guesses[0]
        ),
    }
    copied = {name: copy.deepcopy(engine.module) for name, engine in task.engines.items() if name != "vae"}
    if "discriminator" in copied:
        made["discriminator"] = lambda: both(lambda: copied["discriminator"](torch.cat([shown, pixels])))
    if task.distance is not None:
        distance = task.distance
        made["perceptual"] = lambda: both(lambda: distance(shown, pixels))
    if task.targets:
        grid = task.sit.sit.grid(latents)
        made["target"] = lambda: [target(pixels, grid) for target in task.targets]
    return made


class Official:
    """The official step over the modules of a task."""

    def __init__(self, task: RepaeTask, ranks: Ranks) -> None:
        self.task, self.ranks, self.config = task, ranks, task.config
        self.modules: dict[str, nn.Module] = {name: engine.module for name, engine in task.engines.items()}
        split_upsampling(self.modules["vae"])
        self.average = copy.deepcopy(self.modules["main"])
        optims = {"vae": self.config.vae_optim, "discriminator": self.config.discriminator_optim}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, module in self.modules.items():
            optim = optims.get(name) or task.engines[name].optim
            self.optimizers[name] = torch.optim.AdamW(module.parameters(), optim.lr, optim.betas)

    def step(self, batch: Any) -> None:
        """VAE, discriminator, SiT, each clipped and stepped by itself; the average follows."""
        with fused():
            self._step(batch)
        for kept, new in zip(self.average.parameters(), self.modules["main"].parameters(), strict=True):
            kept.data.mul_(0.9999).add_(new.data, alpha=0.0001)

    def _step(self, batch: Any) -> None:
        task, weights, device = self.task, self.config.losses, self.ranks.device
        sit, vae, judge = (self.modules.get(name) for name in ("main", "vae", "discriminator"))
        assert sit is not None
        assert vae is not None
        shape = task.coder.latent_shape(batch.pixels)
        told = tuple(part.to(device) for part in self.config.told(batch, task.seed, task.batch_size))
        t, eps = (part.to(device) for part in (task.sit.noising.times(batch.index, 0), noise(batch.index, 0, shape)))
        posterior, pixels = noise(batch.index, POSTERIOR, shape).to(device), batch.pixels.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                grid = task.sit.sit.grid(eps)
                seen = [target(pixels, grid) for target in task.targets]
            latents, mean, logvar, rebuilt = vae(pixels, posterior)
            self._freeze(True)
            guesses = sit(told, latents, t, eps, False, align_only=True).guesses
            off, kl = rebuilt.float() - pixels, gaussian_kl(mean, logvar).flatten(1).sum(1).mean()
            loss = weights.l1 * off.abs().mean() + weights.kl * kl + weights.align * _looped(guesses, seen)
            if task.distance is not None:
                loss = loss + weights.perceptual * task.distance(rebuilt.float(), pixels).mean()
            if judge is not None:
                loss = loss - weights.adversarial * judge(rebuilt).mean()
        self._update("vae", loss)
        self._freeze(False)
        with torch.autocast(device.type, torch.bfloat16):
            if judge is not None:
                real, false = judge(pixels.detach().requires_grad_(True)), judge(rebuilt.detach())
                self._update("discriminator", 0.5 * (F.relu(1 - real).mean() + F.relu(1 + false).mean()))
            predicted = sit(told, latents.detach(), t, eps, True)
            target = task.sit.noising.target(predicted.latents, eps, t)
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
