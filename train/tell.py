"""Asks -> a bridge that speaks its decoder's own language: conditioning regressed on what the decoder was trained with.

A labelled SiT was told scenes as tokens, and what is asked (data/world/asks.py) gives those tokens (data/world/labels.py).
Nothing is noised and nothing drawn, so a sample costs a third of a drawn one, and what binds which colour to which shape is
the target itself rather than a small part of a diffusion loss. Where several answers are right (objects in any order, an
object at any free spot), the nearest of them is the target. `metaquery.world` goes on from the release. Letters: B batch,
Q queries, C conditioning width, K words a token, N objects, S ways to tell an object.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.dropout import drop
from data.loader import Data, Positions, World
from data.world.asks import KINDS, Mix, heard, make_ask
from data.world.labels import CHOICES, OBJECTS, absent, encode_choice, encode_wanted, nothing
from data.world.wanted import Wanted
from model.labels import Labels, load_labels
from model.metaquery import Bridge, Heard, MetaQuery, MetaQueryConfig, build
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
    mix: Mix = field(default_factory=Mix)
    """What is asked."""
    spare: float = 0.3
    """Weight of the queries beyond those that are told something: they tell of things that are not there."""
    pool: int = 0
    """So many samples are read once, and learned from over and over by the connector alone; the queries stay as they are.
    Ten times as fast where reading is slow. 0: every sample is new."""
    init: Path | None = None
    """A release whose queries and connector are the start, and whose decoder's trained parts stay as they are. None: fresh
    queries and connector, and the decoder as it was released."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    def build(self, run: Run, ranks: Ranks) -> TellTask:
        """Load the frozen parts and the labels of the decoder, and hand queries and connector to an engine."""
        if self.model.queries < TOLD:
            raise ValueError(f"task.model.queries is {self.model.queries}; a scene is told in {TOLD} tokens, give as many")
        if self.model.read != "queries":
            raise ValueError(f"task.model.read is {self.model.read}; a bridge without queries is told nothing, give queries")
        if run.data.task != "t2i":
            raise ValueError(f"data.task is {run.data.task}; a bridge is told what task.mix says, give t2i")
        others = "data.sources: asks of the generated world are told, and nothing else; give one world"
        world = only_world(run.data, others)
        model = build(self.model)
        if self.init is not None:
            start_from(model, self.init)
        model.place(ranks.device)
        labels = load_labels(self.model.decoder.path).to(ranks.device)
        size = micro_batch_size(run.schedule.batch_size, run.schedule.accumulation, ranks.world)
        rows = range(ranks.rank, size * ranks.world, ranks.world)
        asks = Asks(world, self.mix, model.mllm.builder, run.data, run.seed, rows)
        assert model.queries is not None
        if self.pool % run.schedule.batch_size:
            raise ValueError(
                f"task.pool is {self.pool}; give a multiple of schedule.batch_size {run.schedule.batch_size}, or 0"
            )
        model.queries.requires_grad_(not self.pool)
        bridge = Bridge(model.mllm, model.queries, model.connector)
        return TellTask(self, model, labels, engine_for(bridge, run, ranks), asks, ranks)


class ToldBatch(NamedTuple):
    """What is asked, or what the MLLM made of it, and what it says: of the object in row `open`, each way to tell it is
    right."""

    asked: Prefix | Heard
    words: Tensor  # [B, TOLD, K]
    places: Tensor  # [B, TOLD, 3]
    open: Tensor  # [B]
    open_words: Tensor  # [B, S, K]
    open_places: Tensor  # [B, S, 3]
    kinds: Tensor  # [B], by number in KINDS


class Asks(Positions[ToldBatch]):
    """This rank's rows of the global batches of generated asks; set `samples` to go on from there."""

    def __init__(self, world: World, mix: Mix, builder: PrefixBuilder, data: Data, seed: int, rows: range) -> None:
        super().__init__(rows, data.workers)
        self._world, self._mix, self._builder, self._data, self._seed = world, mix, builder, data, seed

    def __getitem__(self, position: int) -> ToldBatch:
        turns, told, kinds = [], [], []
        for number in self.numbers(position):
            ask = make_ask(self._world.seed, number, self._world.split, size=self._data.image_size, mix=self._mix)
            said, wanted = heard(ask, drop(number, self._seed, self._data.dropout))
            turns.append(said)
            told.append(_label(wanted))
            kinds.append(KINDS.index(ask.kind))
        words, places, *ways = (torch.from_numpy(np.stack(part)) for part in zip(*told, strict=True))
        row, open_words, open_places = ways
        return ToldBatch(self._builder(turns), words, places, row, open_words, open_places, torch.tensor(kinds))


class TellTask(BridgeTask):
    """Regresses the bridge's conditioning on the label tokens of what is asked; the decoder's part of the release is that of
    the start."""

    def __init__(
        self, config: TellTaskConfig, model: MetaQuery, labels: Labels, engine: Engine, asks: Asks, ranks: Ranks
    ) -> None:
        self.config, self.model, self.labels, self.engine = config, model, labels, engine
        self.asks, self.previews, self.ranks = asks, config.preview, ranks
        words, places = (torch.from_numpy(part) for part in absent(config.model.queries - TOLD))
        with torch.no_grad():
            self.spare = labels(words[None].to(ranks.device), places[None].to(ranks.device))  # [1, Q - TOLD, C]
        self.engines = {"main": engine}

    def batches(self, samples: int) -> Iterator[ToldBatch]:
        """This rank's share, on the CPU."""
        self.asks.samples = samples
        return iter(self.asks) if not self.config.pool else self._pooled(samples)

    def _pooled(self, samples: int) -> Iterator[ToldBatch]:
        """The pool's batches in turn, each read when it first comes."""
        bridge, known = self.engine.module, dict[int, ToldBatch]()
        assert isinstance(bridge, Bridge)
        for position in itertools.count(samples, self.asks.rows.stop):
            place = position % self.config.pool
            if place not in known:
                batch = self.asks[place]
                assert isinstance(batch.asked, Prefix)
                with torch.no_grad():
                    known[place] = batch._replace(asked=bridge.hear(batch.asked.to(self.ranks.device)).to("cpu"))
            yield known[place]

    def step(self, batch: ToldBatch) -> dict[str, Tensor]:
        """Mean square of conditioning - label tokens (which have mean square 1): of the told tokens, plus of the spare; and
        the former by kind of what is asked."""
        given = self.engine(batch.asked.to(self.ranks.device)).float()  # [B, Q, C]
        off = told_error(given[:, :TOLD], batch, self.labels)  # [B]
        loss = off.mean()
        objective = loss
        if self.spare.shape[1]:
            objective = loss + self.config.spare * (given[:, TOLD:] - self.spare).square().mean()
        self.engine.backward(objective)
        self.engine.step()
        return {"loss": loss.detach(), **self._by_kind(off.detach(), batch.kinds.to(off.device))}

    def _by_kind(self, off: Tensor, kinds: Tensor) -> dict[str, Tensor]:
        """The error of each kind that is asked: its sum over the number that is to be expected, which no batch lacks."""
        shares = {kind: share for kind in KINDS if (share := self.config.mix.share(kind)) > 0}
        return {f"off_{kind}": (off * (kinds == KINDS.index(kind))).mean() / share for kind, share in shares.items()}


def told_error(given: Tensor, batch: ToldBatch, labels: Labels) -> Tensor:
    """Mean square [B] of conditioning [B, TOLD, C] less the nearest of the label tokens that are right: objects in any
    order, and an object whose place is open told in any of its ways."""
    device = given.device
    with torch.no_grad():
        told = labels(batch.words.to(device), batch.places.to(device))  # [B, TOLD, C]
        ways = labels(batch.open_words.to(device), batch.open_places.to(device))  # [B, S, C]
        open = (batch.open.to(device) - 1)[:, None, None].expand(-1, OBJECTS, 1)  # [B, N, 1]
    ground = (given[:, 0] - told[:, 0]).square().mean(-1)  # [B]
    each = _squares(given[:, 1:], told[:, 1:])  # [B, N, N]: an object given against one told
    best = _squares(given[:, 1:], ways).amin(-1, keepdim=True)  # [B, N, 1]
    each = each.scatter(2, open, best)
    by_order = each[:, torch.arange(OBJECTS, device=device), _orders(device)].sum(-1)  # [B, N!]
    return (ground + by_order.amin(-1)) / TOLD


@lru_cache
def _orders(device: torch.device) -> Tensor:
    """Every order of the objects, [N!, N]."""
    return torch.tensor(list(permutations(range(OBJECTS))), device=device)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared differences [B, M, N] of a [B, M, C] and b [B, N, C]."""
    return (a[:, :, None] - b[:, None]).square().mean(-1)


def _label(wanted: Wanted | None) -> tuple[np.ndarray, ...]:
    """Words, places, and the row, words and places of what is open."""
    words, places = nothing() if wanted is None else encode_wanted(wanted)
    if wanted is None:
        return words, places, np.array(1), np.tile(words[1], (CHOICES, 1)), np.tile(places[1], (CHOICES, 1))
    row, *ways = encode_choice(wanted)
    return words, places, np.array(row), *ways
