"""A REPA-E run of three tiny networks on the generated world, and the same steps in plain torch."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from data.loader import Data, World
from model.alignment import ProjectorConfig, alignment
from model.connector import ConnectorConfig
from model.discriminator import DiscriminatorConfig
from model.mllm import MLLMConfig
from model.noise import noise
from model.perceptual import FeaturesConfig
from model.targets import TargetConfig
from model.vae import VAEConfig
from tests import tiny
from train.config import Run
from train.engine import EngineConfig
from train.loop import Schedule
from train.loss import gaussian_kl, squared_error
from train.optim import OptimConfig, adamw, learning_rate
from train.prompts import PromptsTold
from train.ranks import Ranks, start
from train.repae import POSTERIOR, RepaeTask, RepaeTaskConfig, VAELosses

STEPS, BATCH, CLIP_NORM = 3, 8, 0.3
LOSSES = VAELosses(l1=1.0, l2=0.5, perceptual=0.7, kl=1e-4, adversarial=0.1, align=1.5)


def dinov2_folder(folder: Path, seed: int = 0) -> Path:
    """A DINOv2 of width 16 and 2 blocks on patches of 2 x 2 pixels, weights larger than at birth."""
    torch.manual_seed(seed)
    model = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=2, mlp_ratio=2)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    BitImageProcessor().save_pretrained(folder)
    return folder


def repae_run(folder: Path, engine: EngineConfig, accumulation: int = 1, **changes: Any) -> Run:
    """Pictures of 16 x 16 pixels; makes what it starts from below `folder` unless it is there."""
    for name, make in (("vae", tiny.vae_folder), ("dinov2", dinov2_folder)):
        if not (folder / name).exists():
            make(folder / name)
    seen = str(folder / "dinov2")
    task: dict[str, Any] = dict(
        vae=VAEConfig(str(folder / "vae")),
        sit=tiny.sit_config(),
        losses=LOSSES,
        perceptual=FeaturesConfig(TargetConfig(seen, dtype="float32"), tokens=4),
        discriminator=DiscriminatorConfig(width=8, layers=1),
        targets=(TargetConfig(seen, dtype="float32"),),
        projector=ProjectorConfig(width=24),
    )
    return Run(
        name="tiny-repae",
        task=RepaeTaskConfig(**(task | changes)),
        data=Data(sources=(World(seed=5),), task="labelled", image_size=16, workers=0),
        schedule=Schedule(steps=STEPS, batch_size=BATCH, accumulation=accumulation, save_every=2),
        optim=OptimConfig(lr=3e-3, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.01, warmup_steps=2),
        engine=engine,
        seed=3,
    )


def prompted_run(folder: Path, engine: EngineConfig, accumulation: int = 1, **changes: Any) -> Run:
    """The same, told captions by a tiny MLLM."""
    if not (folder / "mllm").exists():
        tiny.mllm_folder(folder / "mllm")
    told = PromptsTold(MLLMConfig(str(folder / "mllm"), dtype="float32"), queries=4, connector=ConnectorConfig(layers=1))
    run = repae_run(folder, engine, accumulation, told=told, **changes)
    return replace(run, data=replace(run.data, task="t2i"))


def build(run: Run, ranks: Ranks) -> RepaeTask:
    """The task, the same weights each time; nothing starts at zero, so that every gradient counts."""
    torch.manual_seed(11)
    assert isinstance(run.task, RepaeTaskConfig)
    created = nn.init.zeros_, nn.init.constant_
    nn.init.zeros_ = lambda tensor: nn.init.normal_(tensor, std=0.05)
    try:
        return run.task.build(run, ranks)
    finally:
        nn.init.zeros_, nn.init.constant_ = created


def advance(task: RepaeTask, run: Run, first: int = 0, last: int = STEPS) -> list[dict[str, float]]:
    """Optimizer steps; the gradient norm of each engine and the measured scalars of the last micro-batch."""
    batches, seen = task.batches(first * BATCH), []
    for _ in range(first, last):
        scalars: dict[str, Any] = {}
        for _ in range(run.schedule.accumulation):
            scalars = task.step(next(batches))
        norms = {f"{name}.norm": engine.last.grad_norm for name, engine in task.engines.items() if engine.last}
        seen.append({name: float(value.detach()) for name, value in scalars.items()} | norms)
    return seen


def weights(task: RepaeTask) -> dict[str, torch.Tensor]:
    """Every trained tensor and every buffer of every engine, by engine and name."""
    found = {}
    for engine_name, engine in task.engines.items():
        found |= {f"{engine_name}.{name}": tensor.clone() for name, tensor in engine.tensors("weights")}
        found |= {f"{engine_name}.{name}": tensor.detach().clone().cpu() for name, tensor in engine.buffers().items()}
    return found


def in_plain_torch(run: Run) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The same steps on one process by three optimizers, without engines: the other networks are frozen, and the loss of the
    VAE is one sum with one backward pass."""
    one = replace(run, engine=EngineConfig(zero=0, precision="fp32", clip_norm=0), schedule=replace(run.schedule))
    task = build(one, start(60))
    config, sit = task.config, task.sit
    distance = task.distance
    assert distance is not None
    modules: dict[str, nn.Module] = {name: engine.module for name, engine in task.engines.items()}
    optimizers = {name: adamw(module, run.optim) for name, module in modules.items()}
    batches, seen = _micro_batches(task), []
    for step in range(STEPS):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run.optim, step, STEPS)
        held = [next(batches) for _ in range(run.schedule.accumulation)]
        scalars: dict[str, Any] = {}
        for batch in held:
            share = 1 / len(held)
            shape = task.coder.latent_shape(batch.pixels)
            told, t = config.told(batch, run.seed, BATCH), sit.noising.times(batch.index, run.seed)
            eps = noise(batch.index, run.seed, shape)
            coded = modules["vae"](batch.pixels, noise(batch.index, run.seed + POSTERIOR, shape))
            features = [target(batch.pixels, sit.sit.grid(eps)) for target in task.targets]
            off = coded.rebuilt - batch.pixels
            for name in ("main", "discriminator"):
                modules[name].requires_grad_(False)
            guesses = modules["main"](told, coded.latents, t, eps, False).guesses
            kl = gaussian_kl(coded.mean, coded.logvar).sum() / len(batch.pixels)
            loss = (
                LOSSES.l1 * off.abs().mean()
                + LOSSES.l2 * off.square().mean()
                + LOSSES.kl * kl
                + LOSSES.perceptual * distance(coded.rebuilt, batch.pixels).mean()
                + LOSSES.align * alignment(guesses, features)
                - LOSSES.adversarial * modules["discriminator"](coded.rebuilt).mean()
            )
            (share * loss).backward()
            for name in ("main", "discriminator"):
                modules[name].requires_grad_(True)
            real, false = (modules["discriminator"](part) for part in (batch.pixels, coded.rebuilt.detach()))
            (share * 0.5 * ((1 - real).relu().mean() + (1 + false).relu().mean())).backward()
            predicted = modules["main"](told, coded.latents.detach(), t, eps, True)
            diffusion = squared_error(predicted.velocity, eps - predicted.latents).mean()
            align = alignment(predicted.guesses, features)
            (share * (diffusion + config.align * align)).backward()
            scalars = {"loss": diffusion, "align": align, "l1": off.abs().mean(), "kl": kl}
        norms = {}
        for name, module in modules.items():
            norms[f"{name}.norm"] = float(nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM))
            optimizers[name].step()
            optimizers[name].zero_grad()
        sit.norm.settle(True, keep=1.0)
        seen.append({name: float(value.detach()) for name, value in scalars.items()} | norms)
    found = {}
    for name, module in modules.items():
        found |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in module.state_dict().items()}
    return seen, found


def _micro_batches(task: RepaeTask) -> Iterator[Any]:
    return task.batches(0)
