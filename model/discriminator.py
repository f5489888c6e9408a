"""Pictures -> how real each patch looks (PatchGAN; Isola et al. 2017, section 3.2.2).

Letters: B batch, H W pixels."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Each layer halves the picture and doubles the channels, up to eight times as many."""

    width: int = 64
    layers: int = 3
    norm: Literal["group", "batch", "sync"] = "group"
    """batch: each rank's own statistics, as published; sync: those of all ranks, on GPUs only; group: none to share, so
    that real and false pictures go through it together."""

    def __post_init__(self) -> None:
        if self.width % 8 or self.layers < 1:
            raise ValueError("task.discriminator: give a width that is a multiple of 8, and layers of at least 1")


class Discriminator(nn.Module):
    """See the module's head."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * min(2**number, 8) for number in range(config.layers + 1)]
        steps: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for number in range(1, config.layers + 1):
            stride = 2 if number < config.layers else 1
            steps += [
                nn.Conv2d(widths[number - 1], widths[number], 4, stride=stride, padding=1, bias=config.norm == "group"),
                _norm(config.norm, widths[number]),
                nn.LeakyReLU(0.2),
            ]
        self.net = nn.Sequential(*steps, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> logits [B, 1, rows, columns] of patches; above 0 is real."""
        return self.net(pictures)


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(8, width)
    return nn.BatchNorm2d(width) if kind == "batch" else nn.SyncBatchNorm(width)
