"""Predictions and targets -> scalar losses, computed in float32. Letters: B batch, P positions, V vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The target that cross_entropy skips."""


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error per sample: [B, ...], [B, ...] -> [B].

    One loss serves flow matching (Lipman et al., 2023, eq. 14: |v(x_t, t) - (x_1 - x_0)|^2), epsilon prediction
    (Ho et al., 2020, eq. 14) and v prediction (Salimans & Ho, 2022, app. D): `model.noise` names the target of each.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"the decoder predicts {tuple(prediction.shape)} for a target of {tuple(target.shape)}")
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over answer tokens of -log p(token): [B, P, V], [B, P] -> [].

    Position i of `logits` predicts position i + 1 of `targets`; targets equal to IGNORED count for nothing. A batch
    without one answer token gives 0, with a graph, so that every rank takes the same collectives.
    """
    predicted, wanted = logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten()  # [B(P-1), V], [B(P-1)]
    summed = F.cross_entropy(predicted, wanted, ignore_index=IGNORED, reduction="sum")
    return summed / (wanted != IGNORED).sum().clamp(min=1)


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) || N(0, 1)) of each latent value (Kingma & Welling, 2014, app. B), shaped like the arguments."""
    return 0.5 * (mean.float().square() + logvar.float().exp() - 1.0 - logvar.float())
