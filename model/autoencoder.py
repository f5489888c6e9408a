"""Pixels -> latents and their reconstruction, in the one forward that a training engine needs.

Any autoencoder of diffusers that encodes to a gaussian (AutoencoderKL) or to a point (AutoencoderDC). Letters: B batch,
R pictures that are decoded, H W pixels, c h w latent channels, height, width."""

from typing import Any, NamedTuple

from diffusers import AutoencoderDC  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from model.vae import factor_of


class Coded(NamedTuple):
    """A tuple, because ZeRO-3 looks for tensors in outputs and looks into no dataclass."""

    latents: Tensor  # [B, c, h, w], drawn from the posterior; raw, not of unit variance
    mean: Tensor  # [B, c, h, w], the posterior's
    logvar: Tensor  # [B, c, h, w]; of an encoder without a posterior, minus infinity
    rebuilt: Tensor  # [R, 3, H, W], pictures in [-1, 1], not clamped


class Autoencoder(nn.Module):
    """diffusers' autoencoder, trainable."""

    def __init__(self, autoencoder: Any) -> None:  # Any: diffusers' annotations lag behind its signatures
        super().__init__()
        self.autoencoder = autoencoder

    @property
    def gaussian(self) -> bool:
        """Whether it encodes to a posterior."""
        return not isinstance(self.autoencoder, AutoencoderDC)

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.config.latent_channels

    @property
    def factor(self) -> int:
        """Pixels along a side of a latent value."""
        return factor_of(self.autoencoder)

    def latent_shape(self, pixels: Tensor) -> tuple[int, int, int]:
        """(c, h, w) of the latents of pixels [B, 3, H, W]."""
        height, width = pixels.shape[-2:]
        return self.latent_channels, height // self.factor, width // self.factor

    def forward(self, pixels: Tensor, eps: Tensor, decoded: int | None = None) -> Coded:
        """Pixels [B, 3, H, W] in [-1, 1], gaussian eps [B, c, h, w]; the first `decoded` pictures are rebuilt, None: all."""
        encoded = self.autoencoder.encode(pixels)
        if "latent" in encoded:
            mean = latents = encoded.latent  # [B, c, h, w]
            logvar = mean.new_full(mean.shape, float("-inf"))
        else:
            posterior = encoded.latent_dist
            mean, logvar = posterior.mean, posterior.logvar
            latents = mean + posterior.std * eps.to(mean.dtype)
        rebuilt = pixels[:0] if decoded == 0 else self.autoencoder.decode(latents[:decoded]).sample  # [R, 3, H, W]
        return Coded(latents, mean, logvar, rebuilt)
