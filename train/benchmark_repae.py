"""How long a REPA-E step takes, by part, and against the official way to write it: `python -m train.benchmark repae`.

The official way is `train/official_repae.py`. Ours is the engines' step as the run configures it; and that with half of each
batch rebuilt, which is no longer the same step. On a CPU they take turns in one process, on the same batch; a GPU could not
hold them together, so there the official way is measured first and freed.

    python -m train.benchmark repae --config repae.xl_f8d4 --random-weights --batch-size 0 --levers --compile

`speed.utilisation` is the FLOP of the official step (counted on two pictures) in our time, against the device's largest
matrix products or against --peak-tflops. `speed.lever.*` are steps with one more setting each, in their order."""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import LabelledBatch, LabelledCollate
from model.perceptual import LPIPS
from model.upsample import merge_upsampling
from sample.measures import Measure, show, spread
from train.compiled import compile_all, compile_blocks
from train.config import Run
from train.cost import flop_within
from train.machine import matrix_rate, record, timed
from train.official_repae import Official
from train.prompts import PromptsTold
from train.ranks import Ranks, start
from train.repae import Networks, RepaeTask, RepaeTaskConfig
from train.task import loader_for

FEW = 4
"""Pictures of the step from whose memory the largest batch is told."""
LEVER_REPEATS = 3
SHARE = 0.85
"""Of a GPU's memory that a batch is to fill."""

Step = Callable[[LabelledBatch], object]


@dataclass(frozen=True, kw_only=True)
class Repae:
    """Time a REPA-E step, whole and by part, against the official way of writing it."""

    config: str = "repae.world"
    """A joint run of configs/repae.py."""
    random_weights: bool = False
    """Make what the run would download, pictures included, of random numbers in shapes of assets/shapes."""
    batch_size: int = 32
    """0: as many pictures as the official way fits into the GPU's memory."""
    compile: bool = False
    """Compile the repeated blocks, in our step alone."""
    levers: bool = False
    """Measure our step plain first, then with one more setting after the other."""
    half: bool = True
    """Measure also the step that rebuilds half of its batch."""
    peak_tflops: float | None = None
    """What the device could do at best, in 10^12 FLOP per second; None: measured."""
    repeats: int = 7
    """Timed steps of each way."""
    json: Path | None = None
    """Where to write the measures."""


def repae(args: Repae) -> None:
    """Measures, prints and writes.

    Raises:
        ValueError: a size is below 1, or the run trains no VAE, SiT and discriminator together.
    """
    from train.random_weights import furnish
    from train.run import parse

    if args.batch_size < 0 or args.repeats < 1:
        raise ValueError("give repeats of at least 1, and a batch size of at least 1, or 0 for as many as fit")
    run = parse([args.config])
    config = run.task
    if not isinstance(config, RepaeTaskConfig) or config.sit is None or not config.train_vae:
        raise ValueError(f"config {args.config!r} trains no VAE with a SiT; give a joint run of configs/repae.py")
    if isinstance(config.told, PromptsTold):
        raise ValueError(f"config {args.config!r} is told captions, whose reading is timed by itself; give one told labels")
    ranks = start(60)
    if not args.batch_size and ranks.device.type != "cuda":
        raise ValueError("--batch-size 0 fills a GPU, and torch finds none; give a number")
    compiled = args.compile and not args.levers
    run = replace(
        run,
        schedule=replace(run.schedule, batch_size=args.batch_size or FEW, accumulation=1),
        engine=replace(run.engine, zero=min(run.engine.zero, 1), compile=compiled),
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(furnish(run, Path(folder)) if args.random_weights else run, args, ranks)
        measures = bench.measures()
    where = f"{args.config} on {ranks.device}, {torch.get_num_threads()} thread(s), batches of {bench.size}"
    show(where, measures)
    if args.json is not None:
        record(args.json, measures)


class Bench:
    """Both ways over networks of one making, and what they took: seconds, and on a GPU the most bytes held."""

    def __init__(self, run: Run, args: Repae, ranks: Ranks) -> None:
        self.args, self.ranks, self.size = args, ranks, args.batch_size
        assert isinstance(run.task, RepaeTaskConfig)
        config = replace(run.task, merged_upsampling=False, channels_last=False) if args.levers else run.task
        self.config, self.run, self.on_gpu = config, run, ranks.device.type == "cuda"
        with ranks.device if self.on_gpu else nullcontext():  # where random numbers are drawn in no time
            self.networks = config.networks(run, ranks)
        self.batch = next(iter(loader_for(LabelledCollate(run.data.image_size), run, ranks)))
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, int] = {}

    def measures(self) -> dict[str, Measure]:
        """All, by name."""
        if self.on_gpu:
            torch.set_float32_matmul_precision("high")  # as the official script has it; for both ways alike
        apart = self.on_gpu or self.args.levers  # over the same networks, one way after the other
        networks = self.networks if apart else copy.deepcopy(self.networks)
        official = Official(self.config, networks, self.run, self.ranks)
        if self.on_gpu:
            self._fit(official)
        few = _taken(self.batch, min(2, self.size))
        counted = flop_within(lambda: official.step(few)) / len(few.index) * self.size
        ways: dict[str, Step] = {"official_step": official.step}
        if apart:
            self._time(ways, self.args.repeats)
            ways = {}
            del official
            _free(self.networks)
        ours = self.config.assemble(self.networks, self.run, self.ranks)
        if self.args.levers:
            self._time_levers(self._exact_levers(), ours)
        ways["step"] = ours.step
        if self.args.half:
            half = copy.copy(ours)
            half.config = replace(self.config, recon_fraction=0.5)
            ways["half_step"] = half.step
        self._time(ways, self.args.repeats)
        if self.args.levers:
            self._time_levers(self._inexact_levers(ours), ours)
        for part, step in parts(ours, _taken(self.batch, self.size), self.ranks, self.args.compile).items():
            self.seconds[f"part.{part}"] = [timed(step, self.ranks.device) for _ in range(self.args.repeats + 1)][1:]
        return self._told(counted)

    def _told(self, counted: float) -> dict[str, Measure]:
        """What was timed, and what follows from it and the FLOP of a step."""
        measures = {f"speed.{name}": spread(seconds, "s") for name, seconds in self.seconds.items()}
        n, step, official = self.args.repeats, measures["speed.step"].value, measures["speed.official_step"].value
        for name, seconds in self.seconds.items():
            if name in ("step", "half_step"):
                pairs = zip(seconds, self.seconds["official_step"], strict=True)
                measures[f"speed.{name}_ratio"] = spread([theirs / mine for mine, theirs in pairs], "x")
            elif name.startswith("lever."):
                ratio = official / measures[f"speed.{name}"].value
                measures[f"speed.{name}_ratio"] = Measure(ratio, n=len(seconds), unit="x")
        rate = self.args.peak_tflops * 1e12 if self.args.peak_tflops else matrix_rate(self.ranks.device, self._dtype)
        measures |= {
            "speed.batch_size": Measure(self.size),
            "speed.images": Measure(self.size / step, n=n, unit="1/s"),
            "speed.official_images": Measure(self.size / official, n=n, unit="1/s"),
            "speed.flop": Measure(counted, unit="FLOP"),
            "speed.peak_rate": Measure(rate, unit="FLOP/s"),
            "speed.utilisation": Measure(counted / step / rate, n=n),
        }
        return measures | {f"speed.memory.{name}": Measure(held, unit="B") for name, held in self.memory.items() if held}

    @property
    def _dtype(self) -> torch.dtype:
        """Of our matrix products."""
        return torch.float32 if self.run.engine.precision == "fp32" else torch.bfloat16

    def _fit(self, official: Official) -> None:
        """The batch that was asked for, or as many pictures as the official way has memory for; fewer where even those do
        not fit."""
        if not self.size:
            for _ in range(2):  # the first makes the optimizers' state
                self._time_one(lambda: official.step(_taken(self.batch, FEW)))
            kept = torch.cuda.memory_allocated()
            each = (torch.cuda.max_memory_allocated() - kept) / FEW
            self.size = max(FEW, int((SHARE * torch.cuda.mem_get_info()[1] - kept) / each) // 8 * 8)
        while True:
            try:
                self._time_one(lambda: official.step(_taken(self.batch, self.size)))
                return
            except torch.OutOfMemoryError:
                if self.size <= FEW:
                    raise
                self.size = max(FEW, self.size - max(8, self.size // 4 // 8 * 8))
            _free(self.networks)

    def _time(self, ways: dict[str, Step], repeats: int) -> None:
        """Seconds of each way, taking turns."""
        batch = _taken(self.batch, self.size)
        for repeat in range(repeats + 1):
            for way, step in ways.items():
                elapsed, held = self._time_one(partial(step, batch))
                if repeat:  # the first of each warms up
                    self.seconds.setdefault(way, []).append(elapsed)
                    self.memory[way] = max(self.memory.get(way, 0), held)  # 0 on a CPU
        for way in ways:
            print(f"{way}: {statistics.median(self.seconds[way]):.4g} s", file=sys.stderr, flush=True)

    def _time_one(self, step: Callable[[], Any]) -> tuple[float, int]:
        """Seconds, and the most bytes that a GPU held (0 on a CPU)."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elapsed = timed(step, self.ranks.device)
        return elapsed, torch.cuda.max_memory_allocated() if self.on_gpu else 0

    def _time_levers(self, levers: Iterator[str], ours: RepaeTask) -> None:
        """Our step after each lever, with those before it."""
        for lever in levers:
            self._time({f"lever.{lever}": ours.step}, LEVER_REPEATS)

    def _exact_levers(self) -> Iterator[str]:
        """Nothing, then what leaves the step as it is to rounding, each set as its name comes."""
        networks = self.networks
        torch.backends.cudnn.benchmark = False
        yield "plain"
        torch.backends.cudnn.benchmark = self.on_gpu
        yield "cudnn_benchmark"
        if not self.args.compile:
            return
        compile_blocks(networks.modules["main"])
        yield "compile_sit"
        networks.put_channels_last()
        yield "channels_last"
        compile_blocks(networks.modules["vae"])
        yield "compile_vae"
        networks.compile_frozen()  # with the discriminator, this is the whole step
        if "discriminator" in networks.modules:
            compile_all(networks.modules["discriminator"])

    def _inexact_levers(self, ours: RepaeTask) -> Iterator[str]:
        """What is off unless a run asks for it."""
        merge_upsampling(self.networks.coder)
        yield "merged_upsampling"
        if isinstance(ours.distance, LPIPS):
            ours.distance.dtype = torch.bfloat16
            yield "lpips_bf16"


def _taken(batch: LabelledBatch, size: int) -> LabelledBatch:
    """So many of its pictures, over and over where it has fewer; each with noise of its own."""
    rows = [row % len(batch.index) for row in range(size)]
    labels = batch.labels[rows] if isinstance(batch.labels, Tensor) else tuple(batch.labels[row] for row in rows)
    return LabelledBatch(torch.arange(size), labels, batch.levels[rows], None)


def _free(networks: Networks) -> None:
    """Give back what is no weight."""
    for module in networks.modules.values():
        module.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parts(task: RepaeTask, batch: LabelledBatch, ranks: Ranks, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Each network on its own: forward, and backward to weights or inputs as in the step."""
    pixels, dtype = batch.to(ranks.device).pixels, task.coder.autoencoder.dtype
    size = (len(pixels), *task.coder.latent_shape(pixels))
    latents = torch.zeros(size, device=ranks.device, requires_grad=True)
    told, t = task.config.told, torch.full((len(pixels),), 0.5, device=ranks.device)
    assert not isinstance(told, PromptsTold)
    words, places = (part.to(ranks.device) for part in told(batch, 0, len(pixels)))
    shown = pixels.clone().requires_grad_()
    half = torch.autocast(ranks.device.type, torch.bfloat16, enabled=task.engines["main"].config.precision != "fp32")

    def both(forward: Callable[[], Tensor], precision: Any = half) -> None:
        with precision:
            out = forward()
        out.float().mean().backward()

    def to_latents(forward: Callable[[], Tensor]) -> None:
        copied["main"].requires_grad_(False)
        with half:
            out = forward()
        torch.autograd.grad(out.float().mean(), latents)
        copied["main"].requires_grad_(True)

    copied = {name: copy.deepcopy(engine.module) for name, engine in task.engines.items()}  # engines would wait for a step
    for module in copied.values():
        vars(module).pop("forward", None)  # the engine's, which is bound to its own module
    if compiled:
        for module in copied.values():
            compile_all(module)
    coder: Any = copied["vae"].autoencoder
    made: dict[str, Callable[[], Any]] = {
        "encoder": lambda: both(lambda: coder.encode(pixels.to(dtype)).latent_dist.mode()),
        "decoder": lambda: both(lambda: coder.decode(latents.to(dtype)).sample),
        "sit": lambda: both(lambda: copied["main"]((words, places), latents, t, latents.detach(), True).velocity),
        "sit_to_align": lambda: to_latents(
            lambda: copied["main"]((words, places), latents, t, latents.detach(), False, align_only=True).guesses[0]
        ),
    }
    if "discriminator" in copied:
        made["discriminator"] = lambda: both(lambda: copied["discriminator"](torch.cat([shown, pixels])))
    if task.distance is not None:
        distance = task.distance
        made["perceptual"] = lambda: both(lambda: distance(shown, pixels), nullcontext())
    if task.targets:
        grid = task.sit.sit.grid(latents)
        made["target"] = lambda: [target(pixels, grid) for target in task.targets]
    return made
