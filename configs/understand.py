"""Training the embedded MLLM: four stages, each going on from the folder that the one before released.

The last release is what `assets/world/mllm` holds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data.loader import Data, World
from data.world.conversations import Shares
from train.config import Run
from train.ema import EmaConfig
from train.engine import EngineConfig
from train.loop import Schedule
from train.optim import OptimConfig
from train.see import SeeTaskConfig
from train.understand import UnderstandTaskConfig


def language() -> Run:
    """A fresh language model learns to read: questions about descriptions in words, no pictures.

    python -m train.run understand.language

    2 CPU cores, minutes; the loss falls from 7.4 to below 1.
    """
    return Run(
        name="language",
        task=UnderstandTaskConfig(
            trainable=("model.language_model.*",), shares=Shares(describe=0.0, read=1.0), exam_pictures=0
        ),
        data=Data(sources=(World(seed=7),), task="chat"),
        schedule=Schedule(steps=300, batch_size=64, save_every=100),
        optim=OptimConfig(lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.05, warmup_steps=100, floor=0.1),
        ema=EmaConfig(halflife_images=5_000),
        engine=EngineConfig(zero=1, precision="bf16"),
    )


def see() -> Run:
    """The vision tower learns which colour and shape lies where, on pictures alone; no words.

    python -m train.run understand.see

    2 CPU cores, about ten minutes; it names the shape at 99 % of the points inside objects.
    """
    return Run(
        name="see",
        task=SeeTaskConfig(init=Path("runs/language/release")),
        data=Data(sources=(World(seed=11),), task="labelled", image_size=64),
        schedule=Schedule(steps=1300, batch_size=64, save_every=200),
        optim=OptimConfig(lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.02, warmup_steps=100, floor=0.03),
        ema=EmaConfig(halflife_images=2_000),
        engine=EngineConfig(zero=1, precision="bf16"),
    )


def align() -> Run:
    """Stage 3: the vision tower and its merger learn to speak to the language model, which stays as it is.

    python -m train.run understand.align

    Pictures described in full. 2 CPU cores, tens of minutes.
    """
    run = language()
    task = UnderstandTaskConfig(
        init=Path("runs/see/release"), trainable=("model.visual.*",), shares=Shares(describe=1.0, read=0.0)
    )
    return replace(run, name="align", task=task, schedule=replace(run.schedule, steps=600, save_every=200))


def instruct() -> Run:
    """Stage 4: everything learns from the whole mixture of questions, descriptions and texts.

    python -m train.run understand.instruct

    2 CPU cores, about two hours; then questions about held-out pictures are answered far above what a blank picture gives.
    """
    run = language()
    return replace(
        run,
        name="instruct",
        task=UnderstandTaskConfig(
            init=Path("runs/align/release"),
            shares=Shares(describe=0.05, read=0.1, where=0.4, plan=0.25),
            max_answers=5,
            place=0.5,
        ),
        schedule=replace(run.schedule, steps=2000, save_every=250, preview_every=250),
        optim=replace(run.optim, warmup_steps=200, floor=0.02),
        ema=EmaConfig(halflife_images=20_000),
    )
