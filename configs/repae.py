"""A VAE and its diffusion transformer, trained together (REPA-E) or one after the other: published sizes and the world's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from configs.world import NOISE
from configs.world import decoder as world_decoder
from data.loader import Data, World
from data.shards import Shards
from data.told import ClassesTold
from model.alignment import ProjectorConfig
from model.connector import ConnectorConfig
from model.discriminator import DiscriminatorConfig
from model.mllm import MLLMConfig
from model.perceptual import FeaturesConfig, LPIPSConfig
from model.sit import SIZES, SiTConfig
from model.targets import TargetConfig
from model.vae import VAEConfig
from train.config import Run
from train.ema import EmaConfig
from train.engine import EngineConfig
from train.labelled import LabelledTaskConfig
from train.loop import Schedule
from train.optim import OptimConfig
from train.prompts import PromptsTold
from train.repae import RepaeTaskConfig, VAELosses

SEES = "assets/world/mllm"
"""The MLLM's own vision tower: the embedded default aligns with it, and needs no other network."""

F16D32 = "REPA-E/e2e-invae-hf"
"""A released VAE of 32 channels, 16 pixels a side to a latent."""

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
            perceptual=FeaturesConfig(TargetConfig(SEES), tokens=8),
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


def decoder() -> Run:
    """The shipped decoder: the SiT of `world.decoder` and its VAE, trained together; `world.tuned_decoder` goes on from it.

    python -m train.run repae.decoder

    2 CPU cores, about half an hour.
    """
    run, plain = world(), world_decoder().task
    assert isinstance(plain, LabelledTaskConfig)
    task = replace(
        _task(run),
        sit=plain.sit,
        init=Path("runs/world-decoder/release"),
        losses=VAELosses(l2=1.0),
        recon_fraction=0.5,
        vae_optim=replace(OPTIM, lr=2e-4, warmup_steps=200),
    )
    return replace(
        run,
        name="repae-decoder",
        task=task,
        data=Data(sources=(World(seed=6),), task="labelled", image_size=64),
        schedule=replace(run.schedule, steps=1_000, save_every=100),
        optim=replace(OPTIM, lr=5e-4),
        ema=EmaConfig(halflife_images=5_000),
    )


def world_prompts() -> Run:
    """The same, told captions: the frozen MLLM reads them, and queries and connector train along with SiT and VAE.

    python -m train.run repae.world_prompts

    2 CPU cores. Its release has a third part, bridge/, a MetaQuery that draws: `python -m sample.generate --release
    runs/repae-world-prompts/release/bridge "a red circle"`.
    """
    run = world()
    told = PromptsTold(MLLMConfig(SEES), queries=16, connector=ConnectorConfig(layers=2))
    task, data = replace(_task(run), told=told), replace(run.data, task="t2i")
    return replace(run, name="repae-world-prompts", task=task, data=data)


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


def _sit(size: str, latent_channels: int, latent_size: int, patch: int) -> SiTConfig:
    """The published SiT of a size over these latents; the alignment at block 4 of S and B, else at 8."""
    depth, width, heads = SIZES[size]
    return SiTConfig(
        latent_channels=latent_channels,
        latent_size=latent_size,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        condition_width=width,
        condition_tokens=1,
        conditioning="modulation",
        shared_modulation=False,
        qk_norm=False,
        time_scale=1.0,
        align_depth=4 if depth == 12 else 8,
    )


def xl_f8d4() -> Run:
    """REPA-E as published on ImageNet at 256 pixels: SiT-XL/2 with Stable Diffusion's VAE and DINOv2-B.

    torchrun --nproc_per_node 8 -m train.run repae.xl_f8d4 --data.sources.0.urls 'shards/imagenet/*.tar'

    8 GPUs of 80 GB, 400,000 steps (80 epochs). The paper's FID is 4.07 without guidance; this recipe was never run. It
    differs in bfloat16 for float16; a discriminator that starts afresh, with group norm for batch norm; LPIPS in the range
    it was made for; positions that never train; and an average of the VAE in the release. LPIPS wants its
    two files in the folder `lpips` (see model/perceptual.py). A sample's class, 0 to 999, is its member `KEY.cls`, as
    webdataset has it, or `label` in its json.
    """
    return Run(
        name="repae-xl-f8d4",
        task=RepaeTaskConfig(
            vae=VAEConfig("stabilityai/sd-vae-ft-ema"),
            sit=_sit("xl", latent_channels=4, latent_size=32, patch=2),
            told=ClassesTold(classes=1000, plain=True),
            perceptual=LPIPSConfig("lpips"),
            discriminator=DiscriminatorConfig(),
            targets=(TargetConfig("facebook/dinov2-base", antialias=False),),
        ),
        data=Data(sources=(Shards("shards/imagenet/*.tar"),), task="labelled", image_size=256, workers=8),
        schedule=Schedule(steps=400_000, batch_size=256, log_every=100, save_every=5_000, preview_every=10_000),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup_steps=0, decay="constant"),
        ema=EmaConfig(halflife_images=1_774_000),  # 0.9999 a step of 256 images
        engine=EngineConfig(zero=2, precision="autocast", compile=True),
    )


def xl_f16d32() -> Run:
    """The same with a VAE of 32 channels, 16 pixels a side to a latent, and SiT-XL/1.

    torchrun --nproc_per_node 8 -m train.run repae.xl_f16d32 --data.sources.0.urls 'shards/imagenet/*.tar'

    It starts from the release's own VAE of this shape; `repae.xl_f16d32_ldm` is its second stage. Never run here.
    """
    run = xl_f8d4()
    task = replace(_task(run), vae=VAEConfig(F16D32), sit=_sit("xl", latent_channels=32, latent_size=16, patch=1))
    return replace(run, name="repae-xl-f16d32", task=task)


def l_f8d4() -> Run:
    """The same with SiT-L/2.

    torchrun --nproc_per_node 8 -m train.run repae.l_f8d4 --data.sources.0.urls 'shards/imagenet/*.tar'
    """
    return _sized("l")


def b_f8d4() -> Run:
    """The same with SiT-B/2.

    torchrun --nproc_per_node 8 -m train.run repae.b_f8d4 --data.sources.0.urls 'shards/imagenet/*.tar'
    """
    return _sized("b")


def s_f8d4() -> Run:
    """The same with SiT-S/2.

    torchrun --nproc_per_node 8 -m train.run repae.s_f8d4 --data.sources.0.urls 'shards/imagenet/*.tar'
    """
    return _sized("s")


def xl_f8d4_repa() -> Run:
    """REPA: the same SiT-XL/2, the VAE left as it is.

    torchrun --nproc_per_node 8 -m train.run repae.xl_f8d4_repa --data.sources.0.urls 'shards/imagenet/*.tar'
    """
    run = xl_f8d4()
    return replace(run, name="repae-xl-f8d4-repa", task=replace(_task(run), train_vae=False))


def xl_f16d32_ldm() -> Run:
    """The published second stage: SiT-XL/1 from nothing on a tuned VAE of 32 channels, 16 pixels a side to a latent.

    torchrun --nproc_per_node 8 -m train.run repae.xl_f16d32_ldm --data.sources.0.urls 'shards/imagenet/*.tar'

    800 epochs; the paper's FID is 1.12 with guidance 2.4 in [0, 0.73] and balanced labels. Never run here. With latents made
    once by data.precompute (`--data.sources.0.latents latents/imagenet`) the VAE is not asked again, and they are the
    posterior's mean, where the VAE would give samples of it, as published.
    """
    run = xl_f8d4_repa()
    task = replace(
        _task(run),
        vae=VAEConfig(F16D32),
        sit=_sit("xl", latent_channels=32, latent_size=16, patch=1),
    )
    return replace(run, name="repae-xl-f16d32-ldm", task=task, schedule=replace(run.schedule, steps=4_000_000))


def _sized(size: str) -> Run:
    run = xl_f8d4()
    sit = _sit(size, latent_channels=4, latent_size=32, patch=2)
    return replace(run, name=f"repae-{size}-f8d4", task=replace(_task(run), sit=sit))


def _task(run: Run) -> RepaeTaskConfig:
    assert isinstance(run.task, RepaeTaskConfig)
    return run.task
