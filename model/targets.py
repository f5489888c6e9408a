"""Pictures -> features of a frozen vision encoder, one for each token of a grid: what a diffusion transformer or a VAE is
aligned with (REPA; Yu et al. 2025).

The encoder is one of transformers' families in `_FAMILIES`, chosen by its type, or the vision tower of an MLLM. Each has
its own preprocessing, patch size and extra tokens; where it takes pictures of any size, they are scaled so that it has one
patch for each token that is asked for. Letters: B batch, H W pixels, N tokens of the grid in reading order, E width."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.image_processing_base import ImageProcessingMixin

from model.hub import Source, fetched, weights
from model.vision import batch_equal_pictures

Grid = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class TargetConfig:
    """Which encoder: a folder in the hub's layout, or a hub id at a revision. Of an MLLM, its vision tower."""

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    antialias: bool = True
    """Average over what becomes one pixel where a picture is made smaller; the published REPA does not."""


class Target:
    """A frozen encoder. Gradients go through it to the pixels, where they are asked for."""

    def __init__(self, config: TargetConfig, encoder: Any, mean: list[float], std: list[float], width: int) -> None:
        self.config, self.width = config, width
        self.encoder: Any = encoder.eval().requires_grad_(False)  # Any: classes of many families
        self._mean, self._std = (torch.tensor(part).view(1, 3, 1, 1) for part in (mean, std))

    def to(self, device: torch.device | str) -> "Target":
        """Move in place; returns itself."""
        self.encoder.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._mean.device

    def __call__(self, pixels: Tensor, grid: Grid) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> features [B, N, E], float32."""
        with torch.autocast(pixels.device.type, enabled=False):
            tokens, own = self._tokens(self._scaled(pixels, self._size(grid)).to(self._dtype))
        return regrid(tokens.float(), own, grid)

    def _size(self, grid: Grid) -> tuple[int, int]:
        """Pixels, rows and columns, that the encoder is shown for a grid of tokens."""
        patch = self.encoder.config.patch_size
        return grid[0] * patch, grid[1] * patch

    def _tokens(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        raise NotImplementedError

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def _scaled(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels in [-1, 1] of any size -> of this size, in the encoder's own range."""
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels.float(), size, mode="bicubic", antialias=self.config.antialias)
        return (pixels.float() * 0.5 + 0.5 - self._mean) / self._std


class VisionTarget(Target):
    """A vision transformer whose patches follow `leading` tokens that stand for no place."""

    def __init__(self, config: TargetConfig, encoder: Any, mean: list[float], std: list[float], leading: int) -> None:
        super().__init__(config, encoder, mean, std, encoder.config.hidden_size)
        self.leading = leading
        self._options: dict[str, Any] = {"interpolate_pos_encoding": True} if encoder.config.model_type in _ASKED else {}

    def _tokens(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        patch = self.encoder.config.patch_size
        grid = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        options = self._options
        if self.encoder.config.model_type == "vit_mae":  # it hides the patches of highest noise, and sorts the rest by it
            options = options | {
                "noise": torch.arange(grid[0] * grid[1], device=pixels.device).float().expand(len(pixels), -1)
            }
        hidden = self.encoder(pixel_values=pixels, **options).last_hidden_state  # [B, leading + N, E]
        return hidden[:, self.leading :], grid


class FixedTarget(VisionTarget):
    """One that takes pictures of its own size alone; its features are interpolated to the grid."""

    def _size(self, grid: Grid) -> tuple[int, int]:
        return self.encoder.config.image_size, self.encoder.config.image_size


class QwenTarget(Target):
    """The vision tower of a Qwen2.5-VL: a feature for each token that its language model would read."""

    def __init__(self, config: TargetConfig, encoder: Any, mean: list[float], std: list[float]) -> None:
        super().__init__(config, encoder, mean, std, encoder.config.out_hidden_size)
        self._batched = False

    def _size(self, grid: Grid) -> tuple[int, int]:
        cell = self.encoder.config.patch_size * self.encoder.config.spatial_merge_size
        rows, columns = (max(1, round(side / self.encoder.config.spatial_merge_size)) for side in grid)
        return rows * cell, columns * cell

    def _tokens(self, pixels: Tensor) -> tuple[Tensor, Grid]:
        if pixels.device.type == "cpu" and not self._batched:  # on a GPU it would wait to see that all are of one size
            batch_equal_pictures(self.encoder)
            self._batched = True
        settings = self.encoder.config
        patch, merge, times = settings.patch_size, settings.spatial_merge_size, settings.temporal_patch_size
        batch, _, height, width = pixels.shape
        rows, columns = height // patch, width // patch
        cut = pixels.reshape(batch, 3, rows // merge, merge, patch, columns // merge, merge, patch)
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, rows, columns, merge, merge, 3, patch, patch]
        patches = cut.unsqueeze(-3).expand(*cut.shape[:-2], times, patch, patch).flatten(5).flatten(0, 4)
        grids = torch.tensor([[1, rows, columns]] * batch, device=pixels.device)
        seen = self.encoder(patches, grid_thw=grids).pooler_output  # [B N, E]
        return seen.unflatten(0, (batch, -1)), (rows // merge, columns // merge)


def load_target(config: TargetConfig) -> Target:
    """The frozen encoder that `config` names, on CPU. ValueError when it is missing or of a family we do not know."""
    source = Source("target.path", config.path, config.revision)
    kind = fetched(source, AutoConfig.from_pretrained, trust_remote_code=False).model_type
    settings, _ = fetched(source, ImageProcessingMixin.get_image_processor_dict)
    mean, std = settings["image_mean"], settings["image_std"]
    options = {"dtype": getattr(torch, config.dtype), "trust_remote_code": False}
    if kind == "qwen2_5_vl":
        model = weights(source, AutoModelForImageTextToText, **options)
        return QwenTarget(config, model.model.visual, mean, std)
    if kind not in _FAMILIES:
        raise ValueError(f"target.path {config.path!r} is a {kind}; supported are {', '.join([*_FAMILIES, 'qwen2_5_vl'])}")
    family, leading = _FAMILIES[kind]
    if kind == "vit_mae":
        options["mask_ratio"] = 0.0
    encoder = weights(source, AutoModel, **options)
    return family(config, getattr(encoder, "vision_model", encoder), mean, std, leading(encoder.config))


def regrid(tokens: Tensor, own: Grid, grid: Grid) -> Tensor:
    """Tokens [B, n, E] of one grid -> [B, N, E] of another, interpolated between their places."""
    if own == grid:
        return tokens
    picture = tokens.unflatten(1, own).permute(0, 3, 1, 2)  # [B, E, rows, columns]
    return F.interpolate(picture, grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


_ASKED = {"siglip_vision_model", "clip_vision_model", "vit_mae", "ijepa"}
"""Families that interpolate their positions when told to; the others do so unasked, or have none to interpolate."""

_FAMILIES: dict[str, tuple[type[VisionTarget], Callable[[Any], int]]] = {
    "dinov2": (VisionTarget, lambda config: 1),
    "dinov2_with_registers": (VisionTarget, lambda config: 1 + config.num_register_tokens),
    "dinov3_vit": (VisionTarget, lambda config: 1 + config.num_register_tokens),
    "siglip": (VisionTarget, lambda config: 0),  # SigLIP 2 of a fixed resolution says that it is one too
    "siglip_vision_model": (VisionTarget, lambda config: 0),
    "clip": (VisionTarget, lambda config: 1),
    "clip_vision_model": (VisionTarget, lambda config: 1),
    "aimv2": (FixedTarget, lambda config: 0),
    "aimv2_vision_model": (FixedTarget, lambda config: 0),
    "vit_mae": (VisionTarget, lambda config: 1),
    "ijepa": (VisionTarget, lambda config: 0),
}
