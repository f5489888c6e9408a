"""Predictions and targets -> scalar losses, computed in float32. Letters: B batch."""

from __future__ import annotations

from torch import Tensor


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error per sample: [B, ...], [B, ...] -> [B].

    One loss serves flow matching (Lipman et al., 2023, eq. 14: |v(x_t, t) - (x_1 - x_0)|^2), epsilon prediction
    (Ho et al., 2020, eq. 14) and v prediction (Salimans & Ho, 2022, app. D): `model.noise` names the target of each.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"the decoder predicts {tuple(prediction.shape)} for a target of {tuple(target.shape)}")
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) || N(0, 1)) of each latent value (Kingma & Welling, 2014, app. B), shaped like the arguments."""
    return 0.5 * (mean.float().square() + logvar.float().exp() - 1.0 - logvar.float())


def hinge(real: Tensor, false: Tensor) -> Tensor:
    """What a discriminator learns from its logits of real pictures and of false ones (Lim & Ye, 2017): []."""
    return 0.5 * ((1 - real).relu().mean() + (1 + false).relu().mean())
