"""The parts of the embedded default, in the order in which they are made: VAE, decoder; its MLLM is in understand.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data.loader import Data, World
from model.noise import FlowConfig
from model.sit import SiTConfig
from model.vae import VAEConfig
from train.autoencoder import AutoencoderTaskConfig
from train.config import Run
from train.ema import EmaConfig
from train.engine import EngineConfig
from train.labelled import LabelledTaskConfig
from train.loop import Schedule
from train.optim import OptimConfig

NOISE = FlowConfig(shift=2.0, time="logit_normal", std=1.2)
"""Where things lie is decided while nine tenths of a latent are noise: unshifted, one sample in 25 was from there, and one
thing asked for became two."""


def vae() -> Run:
    """64 px pictures <-> 16 x 16 latents of 4 channels.

    python -m train.run world.vae

    2 CPU cores, about 15 minutes; mean absolute error below 0.03 of the range [-1, 1].
    """
    return Run(
        name="world-vae",
        task=AutoencoderTaskConfig(
            channels=(16, 48, 96), latent_channels=4, layers_per_block=1, groups=8, attention=False, kl_weight=1e-5
        ),
        data=Data(sources=(World(seed=1),), task="labelled", image_size=64),
        schedule=Schedule(steps=4000, batch_size=8, log_every=50, save_every=500, preview_every=500),
        optim=OptimConfig(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=100, floor=0.02),
        ema=EmaConfig(halflife_images=2_000),
        engine=EngineConfig(zero=1, precision="bf16"),
    )


def vae_decoder() -> Run:
    """The same VAE's decoder, longer and alone: sharper edges from the latents that the SiT has learned.

    python -m train.run world.vae_decoder

    2 CPU cores, about ten minutes.
    """
    run = vae()
    assert isinstance(run.task, AutoencoderTaskConfig)
    return replace(
        run,
        name="world-vae-decoder",
        task=replace(run.task, init="assets/world/vae", decoder_only=True),
        data=Data(sources=(World(seed=3),), task="labelled", image_size=64),
        schedule=replace(run.schedule, steps=3000),
        optim=replace(run.optim, lr=1e-3),
    )


def coarse_decoder() -> Run:
    """A SiT of 7 M parameters and 16 latent tokens on those latents, told scenes: it learns what lies where.

    python -m train.run world.coarse_decoder

    2 CPU cores, some hours; the shipped one was trained in rounds, each going on from the one before with `task.init`
    (assets/world/README.md). Without the alignment its colours and places came right, its shapes did not.
    """
    sit = SiTConfig(
        latent_channels=4,
        latent_size=16,
        patch=4,
        width=256,
        depth=8,
        heads=4,
        condition_width=256,
        condition_tokens=64,
        conditioning="in_context",
        shared_modulation=True,
        align_depth=6,
    )
    return Run(
        name="world-coarse-decoder",
        task=LabelledTaskConfig(sit=sit, vae=VAEConfig("assets/world/vae"), noise=NOISE),
        data=Data(sources=(World(seed=2),), task="labelled", image_size=64),
        schedule=Schedule(steps=8_000, batch_size=64, log_every=20, save_every=500, preview_every=1000),
        optim=OptimConfig(lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, warmup_steps=200, floor=0.02),
        ema=EmaConfig(halflife_images=20_000),
        engine=EngineConfig(zero=1, precision="bf16"),
    )


def decoder() -> Run:
    """The same SiT with 64 latent tokens, which goes on from the coarse one: it learns to draw what lies there.

    python -m train.run world.decoder --task.init runs/world-coarse-decoder/release

    2 CPU cores, about two hours; a step takes three times as long. With large patches alone, half of the scenes of two
    objects were drawn so raggedly that the reader could not name a shape, however far the layout was given.
    """
    run = coarse_decoder()
    assert isinstance(run.task, LabelledTaskConfig)
    return replace(
        run,
        name="world-decoder",
        task=replace(run.task, sit=replace(run.task.sit, patch=2, spacing=0.5), align_points=4),
        optim=replace(run.optim, warmup_steps=100),
        schedule=replace(run.schedule, steps=9_000),
    )


def tuned_decoder() -> Run:
    """The shipped SiT: after joint training (`repae.decoder`) it goes on alone, on the VAE as that left it.

    python -m train.run world.tuned_decoder

    2 CPU cores, about three quarters of an hour; the shipped one was stopped after 2,540 steps.
    """
    run = decoder()
    assert isinstance(run.task, LabelledTaskConfig)
    joint = Path("runs/repae-decoder/release")
    return replace(
        run,
        name="world-tuned-decoder",
        task=replace(run.task, vae=VAEConfig(str(joint / "vae")), init=joint / "sit"),
        data=Data(sources=(World(seed=7),), task="labelled", image_size=64),
        optim=replace(run.optim, lr=7e-4),
        schedule=replace(run.schedule, steps=3_000),
    )
