"""MetaQuery runs: a frozen MLLM, learned queries and a connector drive a diffusion decoder."""

from __future__ import annotations

from dataclasses import replace

from configs.world import NOISE
from data.loader import Data, World
from data.shards import Shards
from model.connector import ConnectorConfig
from model.decoder import SiTDecoderConfig
from model.metaquery import MetaQueryConfig
from model.mllm import MLLMConfig
from model.sit import SiTConfig
from model.vae import VAEConfig
from train.config import Run
from train.ema import EmaConfig
from train.engine import EngineConfig
from train.loop import Schedule
from train.metaquery import MetaQueryTaskConfig
from train.optim import OptimConfig
from train.preview import PreviewConfig
from train.tell import TellTaskConfig


def world() -> Run:
    """The embedded default: draw scenes of the generated world.

    python -m train.run metaquery.world

    2 CPU cores, about an hour; the loss falls below that of the untrained bridge within the first hundred steps.
    """
    model = MetaQueryConfig(
        mllm=MLLMConfig("assets/world/mllm"),
        decoder=SiTDecoderConfig(path="assets/world/sit"),
        vae=VAEConfig("assets/world/vae"),
        queries=16,
        connector=ConnectorConfig(layers=2),
        noise=NOISE,  # as its SiT was trained
        trainable=("sit.embed_condition.*", "sit.condition_position"),
    )
    prompts = (
        "a red circle",
        "a blue square and a yellow star",
        "a green triangle left of a red square",
        "a large blue circle above a small green star",
    )
    return Run(
        name="world",
        task=MetaQueryTaskConfig(model, align=0.2, preview=PreviewConfig(prompts)),
        data=Data(sources=(World(),)),
        schedule=Schedule(steps=1500, batch_size=64, log_every=10, save_every=250, preview_every=500),
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, warmup_steps=100),
        ema=EmaConfig(halflife_images=5_000),
        engine=EngineConfig(zero=1, precision="bf16"),
    )


def tell() -> Run:
    """The world's bridge before it draws: its conditioning learns to be what the decoder was told in its own training.

    python -m train.run metaquery.tell

    2 CPU cores, about a quarter of an hour; the mean square error of tokens whose mean square is 1 falls to 0.02.
    """
    run = world()
    assert isinstance(run.task, MetaQueryTaskConfig)
    return replace(
        run,
        name="tell",
        task=TellTaskConfig(run.task.model, preview=run.task.preview),
        schedule=replace(run.schedule, steps=2000, preview_every=0),
        optim=replace(run.optim, lr=2e-3),
    )


def demo() -> Run:
    """What `make demo` trains after a short `tell`: the embedded default, for a few minutes.

    python -m train.run metaquery.demo

    2 CPU cores, about a minute; at a low learning rate, because what was told is soon forgotten.
    """
    run = world()
    return replace(
        run,
        name="demo",
        schedule=Schedule(steps=40, batch_size=64, log_every=5, save_every=20),
        optim=replace(run.optim, lr=2e-4, warmup_steps=5),
        ema=EmaConfig(halflife_images=1_000),
    )


def emoji() -> Run:
    """Real pictures with real captions: about 1,300 emoji, written as shards by

    python -m data.write emoji --font NotoColorEmoji.ttf --out shards/emoji
    python -m train.run metaquery.emoji

    2 CPU cores, some hours; it learns the colours and outlines of the pictures it has seen.
    """
    run = world()
    assert isinstance(run.task, MetaQueryTaskConfig)
    prompts = ("grinning face", "red apple", "blue heart", "snowman", "soccer ball", "cat face")
    model = replace(run.task.model, trainable=("*",))  # the world's SiT has never seen such pictures
    return replace(
        run,
        name="emoji",
        task=replace(run.task, model=model, align=0.0, preview=PreviewConfig(prompts)),
        data=Data(sources=(Shards("shards/emoji/*.tar"),)),
        schedule=replace(run.schedule, steps=4000, save_every=500, preview_every=1000),
    )


def tiny() -> Run:
    """A few steps with a fresh decoder of two layers, in float32: does the machine train at all?

    python -m train.run metaquery.tiny

    1 CPU core, seconds; the loss starts near 2 (unit-variance noise minus unit-variance data).
    """
    sit = SiTConfig(
        latent_channels=4,
        latent_size=16,
        patch=4,
        width=48,
        depth=2,
        heads=3,
        condition_width=48,
        condition_tokens=16,
        align_depth=1,
    )
    model = MetaQueryConfig(
        mllm=MLLMConfig("assets/world/mllm", dtype="float32"),
        decoder=SiTDecoderConfig(sit=sit),
        vae=VAEConfig("assets/world/vae"),
        queries=4,
        connector=ConnectorConfig(layers=1),
        trainable=("*",),
    )
    return Run(
        name="tiny",
        task=MetaQueryTaskConfig(model, preview=PreviewConfig(("a red circle",), steps=2)),
        schedule=Schedule(steps=6, batch_size=8, log_every=1, save_every=3),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        ema=EmaConfig(halflife_images=16),
        engine=EngineConfig(zero=1, precision="fp32"),
    )
