"""Pixels <-> unit-variance latents, through a frozen autoencoder of diffusers.

Three spaces: pixels in [-1, 1] -> raw latents (the encoder's mean) -> latents (shifted and scaled to unit variance).
Letters: B batch, H W pixels, c h w latent channels, height, width."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderDC, AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from model.assets import locate
from model.hub import Source, fetched
from model.hub import weights as read_weights


@dataclass(frozen=True)
class VAEConfig:
    """Which autoencoder: a folder in diffusers' layout or a hub id; of a pipeline, its `vae`."""

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


_CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}


def load_vae(config: VAEConfig, weights: bool = True) -> "LatentVAE":
    """The frozen autoencoder on CPU; without `weights` a fresh one of its shape, on torch's default device. ValueError when
    it is missing or of a class we do not know."""
    source = Source("vae.path", config.path, config.revision)
    options = {} if _is_standalone(source) else {"subfolder": "vae"}
    settings = fetched(source, AutoencoderKL.load_config, **options)
    name, dtype = settings.get("_class_name"), getattr(torch, config.dtype)
    if name not in _CLASSES:
        raise ValueError(f"vae.path {config.path!r} is a {name}; supported are {', '.join(_CLASSES)}")
    if not weights:
        autoencoder: Any = _CLASSES[name].from_config(settings)
        return LatentVAE(nn.Module.to(autoencoder, dtype))  # diffusers' own `to` warns of what it does not do
    options |= {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    return LatentVAE(read_weights(source, _CLASSES[name], **options))


def _is_standalone(source: Source) -> bool:
    """Whether the autoencoder is the thing named, and no part of a pipeline."""
    folder = locate(source.path)
    if folder is not None:
        return (folder / "config.json").is_file()
    try:
        AutoencoderKL.load_config(source.path, revision=source.revision)
    except OSError:
        return False
    return True


def factor_of(autoencoder: Any) -> int:
    """Pixels along a side of a latent value, of one of diffusers' autoencoders."""
    blocks = autoencoder.config.get("block_out_channels") or autoencoder.config.encoder_block_out_channels
    return 2 ** (len(blocks) - 1)


class LatentVAE:
    """A frozen autoencoder whose latents have mean 0 and variance 1.

    The statistics come from its own config: `latents_mean` and `latents_std` per channel where present, else the
    scalar `shift_factor` and `scaling_factor`."""

    def __init__(self, autoencoder: Any):
        # Any: diffusers' annotations know neither its configs nor its outputs
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        config = self.autoencoder.config
        self.latent_channels: int = config.latent_channels
        self.factor = factor_of(self.autoencoder)  # H / h
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            mean = [config.get("shift_factor") or 0.0] * self.latent_channels
            std = [1.0 / config.scaling_factor] * self.latent_channels
        self.statistics: tuple[list[float], list[float]] = (list(mean), list(std))  # of each channel of raw latents
        self._mean = torch.tensor(mean).reshape(1, -1, 1, 1)
        self._std = torch.tensor(std).reshape(1, -1, 1, 1)

    def to(self, device: torch.device | str) -> "LatentVAE":
        """Move in place; returns itself."""
        self.autoencoder.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> latents [B, c, h, w] of unit variance (the posterior's mean)."""
        encoded = self.autoencoder.encode(pixels.to(self.autoencoder.dtype))
        raw = encoded.latent if "latent" in encoded else encoded.latent_dist.mode()  # [B, c, h, w]
        return (raw.float() - self._mean) / self._std

    def raw(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w] of unit variance -> those that the autoencoder itself speaks of."""
        latents = latents.float()
        return latents * self._std.to(latents.device) + self._mean.to(latents.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, c, h, w] of unit variance -> pixels [B, 3, H, W], clamped to [-1, 1]."""
        raw = self.raw(latents)
        return self.autoencoder.decode(raw.to(self.autoencoder.dtype)).sample.float().clamp(-1, 1)
