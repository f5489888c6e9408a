"""How much faster and smaller the bridge's step is than the plain path: `python -m train.benchmark metaquery`.

    python -m train.benchmark metaquery --config metaquery.xlarge_sana --device cuda --precision autocast --compile

The plain path is the obvious way to train queries: as further rows of the token embeddings, which all get a gradient, and by
one pass over prefix and queries with a graph through the whole language model, nothing compiled. Ours has a parameter of its
own for the queries, reads the prefix without a graph and runs only the queries with one (decisions 1 and 2 of the design).
Everything after that is the same modules with the same optimizer. The weights are random; both paths compute the same
gradients (tests/test_mllm.py). They take turns, so that whatever else the machine does meets both.

`speed.flop_ratio` is what the matrix products alone would give, counted in both steps. What is missing from it is spent
where nothing is multiplied: norms, rotary positions, the growing cache; what is above it is memory that need not be moved.
`speed.utilisation` is the FLOP of our step against what the device's largest matrix products reach in the same run, or
against the --peak-tflops of its data sheet (an H200: 989 in bfloat16).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.metaquery import MetaQuery, blueprint
from sample.measures import Measure, show, spread
from train import stand_in
from train.compiled import compile_blocks
from train.cost import flop, kept_bytes
from train.loss import squared_error
from train.machine import check_device, matrix_rate, record, timed
from train.optim import OptimConfig, adamw
from train.parts import blank_prefix, steps
from train.plan import metaquery_of, shaped, unchecked
from train.run import parse


@dataclass(frozen=True, kw_only=True)
class Metaquery:
    """Time a MetaQuery step, whole and by part, and count the activations it keeps, against the plain path."""

    prefix_tokens: int = 256
    """Tokens before the queries."""
    batch_size: int = 8
    config: str | None = None
    """A run of configs, like metaquery.large_sana, at its full size; None: the small shapes below."""
    small: stand_in.Small = stand_in.Small()
    device: str = "cpu"
    precision: Literal["fp32", "autocast"] = "fp32"
    """autocast: bfloat16 matrix products over float32 weights."""
    compile: bool = False
    """Compile the repeated blocks of connector and decoder, as engine.compile does; in our path alone."""
    plain: bool = True
    """Measure the plain path too."""
    peak_tflops: float | None = None
    """What the device could do at best, in 10^12 FLOP per second; None: measured."""
    repeats: int = 7
    """Timed steps of each path."""
    json: Path | None = None
    """Where to write the measures."""


def metaquery(args: Metaquery) -> None:
    """Measures, prints and writes.

    Raises:
        ValueError: a size is below 1, the run is no MetaQuery run, or the device is not there.
    """
    if min(args.prefix_tokens, args.batch_size, args.repeats) < 1:
        raise ValueError("give sizes and repeats of at least 1")
    check_device(args.device)
    torch.manual_seed(0)
    model = build(args, args.device)
    counted = counts(args)
    bench = Bench(model, args)
    paths = [False, True] if args.plain else [False]
    kept = {plain: kept_bytes(partial(bench.loss, plain)) for plain in paths}
    read = {plain: kept_bytes(partial(bench.states, plain)) for plain in paths}
    if args.compile:
        compile_blocks(model)
    seconds: dict[bool, list[float]] = {plain: [] for plain in paths}
    peaks: dict[bool, int] = dict.fromkeys(paths, 0)
    for repeat in range(args.repeats + 1):
        for plain in paths:
            elapsed, peak = bench.timed_step(plain)
            if repeat:  # the first of each warms up
                seconds[plain].append(elapsed)
                peaks[plain] = max(peaks[plain], peak)
    fastest = statistics.median(seconds[False])
    rate = args.peak_tflops * 1e12 if args.peak_tflops else matrix_rate(bench.device, bench.dtype)
    measures = {
        "speed.step": spread(seconds[False], "s"),
        "speed.images": Measure(args.batch_size / fastest, n=args.repeats, unit="1/s"),
        "speed.utilisation": Measure(counted[False] / fastest / rate, n=args.repeats),
        "speed.peak_rate": Measure(rate, unit="FLOP/s"),
        "speed.flop": Measure(counted[False], unit="FLOP"),
        "speed.activations": Measure(kept[False], unit="B"),
    }
    if args.device != "cpu":
        measures["speed.peak_memory"] = Measure(peaks[False], unit="B")
    if args.plain:
        ratios = [theirs / ours for ours, theirs in zip(seconds[False], seconds[True], strict=True)]
        measures |= {
            "speed.step_ratio": spread(ratios, "x"),
            "speed.plain_step": spread(seconds[True], "s"),
            "speed.memory_saving": Measure(kept[True] / kept[False], unit="x"),
            "speed.reading.memory_saving": Measure(read[True] / read[False], unit="x"),
            "speed.plain_activations": Measure(kept[True], unit="B"),
            "speed.flop_ratio": Measure(counted[True] / counted[False], unit="x"),
        }
        if args.device != "cpu":
            measures["speed.plain_peak_memory"] = Measure(peaks[True], unit="B")
    measures |= {f"speed.part.{part}": measure for part, measure in bench.by_part().items()}
    where = f"{args.config or 'small shapes'} on {args.device}, {torch.get_num_threads()} thread(s)"
    show(f"{where}, {args.prefix_tokens} prefix tokens, batches of {args.batch_size}", measures)
    if args.json is not None:
        record(args.json, measures)


def build(args: Metaquery, device: str) -> MetaQuery:
    """The model of random weights, of the run that is named or of the small shapes; on the meta device, to count what a step
    needs, without activation checkpointing, which computes some of it again."""
    if args.config is None:
        return stand_in.build(args.small, device)
    config = shaped(metaquery_of(parse([args.config])))
    return blueprint(unchecked(config) if device == "meta" else config, device)


def counts(args: Metaquery) -> dict[bool, float]:
    """FLOP of a step on either path."""
    bench = Bench(build(args, "meta"), args, device="meta")
    return {plain: float(flop(partial(bench.loss, plain))) for plain in (False, True)}


class Bench:
    """A model, a batch of zeros, and the optimizers of both paths, which share all but that of the queries."""

    def __init__(self, model: MetaQuery, args: Metaquery, device: str | None = None) -> None:
        self.model, self.args, self.device = model, args, torch.device(device or args.device)
        if model.queries is None:
            raise ValueError(f"config {args.config!r} reads its prompt without queries, and has nothing to compare")
        if model.connector.config.looks:
            raise ValueError(f"config {args.config!r} has connector.looks, and the plain path keeps no cache; leave it off")
        embeddings: Any = model.mllm.model.get_input_embeddings()
        vectors = model.queries.vectors
        with self.device:
            self.prefix = blank_prefix(model, args.prefix_tokens, args.batch_size)
            self.pixels = torch.zeros(args.batch_size, 3, model.image_size, model.image_size)
            self.t = torch.full((args.batch_size,), 0.5)
            vocabulary = len(embeddings.weight) if args.plain else 0
            self.rows = torch.arange(vocabulary, vocabulary + len(vectors))
        known = embeddings.weight.detach()[:vocabulary].float()
        self.table = nn.Parameter(torch.cat([known, vectors.detach().to(known.device)]))  # [V + Q, D]
        shared = nn.ModuleList([model.connector, model.decoder])
        self.optimizers = (
            [] if self.device.type == "meta" else [adamw(part, OptimConfig()) for part in self._trained(shared)]
        )

    def _trained(self, shared: nn.Module) -> list[nn.Module]:
        """What both paths train; our queries; their table of embeddings."""
        assert self.model.queries is not None
        return [shared, self.model.queries, nn.ParameterList([self.table])]

    def states(self, plain: bool) -> Tensor:
        """What the MLLM makes of the queries, [B, Q, D]."""
        if plain:
            return self.model.mllm.read_full(self.prefix, F.embedding(self.rows, self.table))
        assert self.model.queries is not None
        return self.model.mllm.read(self.prefix, self.model.queries())

    def loss(self, plain: bool) -> Tensor:
        """A MetaQuery step's loss []."""
        with self.autocast():
            x0 = self.model.vae.encode(self.pixels)
            prediction = self.model.decoder(x0, self.t, self.model.connector(self.states(plain)))
        return squared_error(prediction, x0).mean()

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return torch.bfloat16 if self.args.precision == "autocast" else torch.float32

    def autocast(self) -> Any:
        """The precision that was asked for."""
        if self.args.precision == "fp32" or self.device.type == "meta":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def timed_step(self, plain: bool) -> tuple[float, int]:
        """Seconds of one optimizer step, and the most bytes that a GPU held for it (0 on a CPU)."""
        shared, ours, theirs = self.optimizers
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with torch.compiler.set_stance("force_eager" if plain else "default"):
            elapsed = self._timed(lambda: self.loss(plain).backward(), [shared, theirs if plain else ours])
        return elapsed, torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def by_part(self) -> dict[str, Measure]:
        """Seconds of each part of our step on its own, forward and (where it has one) backward."""
        with self.device:
            forwards = steps(self.model, self.args.prefix_tokens, self.args.batch_size)

        def both_ways(forward: Callable[[], Tensor]) -> None:
            with self.autocast():
                made = forward()
            if made.requires_grad:
                made.float().mean().backward()

        measured = {}
        for part, forward in forwards.items():
            seconds = [self._timed(partial(both_ways, forward), []) for _ in range(self.args.repeats + 1)]
            measured[part] = spread(seconds[1:], "s")
        self.loss(plain=False).backward()
        seconds = [self._timed(lambda: None, self.optimizers[:2], keep=True) for _ in range(self.args.repeats)]
        return measured | {"optimizer": spread(seconds, "s")}

    def _timed(self, work: Callable[[], Any], optimizers: Sequence[torch.optim.Optimizer], keep: bool = False) -> float:
        def step() -> None:
            work()
            for optimizer in optimizers:
                optimizer.step()

        elapsed = timed(step, self.device)
        if not keep:
            self.model.zero_grad()
            self.table.grad = None
        return elapsed
