"""How long training stands still for a checkpoint, and what a save costs in all: `python -m train.benchmark saves`.

The same module is saved in two ways that take turns: before training goes on, and in the background from a copy. Some
steps are trained once each has begun; the whole ends when these are done and the checkpoint has its name.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sample.measures import Measure, show, spread
from train.checkpoint import Keep
from train.ema import EmaConfig
from train.engine import KINDS, Engine, EngineConfig
from train.machine import record
from train.optim import OptimConfig
from train.ranks import start
from train.saving import Saver, state_bytes

WIDTH = 1024


@dataclass(frozen=True, kw_only=True)
class Saves:
    """Time the saves of a stack of linear layers."""

    megabytes: int = 100
    """Of state: weights, both moments and averages in float32."""
    steps: int = 5
    """Trained after each save began."""
    batch_size: int = 64
    repeats: int = 7
    """Timed saves of each way."""
    folder: Path | None = None
    """Where to write the checkpoints; None: the system's place for temporary files."""
    json: Path | None = None
    """Where to write the measures."""


def saves(args: Saves) -> None:
    """Measures, prints and writes. Raises ValueError for a size below 1."""
    if min(args.megabytes, args.steps, args.batch_size, args.repeats) < 1:
        raise ValueError("give sizes and repeats of at least 1")
    ranks = start(600)
    layers = max(1, round(args.megabytes * 1e6 / (4 * len(KINDS) * WIDTH**2)))
    engine = Engine(
        nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))),
        optim=OptimConfig(),
        config=EngineConfig(precision="fp32"),
        ema=EmaConfig(),
        ranks=ranks,
        batch_size=args.batch_size,
        accumulation=1,
        total_steps=2 * args.steps * (args.repeats + 1),
    )
    x = torch.randn(args.batch_size, WIDTH, device=ranks.device)
    still: dict[bool, list[float]] = {False: [], True: []}
    whole: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        savers = {way: Saver(Path(folder), {"main": engine}, {}, Keep(2), ranks, background=way) for way in still}
        for repeat in range(args.repeats + 1):
            for way, saver in savers.items():
                began = time.perf_counter()
                saver.begin(engine.steps, engine.steps * args.batch_size)
                stood = time.perf_counter() - began
                for _ in range(args.steps):
                    _step(engine, x)
                saver.finish()
                if repeat:  # the first of each warms up
                    still[way].append(stood)
                    whole[way].append(time.perf_counter() - began)
    size = state_bytes({"main": engine})
    ratios = [at_once / behind for at_once, behind in zip(still[False], still[True], strict=True)]
    measures = {
        "saves.size": Measure(size, unit="B"),
        "saves.still": spread(still[False], "s"),
        "saves.background.still": spread(still[True], "s"),
        "saves.still_ratio": spread(ratios, "x"),
        "saves.rate": spread([size / seconds for seconds in still[False]], "B/s"),
        "saves.whole": spread(whole[False], "s"),
        "saves.background.whole": spread(whole[True], "s"),
    }
    show(f"saves of {size / 1e6:,.0f} MB and {args.steps} steps", measures)
    if args.json is not None:
        record(args.json, measures)
    ranks.leave()


def _step(engine: Engine, x: Tensor) -> None:
    """One optimizer step."""
    engine.backward(engine(x).square().mean())
    engine.step()
