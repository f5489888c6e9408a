"""Pictures and latents -> how far two sets of pictures lie apart, how well one is rebuilt, how much its latents say where.

Letters: B pictures, E width of features, H W pixels, c h w latent channels, height, width."""

import torch
from torch import Tensor


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two gaussians fitted to features [B, E] each (Heusel et al. 2017, eq. 6), in float64."""
    (mean1, cov1), (mean2, cov2) = _gaussian(first), _gaussian(second)
    # the trace of the root of a product of covariances is the sum of the roots of its eigenvalues, which are not negative
    roots = torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * roots
    return max(0.0, float(distance))


def psnr(rebuilt: Tensor, pictures: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures [B, 3, H, W] in [-1, 1], in decibels: [B]."""
    error = ((rebuilt.clamp(-1, 1) - pictures) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def spatial_variance(latents: Tensor) -> Tensor:
    """Of latents [B, c, h, w]: the variance over places, in the mean over channels: [B]. Trivial latents have little."""
    return latents.float().flatten(2).var(2).mean(1)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    if len(features) < 2:
        raise ValueError("a distance of features needs at least two pictures on each side")
    if not features.isfinite().all():
        raise ValueError("features of the pictures are not finite: what draws or encodes them is broken")
    return features.mean(0), torch.cov(features.T)
