"""One run as a value: task + data + optimizer + engine + schedule, frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from data.loader import Data
from train.autoencoder import AutoencoderTaskConfig
from train.ema import EmaConfig
from train.engine import EngineConfig
from train.labelled import LabelledTaskConfig
from train.loop import Schedule
from train.metaquery import MetaQueryTaskConfig
from train.metrics import MetricsConfig
from train.optim import OptimConfig
from train.ranks import Ranks
from train.repae import RepaeTaskConfig
from train.see import SeeTaskConfig
from train.task import Task
from train.tell import TellTaskConfig
from train.understand import UnderstandTaskConfig
from train.watchdog import WatchConfig

TaskConfig = (
    MetaQueryTaskConfig
    | TellTaskConfig
    | AutoencoderTaskConfig
    | LabelledTaskConfig
    | RepaeTaskConfig
    | SeeTaskConfig
    | UnderstandTaskConfig
)


@dataclass(frozen=True)
class Run:
    """All that decides a training run: two equal Runs give the same weights."""

    name: str
    task: TaskConfig
    data: Data = field(default_factory=Data)
    schedule: Schedule = field(default_factory=Schedule)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    seed: int = 0
    out: Path | None = None
    """Where checkpoints, metrics, previews and the release go; None: runs/<name>."""
    resume: str = "auto"
    """auto: go on from the newest valid checkpoint in `out`, if any; must: there has to be one; never: there must be
    none; anything else is the path of a checkpoint."""
    allow_change: bool = False
    """Go on although the data, its order or a frozen part is not the one that the checkpoint was trained with."""

    @property
    def folder(self) -> Path:
        """`out`, or what stands for it."""
        return self.out or Path("runs") / self.name

    def build(self, ranks: Ranks) -> Task:
        """The task, fresh weights drawn by the seed: what one command builds from a run, every other builds as well."""
        torch.manual_seed(self.seed)
        return self.task.build(self, ranks)
