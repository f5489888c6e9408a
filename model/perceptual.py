"""Two pictures -> how different they look, by the features of a frozen network (LPIPS; Zhang et al. 2018).

With LPIPS's published weights where they are given; else by the features of any target encoder, which need no further
download: a distance of its own, to be named as such. Letters: B batch, H W pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.assets import locate
from model.targets import Grid, Target, TargetConfig, load_target

_VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
_TAPS = (3, 8, 15, 22, 29)  # the last activation before each pooling
_CHANNELS = (64, 128, 256, 512, 512)


@dataclass(frozen=True)
class FeaturesConfig:
    """The features of an encoder."""

    target: TargetConfig
    tokens: int = 16
    """Along the shorter side of the picture."""


@dataclass(frozen=True)
class LPIPSConfig:
    """LPIPS 0.1."""

    path: str = "lpips"
    """A folder with torchvision's `vgg16-397923af.pth` and the `vgg.pth` of LPIPS 0.1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of its convolutions; float32 as published."""


PerceptualConfig = FeaturesConfig | LPIPSConfig


class FeatureDistance:
    """1 - cos of an encoder's features, in the mean over places: [B], from 0 (alike) to 2."""

    def __init__(self, target: Target, tokens: int) -> None:
        self.target, self.tokens = target, tokens

    @property
    def network(self) -> nn.Module:
        """What decides it."""
        return self.target.encoder

    def grid(self, pictures: Tensor) -> Grid:
        """Tokens over pictures [B, 3, H, W]: so many along the shorter side."""
        shorter = min(pictures.shape[-2:])
        return round(self.tokens * pictures.shape[-2] / shorter), round(self.tokens * pictures.shape[-1] / shorter)

    def to(self, device: torch.device | str) -> "FeatureDistance":
        self.target.to(device)
        return self

    def __call__(self, rebuilt: Tensor, pictures: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] twice -> [B]; the gradient goes to the first alone. `wanted` [B, N, E] are the
        features of the second where they are known."""
        grid = self.grid(pictures)
        if wanted is None:
            with torch.no_grad():
                wanted = self.target(pictures, grid)  # [B, N, E]
        return (1 - F.cosine_similarity(self.target(rebuilt, grid), wanted, dim=-1)).mean(1)


class LPIPS(nn.Module):
    """The published distance over VGG-16, version 0.1."""

    shift: Tensor
    scale: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype  # of the convolutions
        layers: list[nn.Module] = []
        before = 3
        for width in _VGG:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(before, int(width), 3, padding=1), nn.ReLU()]
                before = int(width)
        self.features = nn.Sequential(*layers)
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(channels)) for channels in _CHANNELS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    @property
    def network(self) -> nn.Module:
        """What decides it."""
        return self

    def forward(self, rebuilt: Tensor, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] twice -> [B]; the gradient goes to the first alone."""
        with torch.no_grad():
            wanted = self._taps(pictures)
        parts = [
            ((F.normalize(a.float(), eps=1e-10) - F.normalize(b.float(), eps=1e-10)).square() * w.view(1, -1, 1, 1))
            .sum(1)
            .mean((1, 2))
            for a, b, w in zip(self._taps(rebuilt), wanted, self.weights, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def _taps(self, pixels: Tensor) -> list[Tensor]:
        x, taps = (pixels.float() - self.shift) / self.scale, []
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for number, layer in enumerate(self.features):
                x = layer(x)
                if number in _TAPS:
                    taps.append(x)
        return taps


Perceptual = FeatureDistance | LPIPS


def load_perceptual(config: PerceptualConfig, loaded: Sequence[Target] = ()) -> Perceptual:
    """The frozen distance that `config` names, on CPU, by an encoder that is `loaded` already where it is the same.
    ValueError when its weights are missing."""
    if isinstance(config, FeaturesConfig):
        known = next((target for target in loaded if target.config == config.target), None)
        return FeatureDistance(known or load_target(config.target), config.tokens)
    folder = locate(config.path)
    files = [] if folder is None else [folder / "vgg16-397923af.pth", folder / "vgg.pth"]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"perceptual.path {config.path!r} lacks vgg16-397923af.pth (of torchvision) or vgg.pth (of LPIPS 0.1); "
            "put both into one folder, or take the features of an encoder"
        )
    trunk, linear = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
    distance = LPIPS(getattr(torch, config.dtype))
    distance.features.load_state_dict(
        {k.removeprefix("features."): v for k, v in trunk.items() if k.startswith("features.")}
    )
    for number, weight in enumerate(distance.weights):
        weight.data.copy_(linear[f"lin{number}.model.1.weight"].flatten())
    return distance.eval().requires_grad_(False)
