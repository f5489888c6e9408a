"""Raw latents -> latents of zero mean and unit variance per channel, by statistics that all ranks share.

A batch norm without gain and bias (REPA-E, Leng et al. 2025, section 3.4), because the latents of a VAE that trains have no
fixed scale. torch's synchronised one needs CUDA; this one asks only for an all-reduce. Letters: B batch, c h w latent
channels, height, width."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class LatentNorm(nn.Module):
    """Running mean and variance [c] in float32; `mean`, `std` start them, and are what a VAE's own config says."""

    mean: Tensor
    variance: Tensor
    average: Tensor  # [2, c]: mean and variance, followed as slowly as the weights that are released

    def __init__(self, mean: Sequence[float], std: Sequence[float], momentum: float = 0.1, eps: float = 1e-4) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("variance", torch.tensor(std, dtype=torch.float32).square().sub(eps).clamp(min=0))
        self._moved: tuple[Tensor, ...] | None = None  # where the running statistics go if the step is taken
        self.register_buffer("average", torch.stack([self.mean, self.variance]))

    def forward(self, latents: Tensor, update: bool = False) -> Tensor:
        """Latents [B, c, h, w] by the running statistics; or, to `update` them, by those of this batch on all ranks, through
        which no gradient goes. The running ones move when the step is settled. Float32."""
        latents = latents.float()
        mean, variance = self._take(latents) if update else (self.mean, self.variance)
        return (latents - mean.view(1, -1, 1, 1)) * (variance + self.eps).rsqrt().view(1, -1, 1, 1)

    @torch.no_grad()
    def settle(self, taken: bool, keep: float) -> None:
        """After an optimizer step: if it was taken, the running statistics become what its batches made of them, and
        average <- keep * average + (1 - keep) * running statistics."""
        moved, self._moved = self._moved, None
        if taken:
            if moved is not None:
                self.mean.copy_(moved[0])
                self.variance.copy_(moved[1])
            self.average.lerp_(torch.stack([self.mean, self.variance]), 1 - keep)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Average mean and deviation of each channel, as `latents_mean` and `latents_std` of a VAE's config tell them."""
        mean, variance = self.average
        return mean.tolist(), (variance + self.eps).sqrt().tolist()

    @torch.no_grad()
    def _take(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [c] over all ranks; the running ones are to move towards them, the variance unbiased, as in
        torch."""
        count = latents.new_full((1,), latents.numel() / latents.shape[1])
        mean = _over_ranks(torch.cat([latents.sum((0, 2, 3)), count]))
        mean, count = mean[:-1] / mean[-1], mean[-1]
        off = latents - mean.view(1, -1, 1, 1)
        variance = _over_ranks(off.square().sum((0, 2, 3))) / count
        before = self._moved or (self.mean, self.variance)
        after = mean, variance * count / (count - 1)
        self._moved = tuple(old.lerp(new, self.momentum) for old, new in zip(before, after, strict=True))
        return mean, variance


def _over_ranks(sums: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums
