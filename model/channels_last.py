"""Convolutions -> the same, their values in memory channel by channel of each place: what a GPU's tensor cores read.

It pays where norms and activations are compiled; torch's own group norm would copy to the other order and back."""

import torch
from torch import Tensor, nn


class ChannelsLastConv(nn.Conv2d):
    """Its input is put in order, not its weight: an optimizer that flattens weights forgets their order."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, c, h, w] -> [B, c', h', w']."""
        return super().forward(input.contiguous(memory_format=torch.channels_last))


def channels_last(module: nn.Module) -> int:
    """Exchange, in place, every plain convolution over pictures, and say how many. Names and parameters stay as they are."""
    found = [part for part in module.modules() if type(part) is nn.Conv2d]
    for part in found:
        part.__class__ = ChannelsLastConv
    return len(found)
