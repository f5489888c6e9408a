"""Nearest-neighbour upsampling and the convolution after it -> one transposed convolution, the same to rounding.

A third of the products of an AutoencoderKL's decoder are such convolutions, over pictures that hold each value four times.
Letters: B batch, c channels, h w rows, columns."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class UpsampledConv(nn.Conv2d):
    """A 3 x 3 convolution of what would be upsampled twofold: 16 products a value where that takes 36.

    Along a row, (a, b, c) over .. x x y y z z .. makes a x + (b + c) y and (a + b) y + c z where y was: each value adds c,
    b + c, a + b and a of itself to the four places around it."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, c', 2 h, 2 w]."""
        weight = spread(self.weight.float() if self.weight.dtype == torch.bfloat16 else self.weight)  # its sums want digits
        return F.conv_transpose2d(input, weight.to(self.weight.dtype), self.bias, stride=2, padding=1)


def spread(weight: Tensor) -> Tensor:
    """The weight [c', c, 3, 3] of a convolution over upsampled values -> [c, c', 4, 4] of the transposed one."""
    turned = weight.flip(2, 3).transpose(0, 1)  # [c, c', 3, 3]: a transposed convolution reads its kernel backwards
    rows = F.pad(turned, (0, 0, 0, 1)) + F.pad(turned, (0, 0, 1, 0))  # [c, c', 4, 3]
    return F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))


def merge_upsampling(autoencoder: Any) -> int:
    """Exchange, in place, every upsampling of diffusers that a 3 x 3 convolution follows, and say how many. Names and
    parameters stay as they are."""
    count = 0
    for module in autoencoder.modules():
        if isinstance(module, Upsample2D) and module.interpolate and isinstance(module.conv, nn.Conv2d):
            if module.conv.kernel_size != (3, 3) or module.conv.padding != (1, 1):
                continue
            module.interpolate = False
            module.conv.__class__ = UpsampledConv
            count += 1
    return count


def split_upsampling(autoencoder: Any) -> None:
    """Undo `merge_upsampling`, for comparison."""
    for module in autoencoder.modules():
        if isinstance(module, Upsample2D) and isinstance(module.conv, UpsampledConv):
            module.interpolate = True
            module.conv.__class__ = nn.Conv2d  # pyright: ignore[reportAttributeAccessIssue]
