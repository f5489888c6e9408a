"""How long a REPA-E step takes, by part, and against the official way to write it: `python -m train.benchmark repae`.

The official way is that of End2End-Diffusion/REPA-E: float32 weights under autocast, a perceptual loss in float32 that
looks at real pictures anew, the other networks frozen for one sum of the VAE's losses, real and false pictures through the
discriminator one after the other (and gradients to the real ones), the cosine of the alignment in a loop over samples,
torch's attention and AdamW as they come, an average of the SiT in a loop over its tensors, upsampling before convolutions,
nothing compiled. Ours is the engines' step as the run configures it; and that with half of each batch rebuilt, which is no
longer the same step. On a CPU they take turns in one process, on the same batch; a GPU could not hold them together, so
there the official way is measured first and freed.

    python -m train.benchmark repae --config repae.xl_f8d4 --random-weights --batch-size 0 --levers --compile

`speed.utilisation` is the FLOP of the official step (counted on two pictures) in our time, against the device's largest
matrix products or against --peak-tflops. `speed.lever.*` are steps with one more setting each, in their order."""

from __future__ import annotations

import copy
import gc
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import LabelledBatch, LabelledCollate
from model.attention import fused
from model.noise import noise
from model.perceptual import LPIPS, FeaturesConfig, load_perceptual
from model.upsample import merge_upsampling, split_upsampling
from sample.measures import Measure, show, spread
from train.compiled import compile_all, compile_blocks
from train.config import Run
from train.cost import flop_within
from train.loss import gaussian_kl, squared_error
from train.machine import matrix_rate, record, timed
from train.prompts import PromptsTold
from train.ranks import Ranks, start
from train.repae import POSTERIOR, Networks, RepaeTask, RepaeTaskConfig
from train.task import loader_for

FEW = 4
"""Pictures of the step from whose memory the largest batch is told."""
LEVER_REPEATS = 3
SHARE = 0.85
"""Of a GPU's memory that a batch is to fill."""


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
        config = replace(run.task, merged_upsampling=False, channels_last=False) if args.levers else run.task
        self.config, self.run, self.on_gpu = config, run, ranks.device.type == "cuda"
        with ranks.device if self.on_gpu else nullcontext():  # where random numbers are drawn in no time
            self.networks: Networks = config.networks(run, ranks)
        loader = loader_for(LabelledCollate(run.data.image_size), run, ranks)
        self.batch: LabelledBatch = next(iter(loader))
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, int] = {}

    def measures(self) -> dict[str, Measure]:
        """All, by name."""
        if self.on_gpu:
            torch.set_float32_matmul_precision("high")  # as the official script has it; for both ways alike
        apart = self.on_gpu or self.args.levers
        official = self._official(self.networks if apart else copy.deepcopy(self.networks))
        if self.on_gpu:
            self._fit(official)
        counted = self._flop(official)
        if apart:
            self._time({"official_step": official.step})
            del official
            _free(self.networks)
        ours: RepaeTask = self.config.assemble(self.networks, self.run, self.ranks)
        if self.args.levers:
            self._time_levers(ours)
        ways = {"step": ours.step}
        if not apart:
            ways["official_step"] = official.step
        if self.args.half:
            half = copy.copy(ours)
            half.config = replace(self.config, recon_fraction=0.5)
            ways["half_step"] = half.step
        self._time(ways)
        if self.args.levers:
            self._time_inexact(ours)
        for part, step in parts(ours, _taken(self.batch, self.size), self.ranks, self.args.compile).items():
            self.seconds[f"part.{part}"] = [timed(step, self.ranks.device) for _ in range(self.args.repeats + 1)][1:]
        return self._told(counted)

    def _told(self, counted: float) -> dict[str, Measure]:
        measures = {f"speed.{name}": spread(seconds, "s") for name, seconds in self.seconds.items()}
        official, n = measures["speed.official_step"].value, self.args.repeats
        for name, seconds in self.seconds.items():
            if name in ("step", "half_step") and len(self.seconds["official_step"]) == len(seconds):
                pairs = zip(seconds, self.seconds["official_step"], strict=True)
                measures[f"speed.{name}_ratio"] = spread([theirs / mine for mine, theirs in pairs], "x")
            elif name.startswith("lever."):
                measures[f"speed.{name}_ratio"] = Measure(
                    official / measures[f"speed.{name}"].value, n=len(seconds), unit="x"
                )
        rate = self.args.peak_tflops * 1e12 if self.args.peak_tflops else matrix_rate(self.ranks.device, self._dtype)
        step = measures["speed.step"].value
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

    def _official(self, networks: Networks) -> Official:
        slow = self.config.perceptual
        if isinstance(slow, FeaturesConfig):  # in float32, as LPIPS is either way
            slow = replace(slow, target=replace(slow.target, dtype="float32"))
            networks = replace(networks, distance=load_perceptual(slow, networks.targets).to(self.ranks.device))
        return Official(self.config, networks, self.run, self.ranks)

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

    def _time(self, ways: dict[str, Callable[[Any], Any]], repeats: int | None = None) -> None:
        """Seconds of each way, taking turns."""
        batch = _taken(self.batch, self.size)
        for repeat in range((repeats or self.args.repeats) + 1):
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

    def _time_levers(self, ours: RepaeTask) -> None:
        """Plain, then with what leaves the step as it is to rounding, one more at a time."""
        networks = self.networks
        torch.backends.cudnn.benchmark = False
        self._time({"lever.plain": ours.step}, repeats=LEVER_REPEATS)
        torch.backends.cudnn.benchmark = self.on_gpu
        self._time({"lever.cudnn_benchmark": ours.step}, repeats=LEVER_REPEATS)
        if not self.args.compile:
            return
        compile_blocks(networks.modules["main"])
        self._time({"lever.compile_sit": ours.step}, repeats=LEVER_REPEATS)
        networks.put_channels_last()
        self._time({"lever.channels_last": ours.step}, repeats=LEVER_REPEATS)
        compile_blocks(networks.modules["vae"])
        self._time({"lever.compile_vae": ours.step}, repeats=LEVER_REPEATS)
        networks.compile_frozen()
        if "discriminator" in networks.modules:
            compile_all(networks.modules["discriminator"])

    def _time_inexact(self, ours: RepaeTask) -> None:
        """With what is off unless a run asks for it."""
        merge_upsampling(self.networks.coder)
        self._time({"lever.merged_upsampling": ours.step}, repeats=LEVER_REPEATS)
        if isinstance(ours.distance, LPIPS):
            ours.distance.dtype = torch.bfloat16
            self._time({"lever.lpips_bf16": ours.step}, repeats=LEVER_REPEATS)

    def _flop(self, official: Official) -> float:
        """FLOP of the official step, counted on two pictures."""
        few = _taken(self.batch, min(2, self.size))
        return flop_within(lambda: official.step(few)) / len(few.index) * self.size


def _taken(batch: LabelledBatch, size: int) -> LabelledBatch:
    """So many of its pictures, over and over where it has fewer; each with noise of its own."""
    rows = [row % len(batch.index) for row in range(size)]
    labels = batch.labels[rows] if isinstance(batch.labels, Tensor) else tuple(batch.labels[row] for row in rows)
    return LabelledBatch(torch.arange(size), labels, batch.pixels[rows], None)


def _free(networks: Networks) -> None:
    """Give back what is no weight."""
    for module in networks.modules.values():
        module.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parts(task: RepaeTask, batch: LabelledBatch, ranks: Ranks, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Each network on its own: forward, and backward to weights or inputs as in the step."""
    pixels, dtype = batch.pixels.to(ranks.device), task.coder.autoencoder.dtype
    size = (len(pixels), *task.coder.latent_shape(pixels))
    latents = torch.zeros(size, device=ranks.device, requires_grad=True)
    told, t = task.config.told, torch.full((len(pixels),), 0.5, device=ranks.device)
    assert not isinstance(told, PromptsTold)
    words, places = (part.to(ranks.device) for part in told(batch, 0, len(pixels)))
    shown = pixels.clone().requires_grad_()
    half = torch.autocast(ranks.device.type, torch.bfloat16, enabled=task.engines["main"].config.precision != "fp32")

    def both(forward: Callable[[], Tensor], precision: Any = half) -> None:
        with precision:
            made = forward()
        made.float().mean().backward()

    copied = {name: copy.deepcopy(engine.module) for name, engine in task.engines.items()}  # engines would wait for a step
    if compiled:
        for module in copied.values():
            compile_all(module)
    coder: Any = copied["vae"].autoencoder
    made: dict[str, Callable[[], Any]] = {
        "encoder": lambda: both(lambda: coder.encode(pixels.to(dtype)).latent_dist.mode()),
        "decoder": lambda: both(lambda: coder.decode(latents.to(dtype)).sample),
        "sit": lambda: both(lambda: copied["main"]((words, places), latents, t, latents.detach(), True).velocity),
        "sit_to_align": lambda: both(
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


class Official:
    """The official step over the networks of a joint run."""

    def __init__(self, config: RepaeTaskConfig, networks: Networks, run: Run, ranks: Ranks) -> None:
        self.config, self.networks, self.ranks, self.seed = config, networks, ranks, run.seed
        self.modules = {name: module.to(ranks.device) for name, module in networks.modules.items()}
        split_upsampling(self.modules["vae"])
        self.average = copy.deepcopy(self.modules["main"])
        optims = {"vae": self.config.vae_optim, "discriminator": self.config.discriminator_optim}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, module in self.modules.items():
            optim = optims.get(name) or run.optim
            self.optimizers[name] = torch.optim.AdamW(module.parameters(), optim.lr, optim.betas)

    def step(self, batch: Any) -> None:
        """VAE, discriminator, SiT, each clipped and stepped by itself; the average follows."""
        with fused():
            self._step(batch)
        for kept, new in zip(self.average.parameters(), self.modules["main"].parameters(), strict=True):
            kept.data.mul_(0.9999).add_(new.data, alpha=0.0001)

    def _step(self, batch: Any) -> None:
        networks, weights, device = self.networks, self.config.losses, self.ranks.device
        judge, vae = self.modules.get("discriminator"), self.modules["vae"]
        sit: Any = self.modules["main"]
        shape = networks.coder.latent_shape(batch.pixels)
        told: Any = self.config.told
        told = tuple(part.to(device) for part in told(batch, self.seed, len(batch.index)))
        t, eps = (part.to(device) for part in (sit.noising.times(batch.index, 0), noise(batch.index, 0, shape)))
        posterior, pixels = noise(batch.index, POSTERIOR, shape).to(device), batch.pixels.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                grid = sit.sit.grid(eps)
                seen = [target(pixels, grid) for target in networks.targets]
            latents, mean, logvar, rebuilt = vae(pixels, posterior)
            self._freeze(True)
            guesses = sit(told, latents, t, eps, False, align_only=True).guesses
            off, kl = rebuilt.float() - pixels, gaussian_kl(mean, logvar).flatten(1).sum(1).mean()
            loss = weights.l1 * off.abs().mean() + weights.kl * kl + weights.align * _looped(guesses, seen)
            if networks.distance is not None:
                loss = loss + weights.perceptual * networks.distance(rebuilt.float(), pixels).mean()
            if judge is not None:
                loss = loss - weights.adversarial * judge(rebuilt).mean()
        self._update("vae", loss)
        self._freeze(False)
        with torch.autocast(device.type, torch.bfloat16):
            if judge is not None:
                real, false = judge(pixels.detach().requires_grad_(True)), judge(rebuilt.detach())
                self._update("discriminator", 0.5 * (F.relu(1 - real).mean() + F.relu(1 + false).mean()))
            predicted = sit(told, latents.detach(), t, eps, True)
            target = sit.noising.target(predicted.latents, eps, t)
            loss = squared_error(predicted.velocity, target).mean() + self.config.align * _looped(predicted.guesses, seen)
        self._update("main", loss)

    def _freeze(self, frozen: bool) -> None:
        for name in ("main", "discriminator"):
            if name in self.modules:
                self.modules[name].requires_grad_(not frozen)

    def _update(self, name: str, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules[name].parameters(), 1.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()


def _looped(guesses: Any, seen: list[Tensor]) -> Tensor:
    """The cosine of each picture's tokens, one picture after the other."""
    total = torch.zeros(())
    for guess, target in zip(guesses, seen, strict=True):
        for a, b in zip(guess, target, strict=True):
            a, b = F.normalize(a.float(), dim=-1), F.normalize(b, dim=-1)
            total = total.to(a) - (a * b).sum(-1).mean() / len(guess)
    return total / max(1, len(seen))
