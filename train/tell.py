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
from hashlib import sha256
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.dropout import drop
from data.loader import Data, Positions, World
from data.world.asks import KINDS, Mix, make_ask, without_dropped
from data.world.labels import (
    CHOICES,
    GROUNDS,
    KINDS_OF_WORDS,
    NONE,
    OBJECTS,
    WORDS,
    absent,
    encode_choice,
    encode_wanted,
    nothing,
)
from data.world.wanted import Wanted, laid_out
from model.assets import fingerprint
from model.labels import UNKNOWN, Labels, load_labels
from model.metaquery import Bridge, Heard, MetaQuery, MetaQueryConfig, build
from model.prefix import Prefix, PrefixBuilder
from train.engine import Engine, micro_batch_size
from train.metaquery import BridgeTask, start_from
from train.preview import PreviewConfig
from train.ranks import Ranks
from train.talk import only_world
from train.task import engine_for, refuse_shapes

if TYPE_CHECKING:
    from train.config import Run

TOLD = 1 + OBJECTS  # tokens of a label; queries beyond them tell of nothing
PLACE_DIRECTIONS = 2  # of a reading, its last: x and y


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
    Several times as fast where reading is slow. 0: every sample is new."""
    passes: int = 0
    """How often a pool is learned from before another is read in its place. 0: the first one stays."""
    legible: float = 0.0
    """Weight of what a linear reading of a token says: its words and place. Tokens of far places differ hardly more than
    those of near ones, so that by the mean square alone a thing that is to be moved stays where it was."""
    layout: bool = False
    """Several things whose places words leave open are told a layout (`laid_out`) in place of "anywhere": a decoder draws it
    right more often, and a bridge is slower to learn it."""
    ground: float = 1.0
    """Weight of the background's token, beside 1 of each object's. A caption's few words of it were not learned at 1."""
    init: Path | None = None
    """A release whose queries and connector are the start, and whose decoder's trained parts stay as they are. None: fresh
    queries and connector, and the decoder as it was released."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    def __post_init__(self) -> None:
        if self.pool < 0:
            raise ValueError(f"task.pool is {self.pool}; give 0 (every sample is new) or a multiple of the batch size")
        if self.passes < 0 or (self.passes and not self.pool):
            raise ValueError(f"task.passes is {self.passes}; give 0 or more, and a task.pool to pass over")

    def build(self, run: Run, ranks: Ranks) -> TellTask:
        """Load the frozen parts and the labels of the decoder, and hand queries and connector to an engine."""
        if self.model.queries < TOLD:
            raise ValueError(f"task.model.queries is {self.model.queries}; a scene is told in {TOLD} tokens, give as many")
        if self.model.read != "queries":
            raise ValueError(f"task.model.read is {self.model.read}; a bridge without queries is told nothing, give queries")
        if run.data.task != "t2i":
            raise ValueError(f"data.task is {run.data.task}; a bridge is told what task.mix says, give t2i")
        refuse_shapes(run.data)
        others = "data.sources: asks of the generated world are told, and nothing else; give one world"
        world = only_world(run.data, others)
        model = build(self.model)
        if self.init is not None:
            start_from(model, self.init)
        model.place(ranks.device)
        labels = load_labels(self.model.decoder.path).to(ranks.device)
        size = micro_batch_size(run.schedule.batch_size, run.schedule.accumulation, ranks.world)
        rows = range(ranks.rank, size * ranks.world, ranks.world)
        self.preview.check(model.mllm.builder)
        asks = Asks(world, self.mix, model.mllm.builder, run.data, run.seed, rows, self.layout)
        assert model.queries is not None
        if self.pool % run.schedule.batch_size:
            raise ValueError(
                f"task.pool is {self.pool}; give a multiple of schedule.batch_size {run.schedule.batch_size}, or 0"
            )
        model.queries.requires_grad_(self.model.learned_queries and not self.pool)
        bridge = Bridge(model.mllm, model.queries, model.connector)
        rest = own_rest(model, bridge) if ranks.first else ""  # before an engine rounds or parts anything
        return TellTask(self, model, labels, engine_for(bridge, run, ranks), asks, rest, ranks)


class ToldBatch(NamedTuple):
    """What is asked, or what the MLLM made of it, and what it says: of the object in row `open_row`, each way to tell it is
    right."""

    asked: Prefix | Heard
    words: Tensor  # [B, TOLD, K]
    places: Tensor  # [B, TOLD, 3]
    open_row: Tensor  # [B]
    open_words: Tensor  # [B, S, K]
    open_places: Tensor  # [B, S, 3]
    kinds: Tensor  # [B], by number in KINDS


class Asks(Positions[ToldBatch]):
    """This rank's rows of the global batches of generated asks; set `samples` to go on from there."""

    def __init__(
        self, world: World, mix: Mix, builder: PrefixBuilder, data: Data, seed: int, rows: range, layout: bool = False
    ) -> None:
        super().__init__(rows, data.workers)
        self._world, self._mix, self._builder, self._data, self._seed = world, mix, builder, data, seed
        self._layout = layout

    def fingerprint(self) -> str:
        """sha256 of what decides what a number asks."""
        asked = self._world, self._mix, self._data.image_size, self._data.dropout, self._seed, self._layout
        return sha256(repr(asked).encode()).hexdigest()

    def __getitem__(self, position: int) -> ToldBatch:
        turns, told, kinds = [], [], []
        for number in self.numbers(position):
            ask = make_ask(self._world.seed, number, self._world.split, size=self._data.image_size, mix=self._mix)
            said, wanted = without_dropped(ask, drop(number, self._seed, self._data.dropout))
            turns.append(said)
            told.append(_label(laid_out(wanted) if self._layout and wanted is not None else wanted))
            kinds.append(KINDS.index(ask.kind))
        words, places, *ways = (torch.from_numpy(np.stack(part)) for part in zip(*told, strict=True))
        row, open_words, open_places = ways
        return ToldBatch(self._builder(turns), words, places, row, open_words, open_places, torch.tensor(kinds))


class TellTask(BridgeTask):
    """Regresses the bridge's conditioning on the label tokens of what is asked; the decoder's part of the release is that of
    the start."""

    def __init__(
        self,
        config: TellTaskConfig,
        model: MetaQuery,
        labels: Labels,
        engine: Engine,
        asks: Asks,
        rest: str,
        ranks: Ranks,
    ) -> None:
        self.config, self.model, self.labels, self.engine = config, model, labels, engine
        self.asks, self.previews, self.rest, self.ranks = asks, config.preview, rest, ranks
        words, places = (torch.from_numpy(part) for part in absent(config.model.queries - TOLD))
        with torch.no_grad():
            self.spare = labels(words[None].to(ranks.device), places[None].to(ranks.device))  # [1, Q - TOLD, C]
            self.reading = config.legible**0.5 * reading_of(self.labels) if config.legible else None
        self.engines = {"main": engine}

    def frozen(self) -> dict[str, str]:
        """What a bridge reads, and what is of the start in a release: the queries, where they stay, and a decoder's part."""
        return {**super().frozen(), "start (task.init)": self.rest}

    def reads(self) -> dict[str, str]:
        """What is asked, in which order."""
        return {"data": self.asks.fingerprint()}

    def batches(self, samples: int) -> Iterator[ToldBatch]:
        """This rank's share, on the CPU."""
        self.asks.samples = samples
        return iter(self.asks) if not self.config.pool else self._pooled(samples)

    def _pooled(self, samples: int) -> Iterator[ToldBatch]:
        """The pool's batches in turn, each read when it first comes."""
        bridge, pool, passes = self.engine.module, self.config.pool, self.config.passes
        assert isinstance(bridge, Bridge)
        pooled: dict[int, ToldBatch] = {}
        first, start, asks = -1, -1, iter(())
        for position in itertools.count(samples, self.asks.rows.stop):
            begins = position // (pool * passes) * pool if passes else 0  # the address of the pool's first sample
            if begins != first:
                pooled.clear()
                first = begins
            address = begins + position % pool
            if address not in pooled:
                if address != start:  # the first one, or those that a resumed run has skipped
                    self.asks.samples, start = address, address
                    asks = iter(self.asks)
                batch = next(asks)
                start += self.asks.rows.stop
                assert isinstance(batch.asked, Prefix)
                with torch.no_grad():
                    pooled[address] = batch._replace(asked=bridge.hear(batch.asked.to(self.ranks.device)).to("cpu"))
            yield pooled[address]

    def step(self, batch: ToldBatch) -> dict[str, Tensor]:
        """Mean square of conditioning - label tokens (which have mean square 1): of the told tokens, plus of the spare; and
        the former by kind of what is asked."""
        given = self.engine(batch.asked.to(self.ranks.device)).float()  # [B, Q, C]
        off, felt = told_errors(given[:, :TOLD], batch, self.labels, self.reading, self.config.ground)  # [B] each
        objective = felt.mean()
        if self.spare.shape[1]:
            objective = objective + self.config.spare * (given[:, TOLD:] - self.spare).square().mean()
        self.engine.backward(objective)
        self.engine.step()
        return {
            "loss": off.mean().detach(),
            "felt": felt.mean().detach(),
            **self._by_kind(off.detach(), batch.kinds.to(off.device)),
        }

    def _by_kind(self, off: Tensor, kinds: Tensor) -> dict[str, Tensor]:
        """The error of each kind that is asked: its sum over the number that is to be expected, which no batch lacks."""
        shares = {kind: share for kind in KINDS if (share := self.config.mix.share(kind)) > 0}
        return {f"off_{kind}": (off * (kinds == KINDS.index(kind))).mean() / share for kind, share in shares.items()}


def own_rest(model: MetaQuery, bridge: Bridge) -> str:
    """sha256 over what a release of `model` holds and `bridge` does not train."""
    trained = {id(parameter) for parameter in bridge.parameters() if parameter.requires_grad}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in trained}
    return fingerprint({name: tensor for name, tensor in model.own_tensors().items() if name not in names})


def told_errors(
    given: Tensor, batch: ToldBatch, labels: Labels, reading: Tensor | None = None, weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean square [B] of conditioning [B, TOLD, C] less the nearest of the label tokens that are right: objects in any
    order, and an object whose place is open told in any of its ways. And the same plus the squares of what `reading` [C, R]
    makes of the errors, that of the background times `weight`. Both in the order of objects that suits the latter best,
    places counting less: what moves stays the same thing."""
    device = given.device
    with torch.no_grad():
        told = labels(batch.words.to(device), batch.places.to(device))  # [B, TOLD, C]
        ways = labels(batch.open_words.to(device), batch.open_places.to(device))  # [B, S, C]
        right = torch.cat([told, ways], 1)  # [B, TOLD + S, C]
        open_row = (batch.open_row.to(device) - 1)[:, None, None].expand(-1, OBJECTS, 1)  # [B, N, 1]

    def read_off(reader: Tensor) -> Tensor:
        return _squares(given @ reader, right @ reader) * reader.shape[1]  # [B, TOLD, TOLD + S]

    off = felt = _squares(given, right)
    sorting = off.detach()
    if reading is not None:
        felt = off + read_off(reading)
        with torch.no_grad():
            sorting = sorting + read_off(reading * _sorting(reading))
    nearest = felt[:, 1:, TOLD:].detach().argmin(-1, keepdim=True)  # [B, N, 1]

    def objects(squares: Tensor) -> Tensor:
        """[B, N, N], the open one told in the way that is nearest."""
        return squares[:, 1:, 1:TOLD].scatter(2, open_row, squares[:, 1:, TOLD:].gather(2, nearest))

    orders, rows = _orders(device), torch.arange(OBJECTS, device=device)  # [N!, N], [N]
    order = orders[objects(sorting)[:, rows, orders].sum(-1).argmin(-1)].unsqueeze(-1)  # [B, N, 1]
    things_off, things_felt = (objects(squares).gather(2, order).sum((1, 2)) for squares in (off, felt))  # [B] each
    return (off[:, 0, 0] + things_off) / TOLD, (weight * felt[:, 0, 0] + things_felt) / TOLD


def _sorting(reading: Tensor) -> Tensor:
    """How much each direction of a reading counts in choosing the order of objects: squares of places a quarter."""
    counts = torch.ones(reading.shape[1], device=reading.device)
    counts[-PLACE_DIRECTIONS:] = 0.5
    return counts


def reading_of(labels: Labels, samples: int = 1 << 14, seed: int = 0) -> Tensor:
    """The linear map [C, R] that reads words and place off a label token best, by ridge regression over random tokens. Its
    squares: 4 for a place at the other end of the picture, 0.5 for a wrong word."""
    rng = np.random.default_rng(seed)
    words = np.stack([rng.choice([UNKNOWN, *kind], samples) for kind in KINDS_OF_WORDS], axis=1)
    spread = rng.random(samples) * (rng.random(samples) < 0.3)
    places = np.stack([rng.random(samples), rng.random(samples), spread], axis=1).astype(np.float32)
    others = rng.random(samples) < 0.3  # backgrounds, told or not, and things that are not there
    words[others], places[others] = absent(others.sum())
    words[others, 0] = rng.choice([UNKNOWN, NONE, *GROUNDS], others.sum())
    with torch.no_grad():
        tokens = labels(*(torch.from_numpy(part)[None].to(labels.speed.device) for part in (words, places)))[0]
    said = np.zeros((samples, len(WORDS)))
    for column in words.T:
        said[np.arange(samples), column] = 0.25**0.5
    known = torch.from_numpy(np.concatenate([said, 2 * places[:, :PLACE_DIRECTIONS]], axis=1))  # [N, R]
    tokens = tokens.double().cpu()
    tokens, known = tokens - tokens.mean(0), known - known.mean(0)
    ridge = 1e-3 * samples * torch.eye(tokens.shape[1])  # nor is anything read off directions that no token takes
    return torch.linalg.solve(tokens.T @ tokens + ridge, tokens.T @ known).to(labels.speed)


@lru_cache
def _orders(device: torch.device) -> Tensor:
    """Every order of the objects, [N!, N]."""
    return torch.tensor(list(permutations(range(OBJECTS))), device=device)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared differences [B, M, N] of a [B, M, C] and b [B, N, C], by one product instead of M N differences."""
    products = a @ b.transpose(1, 2) / a.shape[-1]
    return (a.square().mean(-1)[:, :, None] + b.square().mean(-1)[:, None] - 2 * products).clamp(min=0)


def _label(wanted: Wanted | None) -> tuple[np.ndarray, ...]:
    """Words, places, and the row, words and places of what is open."""
    if wanted is None:
        words, places = nothing()
        return words, places, np.array(1), np.tile(words[1], (CHOICES, 1)), np.tile(places[1], (CHOICES, 1))
    row, *ways = encode_choice(wanted)
    return *encode_wanted(wanted), np.array(row), *ways
