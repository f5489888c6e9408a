"""Captions and pictures -> a bridge that draws: one MetaQuery step (Pan et al., 2025).

Letters: B batch, c h w latent channels, height, width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from data.batch import T2IBatch, TextToImageCollate
from data.loader import Loader
from model.files import match, read_tensors
from model.metaquery import MetaQuery, MetaQueryConfig, build
from model.noise import noise
from model.store import save
from train.engine import Engine
from train.loss import squared_error
from train.preview import PreviewConfig, draw_preview
from train.ranks import Ranks
from train.task import Task, engine_for, loader_for

if TYPE_CHECKING:
    from train.config import Run


@dataclass(frozen=True)
class MetaQueryTaskConfig:
    """The model to train, what it starts from, and what it is asked to draw on the way."""

    model: MetaQueryConfig
    init: Path | None = None
    """A release whose weights are the start: a new stage on an old one. None: fresh queries and connector."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    def build(self, run: Run, ranks: Ranks) -> MetaQueryTask:
        """Load the frozen parts, make the others, and hand what trains to an engine."""
        if run.data.task not in ("t2i", "edit"):
            raise ValueError(f"data.task is {run.data.task}; a MetaQuery learns from t2i or edit")
        model = build(self.model)
        if run.data.image_size != model.image_size:
            raise ValueError(f"data.image_size is {run.data.image_size}, the decoder draws {model.image_size}; give that")
        if self.init is not None:
            start(model, self.init)
        model.place(ranks.device)
        collate = TextToImageCollate(model.mllm.builder, run.data.image_size, run.data.dropout, run.seed)
        loader = loader_for(collate, run, ranks)
        return MetaQueryTask(model, engine_for(model, run, ranks), loader, self.preview, run.seed, ranks)


class MetaQueryTask(Task):
    """Trains queries, connector and the configured part of the decoder; the MLLM and the VAE are only read."""

    def __init__(
        self, model: MetaQuery, engine: Engine, loader: Loader, preview: PreviewConfig, seed: int, ranks: Ranks
    ) -> None:
        self.model, self.engine, self.loader = model, engine, loader
        self.previews, self.seed, self.ranks = preview, seed, ranks
        self.engines = {"main": engine}

    def batches(self, samples: int) -> Iterator[T2IBatch]:
        """This rank's share, on the CPU."""
        self.loader.samples = samples
        return iter(self.loader)

    def step(self, batch: T2IBatch) -> dict[str, Tensor]:
        """Mean over the batch of |prediction(x_t, t, prefix) - target|^2."""
        noising, device = self.model.noising, self.ranks.device
        # Addressed by sample number on the CPU, before the batch moves: reading numbers back from a GPU would wait.
        t = noising.times(batch.index, self.seed).to(device, non_blocking=True)  # [B]
        eps = noise(batch.index, self.seed, self.model.latent_shape).to(device, non_blocking=True)  # [B, c, h, w]
        batch = batch.to(device)
        x0 = self.model.vae.encode(batch.pixels)  # [B, c, h, w]
        prediction = self.engine(batch.prefix, noising.mix(x0, eps, t), t)  # [B, c, h, w]
        loss = squared_error(prediction, noising.target(x0, eps, t)).mean()
        self.engine.backward(loss)
        self.engine.step()
        return {"loss": loss.detach()}

    def counts(self) -> dict[str, int]:
        """Samples that could not be used and were replaced."""
        return {"rejected": self.loader.rejects.total()}

    def preview(self, folder: Path, step: int) -> None:
        """One sheet per call: previews/step-00000500.png."""
        if not self.previews.prompts:
            return
        with self.engine.averaged():
            if self.ranks.first:
                draw_preview(self.model, self.previews, folder / f"step-{step:08d}.png")

    def release(self, folder: Path) -> None:
        """The averaged weights as a release folder."""
        with self.engine.averaged():
            if self.ranks.first:
                save(folder, self.model)


def start(model: MetaQuery, release: Path) -> None:
    """Take the tensors of a release over into a model of the same shape. Raises ValueError when they do not fit."""
    file = release / "model.safetensors"
    tensors = read_tensors(file)
    match(tensors, model.own_tensors(), file)
    model.load_state_dict(tensors, strict=False)  # names are checked; the frozen rest came with the decoder
