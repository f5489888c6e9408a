"""Pictures and labels -> a diffusion decoder that draws, before a language model tells it what: one SiT step.

The labels are replaced later by what a MetaQuery reads; of the labelled run only the SiT is kept. Letters: B batch,
c h w latent channels, height, width, L label tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from data.batch import LabelledBatch, LabelledCollate
from data.loader import Loader
from data.told import ScenesTold
from data.transforms import unit
from data.world.labels import Withhold, labels_config
from model.assets import fingerprint, tensors_of
from model.decoder import load_sit, save_sit
from model.files import check_match
from model.labels import LABELS_FILE, Labels, load_labels
from model.noise import FlowConfig, NoiseConfig, build_noising, noise
from model.sit import SiT, SiTConfig, finer
from model.vae import LatentVAE, VAEConfig, load_vae
from sample.solver import solve
from train.autoencoder import compare
from train.dense import HEAD_FILE, DenseHead, dense_loss, load_head
from train.engine import Engine
from train.loss import squared_error
from train.ranks import Ranks
from train.task import LoaderTask, engine_for, loader_for

if TYPE_CHECKING:
    from train.config import Run


@dataclass(frozen=True)
class LabelledTaskConfig:
    """A SiT on the latents of a frozen VAE, told scenes of the world."""

    sit: SiTConfig
    vae: VAEConfig
    noise: NoiseConfig = field(default_factory=FlowConfig)
    withhold: Withhold = field(default_factory=Withhold)
    spare: int = 10
    """Up to so many further tokens, a new number for each batch, tell of things that are not there: a bridge has more
    queries than a scene has things."""
    align: float = 0.2
    """Weight of the alignment: after `sit.align_depth` blocks each latent token must tell what lies at the points of its
    cell (train/dense.py). 0: none."""
    align_points: int = 8
    """Points along a side of a latent token's cell."""
    init: Path | None = None
    """The release of an earlier run to go on from, of the same shape or a coarser patch. None: fresh weights."""
    train_labels: bool = True
    """False: the SiT is told in the words that it knows from `init`, and a bridge that speaks them stays right."""

    def __post_init__(self) -> None:
        if not self.train_labels and self.init is None:
            raise ValueError("task.train_labels is off, and fresh labels say nothing; give task.init, or train them")

    def build(self, run: Run, ranks: Ranks) -> LabelledTask:
        """Load the VAE, make SiT and labels, hand both to one engine."""
        if run.data.task != "labelled":
            raise ValueError(f"data.task is {run.data.task}; a labelled decoder learns from labelled pictures")
        if self.align and not self.sit.align_depth:
            raise ValueError("task.align needs a block to look after; give task.sit.align_depth, or set task.align to 0")
        self.sit.check_tokens(ScenesTold(self.withhold, self.spare).tokens, "task.spare")
        module = LabelledSiT(self.sit, self.align_points if self.align else 0)
        if self.init is not None:
            module.start(self.init)
        module.labels.requires_grad_(self.train_labels)
        points = (self.sit.latent_size // self.sit.patch, self.align_points) if self.align else None
        loader = loader_for(LabelledCollate(run.data.image_size, points=points), run, ranks)
        vae, sit = load_vae(self.vae).to(ranks.device), self.sit
        if (vae.latent_channels, vae.factor * sit.latent_size) != (sit.latent_channels, run.data.image_size):
            raise ValueError(
                f"data.image_size is {run.data.image_size}; task.sit draws latents of {sit.latent_channels} x "
                f"{sit.latent_size} x {sit.latent_size}, and task.vae makes {vae.latent_channels} of {vae.factor} x "
                f"{vae.factor} pixels each; make them fit"
            )
        read = {"vae": vae.autoencoder, **({} if self.train_labels else {"labels": module.labels})}
        # before an engine rounds the words, or parts them
        frozen = {name: fingerprint(tensors_of(part)) for name, part in read.items()} if ranks.first else {}
        return LabelledTask(self, module, vae, engine_for(module, run, ranks), loader, frozen, run, ranks)


class LabelledOutput(NamedTuple):
    """What a labelled SiT predicts, and what its head says of the points of each latent token's cell."""

    prediction: Tensor  # [B, c, h, w]
    logits: Tensor | None = None  # [B, N, points^2, classes]


class LabelledSiT(nn.Module):
    """Labels -> tokens -> SiT, in one forward; with `points`, a head on its aligned layer."""

    def __init__(self, config: SiTConfig, points: int = 0):
        super().__init__()
        self.labels = Labels(labels_config(config.condition_width))
        self.sit = SiT(config)
        self.head = DenseHead(config.width, points) if points else None

    def forward(self, words: Tensor, places: Tensor, x_t: Tensor, t: Tensor) -> LabelledOutput:
        """words [B, L, K], places [B, L, 3], x_t [B, c, h, w], t [B] -> prediction, and logits where there is a head."""
        condition = self.labels(words, places)  # [B, L, C]
        if self.head is None:
            return LabelledOutput(self.sit(x_t, t, condition).prediction)
        out = self.sit(x_t, t, condition, hidden_at=self.sit.config.align_depth)
        return LabelledOutput(out.prediction, self.head(out.hidden))

    def start(self, release: Path) -> None:
        """Take over what `release` wrote; of a coarser SiT, what `finer` keeps; a head over other points starts afresh.
        Raises ValueError when a file is missing or does not fit."""
        start_from(release, self.sit, self.labels)
        if self.head is not None and (release / HEAD_FILE).is_file():
            head = load_head(str(release))
            if head.points == self.head.points:
                self.head.load_state_dict(head.state_dict())


def start_from(release: Path, sit: SiT, labels: Labels | None) -> None:
    """Take over the SiT (of a coarser one what `finer` keeps), and the labels where they are wanted, that a labelled run
    released. Raises ValueError when one is missing or does not fit."""
    if labels is not None:
        found = load_labels(release).state_dict()
        check_match(found, labels.state_dict(), release)
        labels.load_state_dict(found)
    sit.load_state_dict(finer(load_sit(str(release)), sit.config).state_dict())


class LabelledTask(LoaderTask):
    """Trains SiT and the label embedding; the VAE is only read."""

    def __init__(
        self,
        config: LabelledTaskConfig,
        module: LabelledSiT,
        vae: LatentVAE,
        engine: Engine,
        loader: Loader,
        frozen: dict[str, str],
        run: Run,
        ranks: Ranks,
    ) -> None:
        self.config, self.module, self.vae, self.engine, self.loader = config, module, vae, engine, loader
        self.seed, self.batch_size, self.ranks = run.seed, run.schedule.batch_size, ranks
        self.noising, self.told = build_noising(config.noise), ScenesTold(config.withhold, config.spare)
        self.latent_shape = (config.sit.latent_channels, config.sit.latent_size, config.sit.latent_size)
        self.shown = loader.first() if ranks.first else None
        self._frozen = frozen
        self.engines = {"main": engine}

    def step(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """Mean over the batch of |prediction(x_t, t, labels) - target|^2, and the alignment."""
        device = self.ranks.device
        t = self.noising.times(batch.index, self.seed).to(device)  # [B]
        eps = noise(batch.index, self.seed, self.latent_shape).to(device)  # [B, c, h, w]
        words, places = (part.to(device) for part in self.told(batch, self.seed, self.batch_size))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.engine.config.precision != "fp32"):
            x0 = self.vae.encode(unit(batch.levels.to(device)))  # [B, c, h, w]
        prediction, logits = self.engine(words, places, self.noising.mix(x0, eps, t), t)  # see LabelledOutput
        loss = squared_error(prediction, self.noising.target(x0, eps, t)).mean()
        measured, objective = {"loss": loss.detach()}, loss
        if logits is not None:
            assert batch.points is not None
            align, accuracy = dense_loss(logits, *(part.to(device) for part in batch.points))
            measured |= {"align": align.detach(), "shape_accuracy": accuracy}
            objective = loss + self.config.align * align
        self.engine.backward(objective)
        self.engine.step()
        return measured

    def frozen(self) -> dict[str, str]:
        """The VAE, and the words where they do not train."""
        return self._frozen

    def preview(self, folder: Path, step: int) -> None:
        """Eight pictures beside what is drawn from their whole labels: previews/step-00000500.png."""
        with self.engine.averaged():
            if self.shown is None:
                return
            batch = self.shown
            rows = slice(0, 8)
            words, places = (part[rows].to(self.ranks.device) for part in self.told.whole(batch, self.seed))
            condition = self.module.labels(words, places)  # [8, L, C]
            start = noise(batch.index[rows], self.seed + 1, self.latent_shape).to(self.ranks.device)
            drawn = solve(
                lambda x, t: self.module.sit(x.to(condition.dtype), t, condition).prediction, start, 16, self.noising
            )
            compare(batch.pixels[rows], self.vae.decode(drawn), ("picture", "drawn"), folder / f"step-{step:08d}.png")

    def release(self, folder: Path) -> None:
        """The averaged SiT, as `model.decoder.load_sit` reads it, with label embedding and head beside it; in bfloat16."""
        with self.engine.averaged():
            if self.ranks.first:
                rounded = copy.deepcopy(self.module).bfloat16()
                beside = {LABELS_FILE: rounded.labels.state_dict()}
                if rounded.head is not None:
                    beside[HEAD_FILE] = rounded.head.state_dict()
                save_sit(folder, rounded.sit, self.config.noise, beside)
