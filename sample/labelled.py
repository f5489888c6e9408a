"""The release of a decoder that was trained on labels -> pictures, without any language model.

A release of `train.repae`: vae/ and sit/. Letters: B pictures of a batch, L label tokens, K words a token, c h w
latent channels, height, width."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from model.assets import fingerprint, tensors_of
from model.decoder import load_noise, load_sit
from model.labels import UNKNOWN, Labels, load_labels
from model.noise import Noising, build_noising, noise
from model.sit import SiT
from model.vae import LatentVAE, VAEConfig, load_vae
from sample.guidance import Branch, guided
from sample.pipeline import noise_from
from sample.settings import Guidance, SolverName
from sample.solver import After, Fresh, solve

START = 1  # the stream of addressed noise in which a picture's seed names where it starts
Told = tuple[Tensor, Tensor]
"""Words [B, L, K] and places [B, L, 3]."""


@dataclass(frozen=True)
class LabelledDecoder:
    """What draws from labels."""

    sit: SiT
    vae: LatentVAE
    labels: Labels
    noising: Noising

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        config = self.sit.config
        return config.latent_channels, config.latent_size, config.latent_size

    @property
    def image_size(self) -> int:
        """Pixels along a side of what it draws."""
        return self.sit.config.latent_size * self.vae.factor

    @property
    def classes(self) -> int:
        """How many classes it was told apart; ValueError as `check_classes`."""
        self.check_classes()
        return self.labels.config.vocabulary - 1

    def check_classes(self) -> None:
        """ValueError for a decoder that was told scenes."""
        if self.labels.config.places:
            raise ValueError("this decoder was told scenes, not classes; its pictures are for sample.evaluate decoder")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the tensors of all that draws."""
        parts = {"sit": self.sit, "vae": self.vae.autoencoder, "labels": self.labels}
        return fingerprint({f"{name}.{key}": t for name, part in parts.items() for key, t in tensors_of(part).items()})

    def to(self, device: torch.device | str) -> "LabelledDecoder":
        """Move in place; returns itself."""
        for part in (self.sit, self.vae, self.labels):
            part.to(device)
        return self

    @torch.no_grad()
    def draw(
        self, told: Told, seeds: Sequence[int], steps: int, solver: SolverName = "dpm++", guidance: Guidance = Guidance(1.0)
    ) -> Tensor:
        """One picture for each row of labels and its seed: pixels [B, 3, H, W] in [-1, 1]. Guidance steers away from labels
        that say nothing."""
        fresh = noise_from([torch.Generator().manual_seed(seed) for seed in seeds], self.latent_shape, told[0].device)
        start = noise(torch.tensor(seeds), START, self.latent_shape)
        return self.vae.decode(self.latents(told, start, fresh, steps, solver, guidance))

    @torch.no_grad()
    def latents(
        self,
        told: Told,
        start: Tensor,
        fresh: Fresh,
        steps: int,
        solver: SolverName = "dpm++",
        guidance: Guidance = Guidance(1.0),
        after: After | None = None,
    ) -> Tensor:
        """The same from given noise `start` [B, c, h, w], before decoding: latents of unit variance. ValueError for noise of
        another shape."""
        shape = (len(told[0]), *self.latent_shape)
        if start.shape != shape:
            raise ValueError(f"latents: {tuple(start.shape)} given, {shape} needed; give noise of that shape")
        silence = torch.full_like(told[0], UNKNOWN), told[1]
        branches = [Branch(1 - guidance.text, self.labels(*silence)), Branch(guidance.text, self.labels(*told))]
        predict = guided(lambda x, t, condition: self.sit(x, t, condition).prediction, branches, guidance)
        return solve(predict, start.to(told[0].device), steps, self.noising, solver, fresh, after)


def load_decoder(release: Path) -> LabelledDecoder:
    """The decoder of a release, on CPU. Raises ValueError when a part is missing."""
    if not (release / "sit").is_dir():
        raise ValueError(f"{release} has no sit; name the release of a run of configs/repae.py")
    noising = build_noising(load_noise(str(release / "sit")))
    sit = load_sit(str(release / "sit")).eval().requires_grad_(False)
    return LabelledDecoder(sit, load_vae(VAEConfig(str(release / "vae"))), load_labels(release / "sit"), noising)
