"""A VAE and its diffusion transformer, trained together (REPA-E) or one after the other: published sizes and the world's."""

from __future__ import annotations

from dataclasses import replace

from configs.world import NOISE
from data.loader import Data, World
from model.alignment import ProjectorConfig
from model.discriminator import DiscriminatorConfig
from model.perceptual import PerceptualConfig
from model.sit import SiTConfig
from model.targets import TargetConfig
from model.vae import VAEConfig
from train.config import Run
from train.ema import EmaConfig
from train.engine import EngineConfig
from train.loop import Schedule
from train.optim import OptimConfig
from train.repae import RepaeTaskConfig, VAELosses

SEES = "assets/world/mllm"
"""The MLLM's own vision tower: the embedded default aligns with it, and needs no other network."""

OPTIM = OptimConfig(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, warmup_steps=50, floor=0.05)


def world() -> Run:
    """REPA-E on the generated world, from the shipped VAE: VAE, discriminator and SiT, each with its own engine.

    python -m train.run repae.world

    2 CPU cores; see docs/results.md for what it came to beside its baselines.
    """
    sit = SiTConfig(
        latent_channels=4,
        latent_size=16,
        patch=2,
        width=192,
        depth=8,
        heads=3,
        condition_width=192,
        condition_tokens=64,
        conditioning="in_context",
        shared_modulation=True,
        align_depth=4,
    )
    return Run(
        name="repae-world",
        task=RepaeTaskConfig(
            vae=VAEConfig("assets/world/vae"),
            sit=sit,
            noise=NOISE,
            losses=VAELosses(kl=1e-6),
            perceptual=PerceptualConfig(SEES, tokens=8),
            discriminator=DiscriminatorConfig(width=16, layers=2),
            vae_optim=replace(OPTIM, lr=2e-4),
            discriminator_optim=replace(OPTIM, lr=2e-4),
            targets=(TargetConfig(SEES),),
            projector=ProjectorConfig(width=384),
        ),
        data=Data(sources=(World(seed=5),), task="labelled", image_size=64),
        schedule=Schedule(steps=2_000, batch_size=32, log_every=20, save_every=250, preview_every=1000),
        optim=OPTIM,
        ema=EmaConfig(halflife_images=5_000),
        engine=EngineConfig(zero=1, precision="bf16"),
    )


def world_repa() -> Run:
    """The same with the VAE left as it is (REPA).

    python -m train.run repae.world_repa
    """
    run = world()
    return replace(run, name="repae-world-repa", task=replace(_task(run), train_vae=False))


def world_vanilla() -> Run:
    """The same with the VAE left as it is, and nothing aligned.

    python -m train.run repae.world_vanilla
    """
    run = world_repa()
    return replace(run, name="repae-world-vanilla", task=replace(_task(run), targets=()))


def world_naive() -> Run:
    """The control: no alignment of the VAE, but the diffusion loss into it, which makes its latents trivial.

    python -m train.run repae.world_naive
    """
    run = world()
    task = _task(run)
    losses = replace(task.losses, align=0.0, diffusion=1.0)
    return replace(run, name="repae-world-naive", task=replace(task, losses=losses))


def world_ldm() -> Run:
    """The second stage: a fresh SiT on the VAE that repae.world tuned.

    python -m train.run repae.world_ldm --task.vae.path runs/repae-world/release/vae
    """
    run = world_repa()
    return replace(run, name="repae-world-ldm", task=replace(_task(run), vae=VAEConfig("runs/repae-world/release/vae")))


def world_autoencoder() -> Run:
    """The VAE with its discriminator alone.

    python -m train.run repae.world_autoencoder
    """
    run = world()
    return replace(run, name="repae-world-autoencoder", task=replace(_task(run), sit=None, targets=()))


def _task(run: Run) -> RepaeTaskConfig:
    assert isinstance(run.task, RepaeTaskConfig)
    return run.task
