"""Captions -> a bridge that speaks its decoder's own language: conditioning regressed on what the decoder was trained with.

A labelled SiT was told scenes as tokens, and a caption gives those tokens exactly (data/world/labels.py). Nothing is noised
and nothing drawn, so a sample costs a third of a drawn one, and what binds which colour to which shape is the target itself
rather than a small part of a diffusion loss. `metaquery.world` goes on from the release. Letters: B batch, Q queries,
C conditioning width, K words a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.dropout import Dropout, drop
from data.loader import Positions, World
from data.world.captions import describe
from data.world.labels import OBJECTS, absent, encode_caption, nothing
from data.world.scene import make_scene, random_for
from model.labels import Labels, load_labels
from model.metaquery import MetaQuery, MetaQueryConfig, build
from model.prefix import Prefix, PrefixBuilder
from train.engine import Engine, micro_batch_size
from train.metaquery import BridgeTask, start_from
from train.preview import PreviewConfig
from train.ranks import Ranks
from train.talk import only_world
from train.task import engine_for

if TYPE_CHECKING:
    from train.config import Run

TOLD = 1 + OBJECTS  # tokens of a label; queries beyond them tell of nothing


@dataclass(frozen=True)
class TellTaskConfig:
    """Queries and connector learn; the decoder, a labelled SiT's release, is only asked what it would have been told."""

    model: MetaQueryConfig
    spare: float = 0.3
    """Weight of the queries beyond those that are told something: they tell of things that are not there."""
    init: Path | None = None
    """A release whose queries and connector are the start. None: fresh ones."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    def build(self, run: Run, ranks: Ranks) -> TellTask:
        """Load the frozen parts and the labels of the decoder, and hand queries and connector to an engine."""
        if self.model.queries < TOLD:
            raise ValueError(f"task.model.queries is {self.model.queries}; a scene is told in {TOLD} tokens, give as many")
        if run.data.task != "t2i":
            raise ValueError(f"data.task is {run.data.task}; a bridge is told captions, give t2i")
        others = "data.sources: captions of the generated world are told, and nothing else; give one world"
        world = only_world(run.data, others)
        model = build(replace(self.model, trainable=()))
        if self.init is not None:
            start_from(model, self.init, decoder=False)
        model.place(ranks.device)
        labels = load_labels(self.model.decoder.path).to(ranks.device)
        size = micro_batch_size(run.schedule.batch_size, run.schedule.accumulation, ranks.world)
        rows = range(ranks.rank, size * ranks.world, ranks.world)
        captions = Captions(world, model.mllm.builder, run.data.dropout, run.seed, rows, run.data.workers)
        return TellTask(self, model, labels, engine_for(Teller(model), run, ranks), captions, ranks)


class ToldBatch(NamedTuple):
    """Captions to read, and what they say."""

    prefix: Prefix
    words: Tensor  # [B, TOLD, K]
    places: Tensor  # [B, TOLD, 3]


class Captions(Positions[ToldBatch]):
    """This rank's rows of the global batches of generated captions; set `samples` to go on from there."""

    def __init__(
        self, world: World, builder: PrefixBuilder, dropout: Dropout, seed: int, rows: range, workers: int = 0
    ) -> None:
        super().__init__(rows, workers)
        self._world, self._builder, self._dropout, self._seed = world, builder, dropout, seed

    def __getitem__(self, position: int) -> ToldBatch:
        prompts, told = [], []
        for number in self.numbers(position):
            scene = make_scene(self._world.seed, number, self._world.split)
            caption = describe(scene, random_for(self._world.seed, "caption", self._world.split, number))
            dropped = drop(number, self._seed, self._dropout) is not None
            prompts.append("" if dropped else caption.text)
            told.append(nothing() if dropped else encode_caption(caption))
        words, places = (torch.from_numpy(np.stack(part)) for part in zip(*told, strict=True))
        return ToldBatch(self._builder.draw(prompts), words, places)


class Teller(nn.Module):
    """The bridge without its decoder's forward."""

    def __init__(self, model: MetaQuery) -> None:
        super().__init__()
        self.model = model

    def forward(self, prefix: Prefix) -> Tensor:
        """Prefix of B rows -> conditioning [B, Q, C]."""
        return self.model.condition(prefix)


class TellTask(BridgeTask):
    """Regresses the bridge's conditioning on the label tokens of what each caption says; the release holds queries and
    connector."""

    def __init__(
        self, config: TellTaskConfig, model: MetaQuery, labels: Labels, engine: Engine, captions: Captions, ranks: Ranks
    ) -> None:
        self.config, self.model, self.labels, self.engine = config, model, labels, engine
        self.captions, self.previews, self.ranks = captions, config.preview, ranks
        words, places = (torch.from_numpy(part) for part in absent(config.model.queries - TOLD))
        with torch.no_grad():
            self.spare = labels(words[None].to(ranks.device), places[None].to(ranks.device))  # [1, Q - TOLD, C]
        self.engines = {"main": engine}

    def batches(self, samples: int) -> Iterator[ToldBatch]:
        """This rank's share, on the CPU."""
        self.captions.samples = samples
        return iter(self.captions)

    def step(self, batch: ToldBatch) -> dict[str, Tensor]:
        """Mean square of conditioning - label tokens (which have mean square 1): of the told tokens, plus of the spare."""
        device = self.ranks.device
        with torch.no_grad():
            told = self.labels(batch.words.to(device), batch.places.to(device))  # [B, TOLD, C]
        given = self.engine(batch.prefix.to(device)).float()  # [B, Q, C]
        loss = (given[:, :TOLD] - told).square().mean()
        objective = loss
        if self.spare.shape[1]:
            objective = loss + self.config.spare * (given[:, TOLD:] - self.spare).square().mean()
        self.engine.backward(objective)
        self.engine.step()
        return {"loss": loss.detach()}
