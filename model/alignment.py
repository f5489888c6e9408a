"""A diffusion transformer's hidden tokens -> guesses at what frozen encoders see there, and how far off they are.

Letters: B batch, N tokens in reading order, D width of the transformer, E width of an encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.targets import Grid


@dataclass(frozen=True)
class ProjectorConfig:
    """mlp: REPA's, token by token (Yu et al. 2025); conv: iREPA's 3 x 3 convolution, whose targets lose their spatial mean
    (Singh et al. 2025)."""

    kind: Literal["mlp", "conv"] = "mlp"
    width: int = 2048
    """Of the hidden layers of mlp."""
    spatial_norm: float = 0.6
    """conv: how much of the mean over places is taken off each target channel before it is scaled to unit deviation."""


class MLPProjector(nn.Module):
    """[B, N, D] -> [B, N, E], each token alone."""

    def __init__(self, width: int, out_width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out_width)
        )

    def forward(self, hidden: Tensor, grid: Grid) -> Tensor:
        return self.layers(hidden)

    def prepare(self, target: Tensor) -> Tensor:
        return target


class ConvProjector(nn.Module):
    """[B, N, D] -> [B, N, E], each token with its neighbours on the grid."""

    def __init__(self, width: int, out_width: int, spatial_norm: float) -> None:
        super().__init__()
        self.spatial_norm = spatial_norm
        self.conv = nn.Conv2d(width, out_width, 3, padding=1)

    def forward(self, hidden: Tensor, grid: Grid) -> Tensor:
        picture = hidden.transpose(1, 2).unflatten(2, grid)  # [B, D, rows, columns]
        return self.conv(picture).flatten(2).transpose(1, 2)

    def prepare(self, target: Tensor) -> Tensor:
        """What is alike everywhere in the picture says little about places."""
        off = target - self.spatial_norm * target.mean(1, keepdim=True)
        return off / (off.std(1, keepdim=True) + 1e-6)


def build_projector(config: ProjectorConfig, width: int, out_width: int) -> MLPProjector | ConvProjector:
    """The projector from tokens of `width` to an encoder's features."""
    if config.kind == "mlp":
        return MLPProjector(width, out_width, config.width)
    return ConvProjector(width, out_width, config.spatial_norm)


def alignment(guesses: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """-cos between guess and target, [B, N, E] each, in the mean over tokens and encoders (REPA, eq. 8): []."""
    parts = [-F.cosine_similarity(g.float(), t.float(), dim=-1).mean() for g, t in zip(guesses, targets, strict=True)]
    return torch.stack(parts).mean()
