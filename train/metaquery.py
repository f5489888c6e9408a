"""Captions and pictures -> a bridge that draws: one MetaQuery step (Pan et al., 2025).

Letters: B batch, c h w latent channels, height, width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.batch import T2IBatch, TextToImageCollate
from data.latents import check_latents
from data.loader import Loader, World
from data.records import DRAWN
from data.shards import Shards
from model.connector import grown
from model.decoder import DiffusersDecoderConfig
from model.files import check_match, read_tensors
from model.metaquery import MetaQuery, MetaQueryConfig, build
from model.mllm import load
from model.noise import noise
from model.store import frozen_parts, save
from train.dense import DenseHead, load_head
from train.engine import Engine
from train.loss import squared_error
from train.preview import PreviewConfig, draw_preview
from train.ranks import Ranks
from train.task import LoaderTask, Task, check_buckets, engine_for, loader_for

if TYPE_CHECKING:
    from train.config import Run


CONNECTOR = "connector."


@dataclass(frozen=True)
class MetaQueryTaskConfig:
    """The model to train, what it starts from, and what it is asked to draw on the way."""

    model: MetaQueryConfig
    align: float = 0.0
    """Weight of the alignment: a frozen decoder told rightly what to draw knows what lies at each point, and its head says
    so (train/dense.py). Needs a world's pictures and a decoder.path with a head. 0: none, as published."""
    init: Path | None = None
    """A release whose weights are the start: a new stage on an old one. None: fresh queries and connector."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    def build(self, run: Run, ranks: Ranks) -> MetaQueryTask:
        """Load the frozen parts, make the others, and hand what trains to an engine."""
        if run.data.task not in DRAWN:
            raise ValueError(f"data.task is {run.data.task}; a MetaQuery learns from {', '.join(DRAWN)}")
        model = build(self.model, mllm=load(self.model.mllm, ranks.device))
        if run.data.image_size != model.image_size:
            raise ValueError(f"data.image_size is {run.data.image_size}, the decoder draws {model.image_size}; give that")
        for source in run.data.sources:
            if isinstance(source, Shards) and source.latents is not None:
                check_latents(Path(source.latents), model.vae, run.data.image_size)
        if self.init is not None:
            start_from(model, self.init)
        model.place(ranks.device)
        head = self._head(run)
        check_buckets(run.data, model.multiple)
        builder, data = model.mllm.builder, run.data
        self.preview.check(builder)
        collate = TextToImageCollate(builder, data.image_size, data.dropout, run.seed, data.buckets)
        loader = loader_for(collate, run, ranks, latents=True)
        return MetaQueryTask(
            self, model, head and head.to(ranks.device), engine_for(model, run, ranks), loader, run.seed, ranks
        )

    def _head(self, run: Run) -> DenseHead | None:
        if not self.align:
            return None
        if not all(isinstance(source, World) for source in run.data.sources) or run.data.task != "t2i":
            raise ValueError("task.align needs scenes: give data.sources of generated worlds alone, or set task.align to 0")
        if self.model.decoder.path is None:
            raise ValueError("task.align needs a trained decoder: give decoder.path, or set task.align to 0")
        return load_head(self.model.decoder.path)


class BridgeTask(Task):
    """A task whose one engine trains a MetaQuery or a part of it: what it draws on the way, and its release."""

    model: MetaQuery
    engine: Engine
    previews: PreviewConfig
    ranks: Ranks

    def frozen(self) -> dict[str, str]:
        """The MLLM, the VAE and what does not train of a decoder that has a home."""
        return {part: facts["sha256"] for part, facts in frozen_parts(self.model).items()}

    def preview(self, folder: Path, step: int) -> None:
        """One sheet per call: previews/step-00000500.png."""
        if self.previews.prompts:
            with self.engine.averaged():
                if self.ranks.first:
                    draw_preview(self.model, self.previews, folder / f"step-{step:08d}.png")

    def release(self, folder: Path) -> None:
        """The averaged weights as a release folder."""
        with self.engine.averages_on_host(beside=self.model.own_tensors()) as averages:
            if self.ranks.first:
                others = {name: tensor for name, tensor in self.model.own_tensors().items() if name not in averages}
                floats = {name: tensor.float() for name, tensor in others.items() if tensor.is_floating_point()}
                save(folder, self.model, floats | averages)


class MetaQueryTask(BridgeTask, LoaderTask):
    """Trains queries, connector and the configured part of the decoder; the MLLM and the VAE are only read."""

    def __init__(
        self,
        config: MetaQueryTaskConfig,
        model: MetaQuery,
        head: DenseHead | None,
        engine: Engine,
        loader: Loader,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self.config, self.model, self.head, self.engine, self.loader = config, model, head, engine, loader
        self.previews, self.seed, self.ranks = config.preview, seed, ranks
        self.engines = {"main": engine}

    def step(self, batch: T2IBatch) -> dict[str, Tensor]:
        """Mean over the batch of |prediction(x_t, t, prefix) - target|^2, and the alignment where it is asked for."""
        noising, device = self.model.noising, self.ranks.device
        # Addressed by sample number on the CPU, before the batch moves: reading numbers back from a GPU would wait.
        t = noising.times(batch.index, self.seed).to(device, non_blocking=True)  # [B]
        eps = noise(batch.index, self.seed, self._latent_shape(batch)).to(device, non_blocking=True)  # [B, c, h, w]
        batch = batch.to(device)
        x0 = self._latents(batch)  # [B, c, h, w]
        x_t, target = noising.mix(x0, eps, t), noising.target(x0, eps, t)  # [B, c, h, w] each
        if self.head is None:
            loss = squared_error(self.engine(batch.prefix, x_t, t), target).mean()
            objective, measured = loss, {"loss": loss.detach()}
        else:
            prediction, hidden = self.engine(batch.prefix, x_t, t, True)
            loss = squared_error(prediction, target).mean()
            align, accuracy = self.head.loss(self.head(hidden.float()), [scene for scene in batch.scenes if scene])
            objective = loss + self.config.align * align
            measured = {"loss": loss.detach(), "align": align.detach(), "shape_accuracy": accuracy}
        self.engine.backward(objective)
        self.engine.step()
        return measured

    def _latent_shape(self, batch: T2IBatch) -> tuple[int, ...]:
        """(c, h, w); another one in every bucket."""
        if batch.latents is not None:
            return tuple(batch.latents.shape[1:])
        assert batch.levels is not None
        return self.model.shape_of(*batch.levels.shape[-2:])

    def _latents(self, batch: T2IBatch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.float()
        return self.model.vae.encode(batch.pixels)


def start_from(model: MetaQuery, release: Path) -> None:
    """Take the tensors of a release over into a model of the same shape, in which more of the decoder may train, or none
    where it lies at decoder.path as it was trained; the connector may have further layers and look. Raises ValueError when
    they do not fit."""
    tensors = read_tensors(release / "model.safetensors")
    own = model.own_tensors()
    frozen = {name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if name not in own}
    there = {name for name in tensors.keys() & frozen.keys() if torch.equal(frozen[name], tensors[name].to(frozen[name]))}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in there}
    connector = {name.removeprefix(CONNECTOR): t for name, t in tensors.items() if name.startswith(CONNECTOR)}
    tensors |= {CONNECTOR + name: tensor for name, tensor in grown(connector, model.connector).items()}
    wanted = {name: t for name, t in own.items() if name in tensors or not name.startswith("decoder.")}
    remedy = (
        f"task.init: {release} is of a model of another shape; give this run the task.model of its config.json (queries, "
        "connector, trainable, decoder.lora), or leave task.init out"
    )
    if isinstance(model.config.decoder, DiffusersDecoderConfig):
        remedy += (
            "; to freeze or adapt a decoder that it trained, write it with sample.publish export --layout diffusers and "
            "name that folder as decoder.path"
        )
    check_match(tensors, wanted, release / "model.safetensors", remedy)
    model.load_state_dict(tensors, strict=False)  # names are checked; the frozen rest came with the decoder


def bridge_tensors(release: Path) -> dict[str, Tensor]:
    """Queries and connector of a release, without its decoder."""
    tensors = read_tensors(release / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
