"""A decoder that was trained on labels -> measures on held-out pictures, without any language model.

Letters: B pictures of a batch, c h w latent channels, height, width."""

from collections.abc import Iterator, Sequence

import torch

from data.batch import LabelledBatch, LabelledCollate
from data.loader import Data, open_source
from data.records import Labelled, to_record
from data.told import Told
from model.noise import noise
from model.targets import Target
from sample.fidelity import frechet, psnr, spatial_variance
from sample.labelled import LabelledDecoder
from sample.measures import Measure, mean
from sample.progress import Track

FEATURE_GRID = (8, 8)  # tokens over which the features of a picture are averaged


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
    watch: Track = lambda each: each,
) -> dict[str, Measure]:
    """Over n held-out pictures: the distance of what is drawn from their labels by the features of `target` (local: not
    comparable with an Inception's), how well the VAE rebuilds them, the variance of its raw latents over places, and the
    loss of the velocity at one addressed time each."""
    seen, made, errors, rebuilt, variances = [], [], [], [], []
    shape, device = decoder.latent_shape, next(decoder.sit.parameters()).device
    for each in watch(list(_batches(data, n, batch_size))):
        words, places = told.whole(each, seed)
        batch, whole = each.to(device), (words.to(device), places.to(device))
        pixels = batch.pixels  # [B, 3, H, W]
        latents = decoder.vae.encode(pixels)  # [B, c, h, w]
        rebuilt += psnr(decoder.vae.decode(latents), pixels).tolist()
        variances += spatial_variance(decoder.vae.raw(latents)).tolist()
        t, eps = (part.to(device) for part in (decoder.noising.times(each.index, seed), noise(each.index, seed, shape)))
        velocity = decoder.sit(decoder.noising.mix(latents, eps, t), t, decoder.labels(*whole)).prediction
        errors += (velocity - decoder.noising.target(latents, eps, t)).square().flatten(1).mean(1).tolist()
        drawn = decoder.draw(whole, [seed + number for number in each.index.tolist()], steps)
        for pictures, features in ((pixels, seen), (drawn, made)):
            features.append(target(pictures, FEATURE_GRID).mean(1).cpu())  # [B, E]
    return {
        "decoder.local_feature_distance": Measure(frechet(torch.cat(made), torch.cat(seen)), n=n),
        "decoder.velocity_loss": mean(errors),
        "vae.psnr": mean(rebuilt, "dB"),
        "vae.spatial_variance": mean(variances),
    }


def _batches(data: Data, n: int, size: int) -> Iterator[LabelledBatch]:
    source, collate = open_source(data, data.sources[0]), LabelledCollate(data.image_size)
    for first in range(0, n, size):
        numbers: Sequence[int] = range(first, min(first + size, n))
        records = [to_record("labelled", source.read(number)) for number in numbers]
        yield collate([record for record in records if isinstance(record, Labelled)], numbers)
