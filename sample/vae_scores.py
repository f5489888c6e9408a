"""A VAE and pictures -> measures of how well it rebuilds them.

Letters: B pictures of a batch, H W pixels, c h w latent channels, height, width, E width of an encoder's features."""

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.transforms import to_pil
from model.perceptual import Perceptual
from model.targets import Target
from model.vae import LatentVAE
from sample.decoder_scores import FEATURE_GRID
from sample.fidelity import frechet, psnr, spatial_variance, ssim
from sample.measures import Measure, mean

REAL, REBUILT = "real", "rebuilt"
"""Folders of the same pictures before and after, by the same names."""


@torch.no_grad()
def score(
    vae: LatentVAE, pictures: Iterable[Tensor], target: Target, lpips: Perceptual | None, keep: Path | None
) -> dict[str, Measure]:
    """Over batches [B, 3, H, W] in [-1, 1]: each picture by itself, and all by the features of `target` (local: not
    comparable with an Inception's). `keep` takes the pictures, before and after, as PNG files."""
    found: dict[str, list[float]] = {name: [] for name in ("psnr", "ssim", "l1", "spatial_variance", "lpips")}
    seen, made, count = [], [], 0
    for batch in pictures:
        pixels = batch.to(target.device)
        latents = vae.encode(pixels)  # [B, c, h, w]
        rebuilt = vae.decode(latents)  # [B, 3, H, W]
        found["psnr"] += psnr(rebuilt, pixels).tolist()
        found["ssim"] += ssim(rebuilt, pixels).tolist()
        found["l1"] += (rebuilt - pixels).abs().flatten(1).mean(1).tolist()
        found["spatial_variance"] += spatial_variance(vae.raw(latents)).tolist()
        if lpips is not None:
            found["lpips"] += lpips(rebuilt, pixels).tolist()
        for each, features in ((pixels, seen), (rebuilt, made)):
            features.append(target(each, FEATURE_GRID).mean(1).cpu())  # [B, E]
        if keep is not None:
            _keep(keep / REAL, pixels, count)
            _keep(keep / REBUILT, rebuilt, count)
        count += len(pixels)
    measures = {f"vae.{name}": mean(values, "dB" if name == "psnr" else "") for name, values in found.items() if values}
    return measures | {"vae.local_frechet": Measure(frechet(torch.cat(made), torch.cat(seen)), n=count)}


def _keep(folder: Path, pixels: Tensor, first: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pixels.cpu(), start=first):
        image: Image.Image = to_pil(picture)
        image.save(folder / f"{number:06d}.png")
