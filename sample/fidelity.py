"""Pictures and latents -> how far two sets of pictures lie apart, how well one is rebuilt, how much its latents say where.

Letters: B pictures, E width of features, H W pixels, c h w latent channels, height, width."""

import torch
import torch.nn.functional as F
from torch import Tensor


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance of two gaussians fitted to features [B, E] each (Heusel et al. 2017, eq. 6), in float64."""
    (mean1, cov1), (mean2, cov2) = _gaussian(first), _gaussian(second)
    # the trace of the root of a product of covariances is the sum of the roots of its eigenvalues, which are not negative
    roots = torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * roots
    return max(0.0, float(distance))


def kernel_distance(first: Tensor, second: Tensor, subsets: int = 100, size: int = 1000) -> float:
    """KID (Binkowski et al. 2018): the unbiased squared MMD of features [B, E] under (x.y / E + 1)^3, in the mean over
    random subsets; the same subsets each time."""
    size = min(size, len(first), len(second))
    if size < 2:
        raise ValueError("a distance of features needs at least two pictures on each side")
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(subsets):
        x, y = (part[torch.randperm(len(part), generator=generator)[:size]].double() for part in (first, second))
        xx, yy, xy = (((a @ b.T) / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        found.append(within - 2 * xy.mean())
    return float(torch.stack(found).mean())


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """The share of drawn features [B, E] that lie where real ones are, and the other way round: within the distance of a
    point to its nth neighbour (Kynkaanniemi et al. 2019)."""
    if min(len(real), len(drawn)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} pictures on each side")
    return _covered(drawn, real, neighbours), _covered(real, drawn, neighbours)


def psnr(rebuilt: Tensor, pictures: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures [B, 3, H, W] in [-1, 1], in decibels: [B]."""
    error = ((rebuilt.clamp(-1, 1) - pictures) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def ssim(rebuilt: Tensor, pictures: Tensor, sigma: float = 1.5) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13) of pictures [B, 3, H, W] in [-1, 1], at least 11 pixels a side: [B].
    Under a gaussian window of 11 x 11, in the mean over channels and over places where it lies within the picture."""
    if min(pictures.shape[-2:]) < 11:
        raise ValueError(f"structural similarity needs pictures of 11 pixels a side, not {tuple(pictures.shape[-2:])}")
    channels, places = pictures.shape[1], torch.arange(11, device=pictures.device) - 5
    window = torch.exp(-(places**2) / (2 * sigma**2)).double()
    window = (torch.outer(window, window) / window.sum() ** 2).expand(channels, 1, 11, 11)

    def around(values: Tensor) -> Tensor:
        return F.conv2d(values, window, groups=channels)

    x, y = ((part.double().clamp(-1, 1) + 1) / 2 for part in (rebuilt, pictures))
    mean_x, mean_y = around(x), around(y)
    var_x, var_y = around(x * x) - mean_x**2, around(y * y) - mean_y**2
    covariance = around(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return (light * (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)).flatten(1).mean(1).float()


def spatial_variance(latents: Tensor) -> Tensor:
    """Of latents [B, c, h, w]: the variance over places, in the mean over channels: [B]. Trivial latents have little."""
    return latents.float().flatten(2).var(2).mean(1)


def _covered(points: Tensor, known: Tensor, neighbours: int) -> float:
    """The share of points that lie within the reach of at least one known one."""
    known = known.float()
    parts = known.split(1000)  # of 50,000, all distances at once would take 10 GB and more
    reach = torch.cat([torch.cdist(part, known).kthvalue(neighbours + 1, dim=1).values for part in parts])  # [B]: and itself
    inside = [(torch.cdist(part.float(), known) <= reach).any(1) for part in points.split(1000)]
    return float(torch.cat(inside).float().mean())


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    if len(features) < 2:
        raise ValueError("a distance of features needs at least two pictures on each side")
    if not features.isfinite().all():
        raise ValueError("features of the pictures are not finite: what draws or encodes them is broken")
    return features.mean(0), torch.cov(features.T)
