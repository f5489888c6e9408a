"""Trained weights -> their exponential moving average, kept beside the optimizer's moments and sharded as they are.

The half-life counts images, not steps, so that a changed batch size keeps the same average (Karras et al., 2024, EDM2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EmaConfig:
    """How slowly the average follows the weights."""

    halflife_images: int = 50_000
    """Images after which a weight counts half; 0 makes the average equal to the weights."""
    rampup: float = 0.05
    """The half-life is at most this fraction of the images seen, so that a short run is not an average of its start."""

    def __post_init__(self) -> None:
        if self.halflife_images < 0:
            raise ValueError(f"ema.halflife_images is {self.halflife_images}; give 0 or more")
        if self.rampup <= 0:
            raise ValueError(f"ema.rampup is {self.rampup}; give a number above 0")


def decay(config: EmaConfig, images_seen: int, images: int) -> float:
    """The EMA decay of a step on `images` images, the last of `images_seen`: 0.5 ** (images / half-life)."""
    halflife = min(float(config.halflife_images), config.rampup * images_seen)
    return 0.5 ** (images / halflife) if halflife > 0 else 0.0


@torch.no_grad()
def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], keep: float) -> None:
    """average <- keep * average + (1 - keep) * weight, in place."""
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight, 1 - keep)
