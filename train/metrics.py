"""Scalars of steps -> means over a window and over ranks -> metrics.jsonl, a progress bar, and a tracker if asked."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from model.files import write_whole
from train.ranks import Ranks


@dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    """Event files in <out>/tensorboard; needs the tensorboard package."""
    wandb: str | None = None
    """The project of a Weights & Biases run; needs the wandb package."""

    def __post_init__(self) -> None:  # on every rank, before anything is built or written
        for package, wanted in (("tensorboard", self.tensorboard), ("wandb", self.wandb)):
            if wanted and find_spec(package) is None:
                raise ValueError(f"metrics.{package} needs a package; run: pip install {package}")


@dataclass
class Window:
    """Sums of a task's scalars since the last line, on their device: adding never waits for it."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # some scalars come and go

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Take in the scalars of one micro-batch."""
        for name, value in scalars.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] += 1

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Means over the window and all ranks; empties the window. Every rank calls it."""
        names, counts = sorted(self.sums), self.counts
        sums: list[float] = []
        if names:
            sums = ranks.sum(torch.stack([self.sums[name] for name in names])).tolist()
        self.sums, self.counts = {}, Counter()
        return {name: total / (counts[name] * ranks.world) for name, total in zip(names, sums, strict=True)}


class Metrics:
    """The record of a run on rank 0; on the other ranks every call does nothing. A context manager."""

    def __init__(
        self,
        folder: Path,
        config: MetricsConfig,
        ranks: Ranks,
        *,
        first_step: int,
        steps: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._first = ranks.first
        self._waiting = False  # for room on the disk
        self.console = Console(quiet=not ranks.first, highlight=False, soft_wrap=True)
        self._steps, self._began, self._begun_at = steps, time.monotonic(), first_step
        if not self._first:
            return
        self._folder, self._config, self._settings = folder, config, settings or {}
        self._open(first_step)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._row = self._bar.add_task("training", total=steps, completed=first_step, numbers="")

    def _open(self, step: int) -> None:
        path = self._folder / "metrics.jsonl"
        self._folder.mkdir(parents=True, exist_ok=True)
        _rewind(path, step)
        self._file = path.open("a", buffering=1)
        self._trackers = _trackers(self._folder, self._config, step, self._settings)

    def _close(self) -> None:
        with suppress(OSError):  # told when it began
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Metrics:
        if self._first:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._first:
            self._bar.stop()
            self._close()

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`: those steps are taken anew, another way."""
        if self._first:
            self._close()
            self._open(step)
            self._bar.update(self._row, completed=step)

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps done."""
        if self._first:
            self._bar.update(self._row, completed=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of numbers after `step` steps."""
        if not self._first:
            return
        self._write({"step": step, **values})
        shown = ", ".join(_shown(name, values[name]) for name in ("loss", "images_per_second") if name in values)
        self._bar.update(self._row, completed=step, numbers=shown)
        for tracker in self._trackers:
            tracker.log(step, values)
        if not self.console.is_terminal:
            left = (time.monotonic() - self._began) / max(1, step - self._begun_at) * (self._steps - step)
            self.console.print(f"step {step}/{self._steps}  {shown}, eta {int(left // 60)}:{int(left % 60):02d}")

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Write something that happened, and say it."""
        if self._first:
            self._write({"step": step, "event": event, **facts})
            self.console.print(f"step {step}: {event}" + "".join(f", {key} {value}" for key, value in facts.items()))

    def _write(self, line: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self._file.write(json.dumps(finite) + "\n")
        except OSError as error:  # a full disk: the file keeps the line, and tries again with the next
            if not self._waiting:
                self.console.print(f"metrics.jsonl: {error.strerror}; it goes on once there is room")
            self._waiting = True
        else:
            self._waiting = False


def _shown(name: str, value: float) -> str:
    return f"{value:.1f} images/s" if name == "images_per_second" else f"{name} {value:.4f}"


def _rewind(path: Path, step: int) -> None:
    """Drop lines written after `step`: the resumed run writes them again, and no step appears twice."""
    if path.exists():
        text = path.read_text()
        kept = "".join(line + "\n" for line in text.splitlines() if _step_of(line) <= step)
        if kept != text:
            write_whole(path, lambda draft: draft.write_text(kept))


def _step_of(line: str) -> float:
    """The step of a line; a line that a crash cut short belongs to no kept step."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


class _TensorBoard:
    """Scalars into TensorBoard event files."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)  # what is written again

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Scalars into one Weights & Biases run per folder, continued on resume."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports] (an optional package)

        note = folder / "wandb-id"  # another folder of the same name is another run
        if not note.is_file():
            write_whole(note, lambda path: path.write_text(uuid4().hex))
        self._run = wandb.init(
            project=project, id=note.read_text(), name=folder.name, config=dict(settings), resume="allow", dir=str(folder)
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})  # by its own count, a step that is taken again would be ignored

    def close(self) -> None:
        self._run.finish()


def _trackers(
    folder: Path, config: MetricsConfig, first_step: int, settings: Mapping[str, Any]
) -> list[_TensorBoard | _Wandb]:
    trackers: list[_TensorBoard | _Wandb] = []
    if config.tensorboard:
        trackers.append(_TensorBoard(folder, first_step))
    if config.wandb:
        trackers.append(_Wandb(folder, config.wandb, settings))
    return trackers
