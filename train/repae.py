"""Pictures and labels or captions -> a VAE and a diffusion transformer, trained together: a REPA-E step (Leng et al. 2025).

The VAE learns to rebuild, to deceive a discriminator, and to have latents from which the transformer's early layers can tell
what a frozen vision encoder sees; the diffusion loss itself never reaches it. Each of the three networks has an engine of
its own. What another network adds to the VAE's loss is a gradient with respect to what the VAE put out, taken beside the
engines and handed to the VAE's own backward pass: no engine ever sees a gradient that is not its own.

REPA with a frozen VAE, its vanilla baseline, an autoencoder alone and the naive control are settings of the same step (see
configs/repae.py). Letters: B batch, R pictures that are decoded, c h w latent channels, height, width, N tokens, E width of
an encoder's features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from data.batch import LabelledBatch, LabelledCollate, T2IBatch, TextToImageCollate
from data.latents import check_latents
from data.loader import Loader
from data.shards import Shards
from data.told import ClassesTold, ScenesTold, Told
from data.transforms import unit
from model.alignment import ProjectorConfig, alignment, build_projector
from model.assets import fingerprint, tensors_of
from model.autoencoder import Autoencoder, Coded
from model.channels_last import channels_last
from model.discriminator import Discriminator, DiscriminatorConfig
from model.labels import Labels
from model.latent_norm import LatentNorm
from model.metaquery import Bridge
from model.noise import FlowConfig, Noising, build_noising, noise
from model.perceptual import LPIPS, FeatureDistance, Perceptual, PerceptualConfig, load_perceptual
from model.sit import SiT, SiTConfig
from model.targets import Grid, Target, TargetConfig, load_target
from model.upsample import merge_upsampling
from model.vae import LatentVAE, VAEConfig, load_vae
from train.compiled import compile_blocks, compile_whole
from train.ema import decay
from train.engine import Engine
from train.labelled import start_from
from train.loss import gaussian_kl, hinge, squared_error
from train.optim import OptimConfig
from train.prompts import PromptsTold
from train.ranks import Ranks
from train.task import LoaderTask, check_buckets, engine_for, loader_for

if TYPE_CHECKING:
    from train.config import Run

POSTERIOR = 1  # added to the seed for the noise of the posterior, which is not that of the diffusion


@dataclass(frozen=True)
class VAELosses:
    """What the VAE learns from, each with its weight; 0 leaves it out. The defaults are the published ones."""

    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 1.0
    kl: float = 1e-6
    """Of the divergence summed over a picture's latents."""
    adversarial: float = 0.1
    align: float = 1.5
    """Of the alignment of the transformer's hidden layer, through its latents alone."""
    diffusion: float = 0.0
    """The naive control: of the diffusion loss through the latents, which REPA-E shows to make them trivial."""


@dataclass(frozen=True)
class RepaeTaskConfig:
    """A VAE and a SiT; which of them train, on what."""

    vae: VAEConfig
    """What the VAE starts from, or stays."""
    sit: SiTConfig | None
    """None: the VAE alone."""
    told: Told | PromptsTold = field(default_factory=ScenesTold)
    """What the SiT is told of each picture: its scene, its class, or what a frozen MLLM reads in its caption."""
    noise: FlowConfig = field(default_factory=FlowConfig)
    train_vae: bool = True
    fresh_vae: bool = False
    """Start with random weights in the shape of `vae`."""
    losses: VAELosses = field(default_factory=VAELosses)
    perceptual: PerceptualConfig | None = None
    discriminator: DiscriminatorConfig | None = None
    targets: tuple[TargetConfig, ...] = ()
    """Frozen encoders to align with; none: no alignment."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    align: float = 0.5
    """Weight of the alignment against the diffusion loss, for the SiT and the projectors."""
    align_until: int = 0
    """The step after which nothing is aligned any more (HASTE; Wang et al. 2025); 0: always."""
    freeze_vae_after: int = 0
    """The step after which the VAE stays as it is and the SiT goes on; 0: never."""
    recon_fraction: float = 1.0
    """Share of each batch that is decoded and compared; the rest trains the encoder by its alignment alone."""
    merged_upsampling: bool | None = None
    """Upsampling and the convolution after it as one (model/upsample.py); None: on a CPU, where it is twice as fast."""
    channels_last: bool = False
    """Convolutions in the order that a GPU's tensor cores read. Beside norms that are not compiled it costs more than it
    gains: on an H200 a step took 1.07 s for 0.89 (docs/performance.md)."""
    flip: bool = False
    """Mirror half of the pictures, chosen by sample number; for labels without places."""
    init: Path | None = None
    """The SiT that an earlier labelled run released, to go on from; projectors start afresh. None: fresh weights."""
    vae_optim: OptimConfig | None = None
    """None: the run's own."""
    discriminator_optim: OptimConfig | None = None

    def __post_init__(self) -> None:
        losses = self.losses
        if self.train_vae and losses.perceptual and self.perceptual is None:
            raise ValueError("task.losses.perceptual needs a network: give task.perceptual, or set the weight to 0")
        if self.train_vae and losses.adversarial and self.discriminator is None:
            raise ValueError("task.losses.adversarial needs task.discriminator; give one, or set the weight to 0")
        if self.targets and (self.sit is None or not self.sit.align_depth):
            raise ValueError("task.targets need a block to look after; give task.sit.align_depth, or no targets")
        if self.sit is None and not self.train_vae:
            raise ValueError("task.sit is None and task.train_vae is off: nothing is left to train")
        if self.fresh_vae and not self.train_vae:
            raise ValueError("task.fresh_vae gives weights that nothing would train; set task.train_vae, or leave it out")
        if self.sit is None and self.init is not None:
            raise ValueError("task.init is a SiT to go on from, and task.sit is None; leave one of them out")
        for name in ("align_until", "freeze_vae_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"task.{name} is {getattr(self, name)}; give a step, or 0 for none")
        if not 0 < self.recon_fraction <= 1:
            raise ValueError(f"task.recon_fraction is {self.recon_fraction}; give a share above 0, up to 1")
        if self.flip and not isinstance(self.told, ClassesTold):
            raise ValueError("task.flip would contradict the places that scenes and captions tell; set it to False")

    def build(self, run: Run, ranks: Ranks) -> RepaeTask:
        """Load what is frozen, make the rest, and hand each network that trains to an engine."""
        return self.assemble(self.networks(run, ranks), run, ranks)

    def networks(self, run: Run, ranks: Ranks) -> Networks:
        """Load what is frozen and make the rest; what trains is still on the CPU."""
        wanted = "t2i" if isinstance(self.told, PromptsTold) else "labelled"
        if run.data.task != wanted:
            raise ValueError(f"data.task is {run.data.task}, and what task.told tells is in samples of {wanted}; give that")
        vae = load_vae(self.vae, weights=not self.fresh_vae)
        coder = Autoencoder(vae.autoencoder)
        on_cpu = ranks.device.type == "cpu"
        if self.train_vae and (on_cpu if self.merged_upsampling is None else self.merged_upsampling):
            merge_upsampling(coder)
        self._check(coder, run.data.image_size, ranks)
        check_buckets(run.data, coder.factor * (1 if self.sit is None else self.sit.patch))
        for source in run.data.sources:
            if isinstance(source, Shards) and source.latents is not None:
                if self.train_vae or self.flip or wanted == "t2i":
                    raise ValueError(
                        "data.sources latents serve a VAE that stays, and labelled pictures as they are; leave them out"
                    )
                check_latents(Path(source.latents), vae, run.data.image_size)
        targets = [load_target(target).to(ranks.device) for target in self.targets]
        modules: dict[str, nn.Module] = {}
        if self.sit is not None:
            teller = self._teller(self.sit, ranks)
            modules["main"] = main = AlignedSiT(self.sit, teller, self.noise, self.projector, targets, vae.statistics)
            if self.init is not None:
                start_from(self.init, main.sit, teller if isinstance(teller, Labels) else None)
        if self.train_vae:
            modules["vae"] = coder.requires_grad_(True).eval()  # in training, diffusers' blocks copy their shortcuts' inputs
            if self.discriminator is not None and self.losses.adversarial:
                modules["discriminator"] = Discriminator(self.discriminator)
        distance = None
        if self.train_vae and self.perceptual is not None and self.losses.perceptual:
            distance = load_perceptual(self.perceptual, targets).to(ranks.device)
        return Networks(coder, vae.to(ranks.device), targets, modules, distance)

    def assemble(self, networks: Networks, run: Run, ranks: Ranks) -> RepaeTask:
        """Hand each network that trains to an engine, fast for its device."""
        coder, modules, distance = networks.coder, networks.modules, networks.distance
        if self.channels_last:
            networks.put_channels_last()
        if run.engine.compile:
            networks.compile_frozen()
        optims = {"vae": self.vae_optim, "discriminator": self.discriminator_optim}
        guard = replace(run.engine.guard, spike=0)  # of one that wins the loss is near 0, and any other a spike
        runs = {"discriminator": replace(run, engine=replace(run.engine, guard=guard))}
        engines = {
            name: engine_for(module, runs.get(name, run), ranks, optims.get(name)) for name, module in modules.items()
        }
        loader = loader_for(self._collate(modules.get("main"), run), run, ranks, latents=True)
        return RepaeTask(self, engines, coder, networks.vae, networks.targets, distance, loader, run, ranks)

    def _teller(self, sit: SiTConfig, ranks: Ranks) -> Labels | Bridge:
        if isinstance(self.told, ScenesTold):
            sit.check_tokens(self.told.tokens, "task.told.spare")
        if not isinstance(self.told, PromptsTold):
            return Labels(self.told.labels(sit.condition_width))
        sit.check_tokens(self.told.queries, "task.told.queries")
        return self.told.build(sit.condition_width, ranks.device)

    def _collate(self, main: nn.Module | None, run: Run) -> LabelledCollate | TextToImageCollate:
        data = run.data
        if isinstance(main, AlignedSiT) and isinstance(main.teller, Bridge):
            return TextToImageCollate(main.teller.mllm.builder, data.image_size, data.dropout, run.seed, data.buckets)
        return LabelledCollate(data.image_size, self.flip, run.seed, data.buckets)

    def _check(self, coder: Autoencoder, image_size: int, ranks: Ranks) -> None:
        """ValueError where the parts do not fit each other or the machine."""
        side, sit = image_size / coder.factor, self.sit
        if image_size % coder.factor:
            raise ValueError(f"data.image_size is {image_size}; give a multiple of {coder.factor}")
        if sit is not None and (sit.latent_channels, sit.latent_size) != (coder.latent_channels, side):
            raise ValueError(
                f"task.sit draws latents of {sit.latent_channels} x {sit.latent_size} x {sit.latent_size}, and task.vae "
                f"{self.vae.path!r} makes {coder.latent_channels} x {side:g} x {side:g} of data.image_size {image_size}; "
                "change one of them"
            )
        if self.train_vae and self.losses.kl and not coder.gaussian:
            raise ValueError(f"task.losses.kl: task.vae {self.vae.path!r} has no posterior to hold; set the weight to 0")
        if self.discriminator is not None and self.discriminator.norm == "sync" and ranks.device.type != "cuda":
            raise ValueError("task.discriminator.norm sync needs GPUs; choose group or batch")


@dataclass
class Networks:
    """All that a joint step runs, before any engine."""

    coder: Autoencoder
    vae: LatentVAE  # over the same autoencoder
    targets: list[Target]
    modules: dict[str, nn.Module]  # what trains, by the name of its engine
    distance: Perceptual | None

    def put_channels_last(self) -> None:
        """Convolutions of VAE, discriminator and LPIPS."""
        for module in (self.coder, self.modules.get("discriminator"), self.distance):
            if isinstance(module, nn.Module):
                channels_last(module)

    def compile_frozen(self) -> None:
        """LPIPS, the encoders' blocks, those of a VAE that stays."""
        if "vae" not in self.modules:
            compile_blocks(self.coder)
        if isinstance(self.distance, LPIPS):
            compile_whole(self.distance)
        for target in self.targets:
            compile_blocks(target.encoder)


class Predicted(NamedTuple):
    """A tuple, because ZeRO-3 looks for tensors in outputs and looks into no dataclass."""

    velocity: Any  # Tensor [B, c, h, w]; None where only the alignment was asked for
    latents: Tensor  # [B, c, h, w] of unit variance: what the velocity leads away from
    guesses: tuple[Tensor, ...]  # [B, N, E] for each target


class AlignedSiT(nn.Module):
    """Normalised latents -> SiT -> velocity, and its aligned layer -> guesses at what encoders see. One forward, because
    ZeRO-3 gathers for that alone."""

    def __init__(
        self,
        config: SiTConfig,
        teller: Labels | Bridge,
        flow: FlowConfig,
        projector: ProjectorConfig,
        targets: list[Target],
        statistics: tuple[list[float], list[float]],
    ) -> None:
        super().__init__()
        self.norm = LatentNorm(*statistics)
        self.teller = teller
        self.sit = SiT(config)
        self.projectors = nn.ModuleList(build_projector(projector, config.width, t.width) for t in targets)
        self.noising: Noising = build_noising(flow)

    def forward(
        self, told: tuple[Any, ...], latents: Tensor, t: Tensor, eps: Tensor, update: bool, align_only: bool = False
    ) -> Predicted:
        """told: words [B, L, K] and places [B, L, 3], or captions that were read; raw latents [B, c, h, w], t [B], eps
        [B, c, h, w]. `update` normalises by this batch and moves the running statistics; `align_only` stops at the aligned
        layer."""
        x0 = self.norm(latents, update)  # [B, c, h, w]
        depth = self.sit.config.align_depth if self.projectors else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not align_only):  # which wants the latents' gradients alone
            condition = self.teller(*told)  # [B, L, C]
        out = self.sit(self.noising.mix(x0, eps, t), t, condition, hidden_at=depth, stop=align_only)
        grid = self.sit.grid(latents)
        return Predicted(out.prediction, x0, tuple(project(out.hidden, grid) for project in self.projectors))


class RepaeTask(LoaderTask):
    """Steps VAE, discriminator and SiT, in this order; each by what the others were before it."""

    def __init__(
        self,
        config: RepaeTaskConfig,
        engines: Mapping[str, Engine],
        coder: Autoencoder,
        vae: LatentVAE,
        targets: list[Target],
        distance: Perceptual | None,
        loader: Loader,
        run: Run,
        ranks: Ranks,
    ) -> None:
        self.config, self.engines, self.coder, self.vae = config, engines, coder, vae
        self.targets, self.distance, self.loader = targets, distance, loader
        self.seed, self.batch_size, self.ema, self.ranks = run.seed, run.schedule.batch_size, run.ema, ranks
        self.shown = loader.first() if ranks.first else None
        self.sit: Any = engines["main"].module if "main" in engines else None

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return next(iter(self.engines.values())).steps

    def step(self, batch: LabelledBatch | T2IBatch) -> dict[str, Tensor]:
        """The published step: the VAE's, the discriminator's on what was just rebuilt, and the SiT's on the latents."""
        assert batch.levels is not None, "the task's build refuses captions with latents"
        config, device = self.config, self.ranks.device
        shape = self.coder.latent_shape(batch.levels)
        posterior = noise(batch.index, self.seed + POSTERIOR, shape).to(device)  # [B, c, h, w]
        given = None if self.sit is None else self._given(batch, shape)
        pixels = unit(batch.levels.to(device))  # [B, 3, H, W]
        seen = self._seen(pixels)  # [B, N, E] for each target
        measured: dict[str, Tensor] = {}
        if self.vae_trains:
            count = max(1, round(config.recon_fraction * len(pixels)))
            coded = Coded(*self.engines["vae"](pixels, posterior, count))
            measured |= self._step_vae(coded, pixels[:count], self._undropped(batch, given), seen)
            if "discriminator" in self.engines:
                measured |= self._step_discriminator(pixels[:count], coded.rebuilt.detach())
            latents = coded.latents.detach()
        else:
            for name in self.engines.keys() & {"vae", "discriminator"}:
                self.engines[name].last = None  # what their last step did is no news any more
            latents = self._known(batch) if batch.latents is not None else self._encode(pixels, posterior)
        if given is not None:
            measured |= self._step_sit(latents, given, seen)
        return measured

    def frozen(self) -> dict[str, str]:
        """The VAE, where it only is read, the encoders, the network of the perceptual distance, the MLLM of captions."""
        parts = {f"target {number}": target.encoder for number, target in enumerate(self.targets)}
        if "vae" not in self.engines:
            parts["vae"] = self.vae.autoencoder
        if self.distance is not None:
            parts["perceptual"] = self.distance.network
        if self.sit is not None and isinstance(self.sit.teller, Bridge):
            parts["mllm"] = self.sit.teller.mllm.model
        return {name: fingerprint(tensors_of(part)) for name, part in parts.items()}

    def preview(self, folder: Path, step: int) -> None:
        """Pictures beside what the VAE makes of them, and what is drawn of what is told: previews/step-00000500.png."""
        from train.repae_release import preview

        preview(self, folder / f"step-{step:08d}.png")

    def release(self, folder: Path) -> None:
        """vae/ and sit/, ready as `vae.path` and `decoder.path` of a MetaQuery."""
        from train.repae_release import release

        release(self, folder)

    @property
    def vae_trains(self) -> bool:
        """Whether the VAE is one of what trains, and not frozen by now."""
        after = self.config.freeze_vae_after
        return "vae" in self.engines and not (after and self.steps >= after)

    def _given(self, batch: Any, shape: tuple[int, int, int]) -> tuple[Any, Tensor, Tensor]:
        """What both passes through the SiT share: what is told, times [B] and noise [B, c, h, w], by sample number."""
        parts: Any = self.config.told(batch, self.seed, self.batch_size)
        told = tuple(part.to(self.ranks.device) for part in parts)
        if isinstance(self.sit.teller, Bridge):  # captions are read once for both
            told = (self.sit.teller.mllm.prefill(*told),)
        t = self.sit.noising.times(batch.index, self.seed).to(self.ranks.device)
        return told, t, noise(batch.index, self.seed, shape).to(self.ranks.device)

    def _undropped(self, batch: Any, given: Any) -> Any:
        """What is given to the pass that the VAE learns from: of classes none is dropped, as published."""
        told = self.config.told
        if given is None or not isinstance(told, ClassesTold) or not told.dropout:
            return given
        return tuple(part.to(self.ranks.device) for part in told.whole(batch, self.seed)), *given[1:]

    @torch.no_grad()
    def _seen(self, pixels: Tensor) -> list[Tensor]:
        until = self.config.align_until
        if self.sit is None or (until and self.steps >= until):
            return []
        grid = self._grid(pixels)
        return [target(pixels, grid) for target in self.targets]

    def _grid(self, pixels: Tensor) -> Grid:
        """Rows and columns of the SiT's tokens over pictures [B, 3, H, W]."""
        cell = self.coder.factor * self.sit.sit.config.patch
        return pixels.shape[-2] // cell, pixels.shape[-1] // cell

    def _known(self, batch: LabelledBatch | T2IBatch) -> Tensor:
        """Raw latents of unit-variance ones that were made once (data/precompute.py): the posterior's mean."""
        assert batch.latents is not None
        return self.vae.raw(batch.latents.to(self.ranks.device))

    @torch.no_grad()
    def _encode(self, pixels: Tensor, posterior: Tensor) -> Tensor:
        """Raw latents of a VAE that does not train, or not any more."""
        if "vae" in self.engines:
            return self.engines["vae"].aside(pixels, posterior, 0).latents
        half = self.engines["main"].config.precision != "fp32"
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=half):
            return Coded(*self.coder(pixels.to(self.vae.autoencoder.dtype), posterior, 0)).latents

    def _step_vae(self, coded: Coded, pixels: Tensor, given: Any, seen: list[Tensor]) -> dict[str, Tensor]:
        weights, rebuilt = self.config.losses, coded.rebuilt.float()
        off = rebuilt - pixels  # [R, 3, H, W]
        measured = {"l1": off.abs().mean(), "mse": off.square().mean()}
        loss = weights.l1 * measured["l1"] + weights.l2 * measured["mse"]
        if weights.kl:
            measured["kl"] = gaussian_kl(coded.mean, coded.logvar).flatten(1).sum(1).mean()
            loss = loss + weights.kl * measured["kl"]
        if self.distance is not None:
            measured["perceptual"] = self._apart(self.distance, rebuilt, pixels, seen).mean()
            loss = loss + weights.perceptual * measured["perceptual"]
        if given is not None and ((weights.align and seen) or weights.diffusion):
            still = self.engines["main"].held_still()
            loss = loss + _injected(coded.latents, lambda z: self._latent_loss(z, given, seen), still)
        if "discriminator" in self.engines:
            loss = loss + _injected(coded.rebuilt, self._deceit, self.engines["discriminator"].held_still())
        self.engines["vae"].backward(loss)
        self.engines["vae"].step()
        return {name: value.detach() for name, value in measured.items()}

    def _apart(self, distance: Perceptual, rebuilt: Tensor, pixels: Tensor, seen: list[Tensor]) -> Tensor:
        """The perceptual distance [R]; what the alignment's encoder saw in the pictures is not looked for again."""
        if isinstance(distance, FeatureDistance):
            for target, features in zip(self.targets, seen, strict=False):  # nothing is seen once nothing is aligned
                if target is distance.target and distance.grid(pixels) == self._grid(pixels):
                    return distance(rebuilt, pixels, features[: len(pixels)])
        return distance(rebuilt, pixels)

    def _latent_loss(self, latents: Tensor, given: tuple[Any, Tensor, Tensor], seen: list[Tensor]) -> Tensor:
        """What the SiT says of the latents: the alignment, and in the naive control the diffusion loss. By the running
        statistics, which do not move."""
        weights, (told, t, eps) = self.config.losses, given
        predicted = self.engines["main"].aside(told, latents, t, eps, False, align_only=not weights.diffusion)
        loss = latents.new_zeros((), dtype=torch.float32)
        if weights.align and seen:
            loss = loss + weights.align * self._alignment(predicted.guesses, seen)
        if weights.diffusion:
            target = self.sit.noising.target(predicted.latents, eps, t)
            loss = loss + weights.diffusion * squared_error(predicted.velocity, target).mean()
        return loss

    def _deceit(self, rebuilt: Tensor) -> Tensor:
        return -self.config.losses.adversarial * self.engines["discriminator"].aside(rebuilt).float().mean()

    def _step_discriminator(self, pixels: Tensor, rebuilt: Tensor) -> dict[str, Tensor]:
        engine = self.engines["discriminator"]
        rebuilt = rebuilt.to(pixels.dtype)
        if engine.module.config.norm == "group":
            real, false = engine(torch.cat([pixels, rebuilt])).chunk(2)
        else:  # the statistics of real and of false pictures apart, as published
            real, false = engine(pixels), engine(rebuilt)
        loss = hinge(real.float(), false.float())
        engine.backward(loss)
        engine.step()
        return {"discriminator": loss.detach()}

    def _step_sit(self, latents: Tensor, given: tuple[Any, Tensor, Tensor], seen: list[Tensor]) -> dict[str, Tensor]:
        engine, (told, t, eps) = self.engines["main"], given
        update = "vae" in self.engines  # the statistics of a VAE that never trains are known
        before = engine.steps
        predicted = Predicted(*engine(told, latents, t, eps, update))
        loss = squared_error(predicted.velocity, self.sit.noising.target(predicted.latents, eps, t)).mean()
        measured, objective = {"loss": loss.detach()}, loss
        if seen:
            align = self._alignment(predicted.guesses, seen)
            measured["align"] = align.detach()
            objective = loss + self.config.align * (1 + align)  # never negative: the guard compares it with what is usual
        else:  # every parameter of an engine needs its part in the loss
            objective = loss + sum(0.0 * guess.sum() for guess in predicted.guesses)
        engine.backward(objective)
        engine.step()
        if engine.steps > before:
            taken = engine.last is not None and engine.last.objection is None
            self.sit.norm.settle(taken, decay(self.ema, images_seen=engine.images, images=self.batch_size))
        return measured

    def _alignment(self, guesses: tuple[Tensor, ...], seen: list[Tensor]) -> Tensor:
        prepared = [project.prepare(target) for project, target in zip(self.sit.projectors, seen, strict=True)]
        return alignment(guesses, prepared)


def _injected(made: Tensor, judge: Callable[[Tensor], Tensor], still: AbstractContextManager) -> Tensor:
    """A term of value 0 whose gradient with respect to `made` is that of judge(made), taken within `still`, and which
    reaches nothing else."""
    leaf = made.detach().requires_grad_()
    with torch.enable_grad(), still:
        (gradient,) = torch.autograd.grad(judge(leaf), leaf)
    return (gradient.to(made.dtype) * (made - made.detach())).sum()
