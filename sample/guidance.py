"""Predictions under several conditions -> one guided prediction.

Every guidance here is a weighted sum of branches: text guidance (Ho & Salimans 2022, eq. 6) is (1 - s) null + s text;
image and text (InstructPix2Pix, eq. 3) is (1 - s_I) null + (s_I - s_T) image + s_T both. A branch of weight 0 is not run.

Shape letters: B batch, L conditioning tokens, C conditioning width, c h w latent channels, height, width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sample.settings import Guidance

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, c, h, w], t [B]) -> prediction [B, c, h, w]."""


@dataclass(frozen=True)
class Branch:
    """A weight and what this branch is conditioned on, [B, L, C]."""

    weight: float
    condition: Tensor


def guided(predict: Callable[[Tensor, Tensor, Tensor], Tensor], branches: Sequence[Branch], guidance: Guidance) -> Predict:
    """The weighted sum of the branches, run as one batch; the last branch is the full condition."""
    active = [branch for branch in branches if branch.weight != 0]
    conditions = torch.cat([branch.condition for branch in active])  # [branches * B, L, C]
    everywhere = guidance.start == 0 and guidance.end == 1
    alone = len(active) == 1 and (everywhere or active[0] is branches[-1])

    def predict_under(condition: Tensor) -> Predict:
        return lambda x, t: predict(x, t, condition)

    def predict_guided(x: Tensor, t: Tensor) -> Tensor:
        if not (everywhere or guidance.start <= t[0].item() <= guidance.end):
            return predict(x, t, branches[-1].condition)
        repeats = len(active)
        every = predict(x.repeat(repeats, 1, 1, 1), t.repeat(repeats), conditions).chunk(repeats)
        mixed = torch.stack([b.weight * p for b, p in zip(active, every, strict=True)]).sum(0)  # [B, c, h, w]
        return rescaled(mixed, every[-1], guidance.rescale)

    return predict_under(conditions) if alone else predict_guided


def rescaled(guided_prediction: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Moves the deviation over each picture [B, c, h, w] by `share` towards that of the conditional prediction."""
    if share == 0:
        return guided_prediction
    dims = (1, 2, 3)
    ratio = conditional.std(dims, keepdim=True) / guided_prediction.std(dims, keepdim=True)
    return guided_prediction * (share * ratio + 1 - share)
