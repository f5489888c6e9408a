"""Pictures -> a VAE: one step of reconstruction, before any diffusion model is there. No GAN, no perceptual loss.

Letters: B batch, H W pixels, c h w latent channels, height, width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor

from data.batch import LabelledBatch, LabelledCollate
from data.loader import Loader
from data.transforms import to_pil, unit
from model.assets import fingerprint, tensors_of
from model.autoencoder import Autoencoder
from model.files import atomic_folder, check_match, write_whole
from model.noise import noise
from model.vae import VAEConfig, load_vae
from sample.grid import Cell, Row, table
from train.engine import Engine
from train.loss import gaussian_kl
from train.ranks import Ranks
from train.task import LoaderTask, engine_for, loader_for

if TYPE_CHECKING:
    from train.config import Run


@dataclass(frozen=True)
class AutoencoderTaskConfig:
    """The shape of the VAE: each entry of `channels` after the first halves the picture."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 4
    layers_per_block: int = 2
    groups: int = 32
    """Channels are normalised in this many groups."""
    attention: bool = True
    """Self-attention in the middle block."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence per latent value, against the reconstruction error per pixel value."""
    init: str | None = None
    """The release of an earlier run of the same shape to go on from. None: fresh weights."""
    decoder_only: bool = False
    """Leave the encoder of `init` and its latents bit for bit as they are, for what was trained on them."""

    def __post_init__(self) -> None:
        if self.decoder_only and self.init is None:
            raise ValueError("task.decoder_only keeps the encoder of task.init; name the release to take it from")

    def build(self, run: Run, ranks: Ranks) -> AutoencoderTask:
        """A VAE, fresh or that of `init`, in an engine."""
        if run.data.task != "labelled":
            raise ValueError(f"data.task is {run.data.task}; an autoencoder learns from labelled pictures")
        module = Codec(self)
        kept = module.start(self.init) if self.init is not None else None
        if self.decoder_only:
            for part in (module.autoencoder.encoder, module.autoencoder.quant_conv):
                part.requires_grad_(False)
        if run.data.image_size % module.factor:
            raise ValueError(f"data.image_size is {run.data.image_size}; give a multiple of {module.factor}")
        loader = loader_for(LabelledCollate(run.data.image_size), run, ranks)
        engine = engine_for(module, run, ranks)
        return AutoencoderTask(self, module, kept if self.decoder_only else None, engine, loader, run.seed, ranks)


class Codec(Autoencoder):
    """A fresh AutoencoderKL of the config's shape."""

    def __init__(self, config: AutoencoderTaskConfig):
        levels = len(config.channels)
        autoencoder: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
            block_out_channels=config.channels,  # pyright: ignore[reportArgumentType]
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.groups,
            mid_block_add_attention=config.attention,
        )
        super().__init__(autoencoder)
        logvar = slice(config.latent_channels, None)
        with torch.no_grad():  # a posterior as wide as the prior would drown what the encoder says at first
            autoencoder.quant_conv.bias[logvar] -= 4.0

    def start(self, release: str) -> Any:
        """Take over the weights of a release, and return its autoencoder. Raises ValueError when its shape is another."""
        found: Any = load_vae(VAEConfig(release)).autoencoder
        tensors = found.state_dict()
        check_match(tensors, self.autoencoder.state_dict(), Path(release))
        self.autoencoder.load_state_dict(tensors)
        return found


class AutoencoderTask(LoaderTask):
    """Trains encoder and decoder; the release carries the mean and deviation of each latent channel."""

    def __init__(
        self,
        config: AutoencoderTaskConfig,
        module: Codec,
        kept: Any,
        engine: Engine,
        loader: Loader,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self.config, self.module, self.engine, self.loader = config, module, engine, loader
        self.kept = kept  # the autoencoder whose encoder the release takes over, or None
        self.seed, self.ranks = seed, ranks
        self.shown = loader.first() if ranks.first else None
        self.engines = {"main": engine}

    def step(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """Absolute plus squared error of the reconstruction, and `kl_weight` times the posterior's KL divergence.

        The absolute error alone would be content to paint small things in the colour of what surrounds them."""
        eps = noise(batch.index, self.seed, self.module.latent_shape(batch.levels)).to(self.ranks.device)
        batch = batch.to(self.ranks.device)
        pixels = batch.pixels  # [B, 3, H, W]
        _, mean, logvar, rebuilt = self.engine(pixels, eps)  # see Coded
        off = rebuilt.float() - pixels  # [B, 3, H, W]
        absolute, squared = off.abs().mean(), off.square().mean()
        kl = gaussian_kl(mean, logvar).mean()
        self.engine.backward(absolute + squared + self.config.kl_weight * kl)
        self.engine.step()
        return {"l1": absolute.detach(), "mse": squared.detach(), "kl": kl.detach()}

    def frozen(self) -> dict[str, str]:
        """The encoder where it stays."""
        if self.kept is None:
            return {}
        stays = ("encoder.", "quant_conv.")
        return {"encoder": fingerprint({n: t for n, t in tensors_of(self.kept).items() if n.startswith(stays)})}

    def preview(self, folder: Path, step: int) -> None:
        """Eight pictures beside their reconstructions: previews/step-00000500.png."""
        with self.engine.averaged():
            if self.shown is not None:
                pixels = unit(self.shown.levels[:8].to(self.ranks.device))
                rebuilt = self.module.autoencoder(pixels.to(self.module.autoencoder.dtype)).sample
                compare(pixels, rebuilt.float(), ("picture", "rebuilt"), folder / f"step-{step:08d}.png")

    def release(self, folder: Path) -> None:
        """A folder that `AutoencoderKL.from_pretrained` loads, with `latents_mean` and `latents_std` over 2,048 pictures."""
        with self.engine.averaged():
            if not self.ranks.first:
                return
            autoencoder = self.module.autoencoder
            if self.kept is None:
                autoencoder.register_to_config(**self._statistics())
            else:  # the engine may have rounded what it does not train
                self.kept.decoder, self.kept.post_quant_conv = autoencoder.decoder, autoencoder.post_quant_conv
                autoencoder = self.kept
            with atomic_folder(folder) as draft:
                autoencoder.save_pretrained(draft)

    def _statistics(self) -> dict[str, list[float]]:
        """Mean and deviation of each latent channel over 2,048 pictures."""
        latents, autoencoder = [], self.module.autoencoder
        for batch in self.batches(0):
            pixels = unit(batch.levels.to(self.ranks.device)).to(autoencoder.dtype)
            latents.append(autoencoder.encode(pixels).latent_dist.mean.float())  # [B, c, h, w]
            if sum(len(part) for part in latents) >= 2048:
                break
        values = torch.cat(latents)
        return {"latents_mean": values.mean(dim=(0, 2, 3)).tolist(), "latents_std": values.std(dim=(0, 2, 3)).tolist()}


def compare(left: Tensor, right: Tensor, headings: tuple[str, str], path: Path) -> None:
    """Two batches of pictures [B, 3, H, W] in [-1, 1] side by side, as one PNG."""
    pairs = zip(left.clamp(-1, 1).cpu(), right.clamp(-1, 1).cpu(), strict=True)
    rows = [Row("", (Cell(to_pil(a)), Cell(to_pil(b)))) for a, b in pairs]
    picture = table(headings, rows, caption_pixels=0)
    write_whole(path, lambda part: picture.save(part, "PNG"))
