"""A trained SiT with its VAE and its labels -> measures on held-out pictures, without any language model.

The release is that of `train.repae`: vae/, sit/ and noise.json. Letters: B pictures of a batch, c h w latent channels,
height, width."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.batch import LabelledBatch, LabelledCollate
from data.loader import Data, open_source
from data.records import Labelled, to_record
from data.told import Told
from model.decoder import load_sit
from model.files import parse_config, read_json
from model.labels import Labels, load_labels
from model.noise import FlowConfig, Noising, build_noising, noise
from model.sit import SiT
from model.targets import Target
from model.vae import LatentVAE, VAEConfig, load_vae
from sample.fidelity import frechet, psnr, spatial_variance
from sample.measures import Measure, mean
from sample.solver import solve

NOISE_FILE = "noise.json"
FEATURE_GRID = (8, 8)  # tokens over which the features of a picture are averaged


@dataclass(frozen=True)
class LabelledDecoder:
    """What draws from labels."""

    sit: SiT
    vae: LatentVAE
    labels: Labels
    noising: Noising

    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        config = self.sit.config
        return config.latent_channels, config.latent_size, config.latent_size

    def draw(self, told: tuple[Tensor, Tensor], start: Tensor, steps: int) -> Tensor:
        """Words and places of B pictures, noise [B, c, h, w] -> pixels [B, 3, H, W]."""
        condition = self.labels(*told)
        return self.vae.decode(solve(lambda x, t: self.sit(x, t, condition).prediction, start, steps, self.noising))


def load_decoder(release: Path) -> LabelledDecoder:
    """The decoder of a release, on CPU. Raises ValueError when a part is missing."""
    file = release / NOISE_FILE
    if not file.is_file():
        raise ValueError(f"{release} has no {NOISE_FILE}; name the release of a run of configs/repae.py")
    noising = build_noising(parse_config(FlowConfig, read_json(file), file))
    sit = load_sit(str(release / "sit")).eval().requires_grad_(False)
    return LabelledDecoder(sit, load_vae(VAEConfig(str(release / "vae"))), load_labels(release / "sit"), noising)


@torch.no_grad()
def score(
    decoder: LabelledDecoder,
    target: Target,
    told: Told,
    data: Data,
    n: int,
    seed: int,
    batch_size: int,
    steps: int,
    watch: Callable[[Iterable], Iterable] = lambda each: each,
) -> dict[str, Measure]:
    """Over n held-out pictures: the distance of what is drawn from their labels by the features of `target` (local: not
    comparable with an Inception's), how well the VAE rebuilds them, the variance of its raw latents over places, and the
    loss of the velocity at one addressed time each."""
    seen, made, errors, rebuilt, variances = [], [], [], [], []
    shape, (mean_, std) = decoder.latent_shape(), decoder.vae.statistics
    for batch in watch(list(_batches(data, n, batch_size))):
        latents = decoder.vae.encode(batch.pixels)  # [B, c, h, w]
        rebuilt += psnr(decoder.vae.decode(latents), batch.pixels).tolist()
        raw = latents * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean_).view(1, -1, 1, 1)
        variances += spatial_variance(raw).tolist()
        t, eps = decoder.noising.times(batch.index, seed), noise(batch.index, seed, shape)
        whole = told.whole(batch, seed)
        velocity = decoder.sit(decoder.noising.mix(latents, eps, t), t, decoder.labels(*whole)).prediction
        errors += (velocity - decoder.noising.target(latents, eps, t)).square().flatten(1).mean(1).tolist()
        drawn = decoder.draw(whole, noise(batch.index, seed + 1, shape), steps)
        for pictures, features in ((batch.pixels, seen), (drawn, made)):
            features.append(target(pictures, FEATURE_GRID).mean(1))  # [B, E]
    return {
        "decoder.local_feature_distance": Measure(frechet(torch.cat(made), torch.cat(seen)), n=n),
        "decoder.velocity_loss": mean(errors),
        "vae.psnr": mean(rebuilt, "dB"),
        "vae.spatial_variance": mean(variances),
    }


def _batches(data: Data, n: int, size: int) -> Iterator[LabelledBatch]:
    source, collate = open_source(data.sources[0], data.task, data.image_size), LabelledCollate(data.image_size)
    for first in range(0, n, size):
        numbers: Sequence[int] = range(first, min(first + size, n))
        records = [to_record("labelled", source.read(number)) for number in numbers]
        yield collate([record for record in records if isinstance(record, Labelled)], numbers)
