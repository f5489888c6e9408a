"""SiT: noisy latents, a time and conditioning tokens -> the prediction, and the hidden layer to align.

A diffusion transformer (Peebles & Xie 2022; Ma et al. 2024). The conditioning tokens join the sequence (in_context) or are
looked up in every block (cross_attention), and their mean joins the time in the modulation; or it alone does (modulation).
Letters: B batch, c h w latent channels, height, width, N latent tokens, L conditioning tokens, S = L + N (in context)
or N, C conditioning width, D width."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import CrossAttention, SelfAttention

SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
"""Depth, width and heads as published (Ma et al. 2024)."""


@dataclass(frozen=True)
class SiTConfig:
    """Shape of a SiT.

    `shared_modulation`: one modulation for all blocks plus a table per block (adaLN-single, a third fewer parameters);
    otherwise adaLN-Zero per block, as published. `align_depth`: where an alignment loss looks. The rest as published:
    conditioning="modulation", qk_norm=False, time_scale=1."""

    latent_channels: int
    latent_size: int  # h = w that it is trained at; other grids are laid about the same middle
    patch: int = 1
    width: int = 384
    depth: int = 12
    heads: int = 6
    condition_width: int = 384
    condition_tokens: int = 64  # the most that a call may bring
    conditioning: Literal["in_context", "cross_attention", "modulation"] = "in_context"
    shared_modulation: bool = True
    align_depth: int = 4
    spacing: float = 1.0
    """From token to token in the table of positions. Half, with half the patch, leaves every place its position, so that
    a finer SiT can go on from a coarser one."""
    positions: Literal["sincos", "stored"] = "sincos"
    """stored: a table of its own, never trained, as a converted checkpoint may bring one."""
    qk_norm: bool = True
    time_scale: float = 1000.0
    """What times in [0, 1] are multiplied with before their sines and cosines are taken."""
    activation_checkpointing: bool = False

    def check_tokens(self, count: int, field: str) -> None:
        """ValueError where a call may not bring as many conditioning tokens as `field` of a run makes."""
        if self.conditioning != "modulation" and count > self.condition_tokens:
            raise ValueError(
                f"{field} makes {count} conditioning tokens and the SiT takes {self.condition_tokens}; lower it, or raise "
                "task.sit.condition_tokens"
            )


class SiTOutput(NamedTuple):
    """`hidden` holds the latent tokens after the block that was asked for. A tuple, because ZeRO-3 gathers parameters for
    the backward pass by looking for tensors in outputs, and looks into no dataclass."""

    prediction: Any  # Tensor [B, c, h, w]; None where the pass stopped before it
    hidden: Tensor | None = None  # [B, N, D]


class SiT(nn.Module):
    """See the module's head. A fresh SiT predicts exactly zero (adaLN-Zero)."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        _validate(config)
        self.config = config
        width, patch_values = config.width, config.latent_channels * config.patch**2
        self.embed = nn.Linear(patch_values, width)
        self.position: Tensor
        side = config.latent_size // config.patch
        position = sincos_2d(width, (side, side), side, config.spacing)  # [N, D]
        self.register_buffer("position", position, persistent=config.positions == "stored")
        self.embed_time = TimeEmbedding(width, config.time_scale)
        self.embed_condition = self.condition_position = None
        if config.conditioning != "modulation":
            self.embed_condition = nn.Sequential(
                nn.Linear(config.condition_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
            )
            # zero: the order of the conditioning tokens starts unused
            self.condition_position = nn.Parameter(torch.zeros(config.condition_tokens, width))
        self.modulation = Modulation(width, 6) if config.shared_modulation else None
        self.blocks = nn.ModuleList(SiTBlock(config) for _ in range(config.depth))
        self.final_modulation = Modulation(width, 2)
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.unembed = nn.Linear(width, patch_values)
        self._init_weights()

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens that latents [B, c, h, w] are cut into. ValueError where they do not divide."""
        (height, width), patch = latents.shape[-2:], self.config.patch
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width} do not divide into patches of {patch} x {patch}; resize them")
        return height // patch, width // patch

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Tensor,
        hidden_at: int | None = None,
        stop: bool = False,
    ) -> SiTOutput:
        """x_t [B, c, h, w], t [B] in [0, 1], condition [B, L, C] -> float32 prediction [B, c, h, w], and the latent tokens
        after block number `hidden_at`; with `stop` these alone, the blocks after it not run."""
        dtype = self.embed.weight.dtype
        condition = condition.to(dtype)  # [B, L, C]
        if self.embed_condition is not None and self.condition_position is not None:
            if condition.shape[1] > len(self.condition_position):
                raise ValueError(
                    f"{condition.shape[1]} conditioning tokens for a SiT that takes {len(self.condition_position)}"
                )
            condition = self.embed_condition(condition)  # [B, L, D]
            condition = condition + self.condition_position[: condition.shape[1]]
        time = self.embed_time(t) + condition.mean(1)  # [B, D]
        x = self.embed(patchify(x_t.to(dtype), self.config.patch)) + self._positions(x_t).to(dtype)  # [B, N, D]
        tokens = x.shape[1]
        context = condition if self.config.conditioning == "cross_attention" else None
        if self.config.conditioning == "in_context":
            x = torch.cat([condition, x], dim=1)  # [B, L + N, D]
        shared = None if self.modulation is None else self.modulation(time)  # [B, 6, D]
        hidden = None
        for number, block in enumerate(self.blocks, start=1):
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, time, shared, context, use_reentrant=False)
            else:
                x = block(x, time, shared, context)  # [B, S, D]
            if number == hidden_at:
                hidden = x[:, -tokens:]
                if stop:
                    return SiTOutput(None, hidden)
        shift, scale = self.final_modulation(time).unsqueeze(2).unbind(1)  # [B, 1, D] each
        x = modulate(self.final_norm(x[:, -tokens:]), shift, scale)  # [B, N, D]
        return SiTOutput(unpatchify(self.unembed(x).float(), self.config.patch, x_t.shape), hidden)

    def _positions(self, x_t: Tensor) -> Tensor:
        """[N, D] for the grid of x_t [B, c, h, w]."""
        grid, side = self.grid(x_t), self.config.latent_size // self.config.patch
        if grid == (side, side):
            return self.position
        if self.config.positions == "stored":
            raise ValueError(f"a SiT whose positions are stored draws {side} x {side} tokens, not {grid[0]} x {grid[1]}")
        return _elsewhere(self.config, grid, self.position.device, self.position.dtype)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():  # adaLN-Zero: every block starts as the identity
            if isinstance(module, Modulation):
                nn.init.zeros_(module.project.weight)
            elif isinstance(module, CrossAttention):
                nn.init.zeros_(module.out.weight)
        for parameter in self.embed_time.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.unembed.weight)


class SiTBlock(nn.Module):
    """Self-attention, (cross-attention,) MLP; the time shifts, scales and gates the first and the last."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(width, config.heads, config.qk_norm)
        self.cross = CrossAttention(width, config.heads) if config.conditioning == "cross_attention" else None
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = None if config.shared_modulation else Modulation(width, 6)
        self.table = nn.Parameter(torch.zeros(6, width)) if config.shared_modulation else None

    def forward(self, x: Tensor, time: Tensor, shared: Tensor | None, context: Tensor | None) -> Tensor:
        """x [B, S, D], time [B, D], shared [B, 6, D] with adaLN-single, context [B, L, D] to look up -> [B, S, D]."""
        if self.modulation is not None:
            values = self.modulation(time)
        else:
            assert shared is not None
            assert self.table is not None
            values = shared + self.table
        shift1, scale1, gate1, shift2, scale2, gate2 = values.unsqueeze(2).unbind(1)  # [B, 1, D] each
        attended = self.attention(modulate(self.norm1(x), shift1, scale1))  # [B, S, D]
        x = torch.addcmul(x, gate1, attended)
        if self.cross is not None and context is not None:
            x = x + self.cross(x, context)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class Modulation(nn.Module):
    """Time embedding [B, D] -> `parts` shifts, scales and gates [B, parts, D]; starts at zero."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.project = nn.Linear(width, parts * width)

    def forward(self, time: Tensor) -> Tensor:
        return self.project(F.silu(time)).unflatten(-1, (self.parts, -1))


class TimeEmbedding(nn.Module):
    """t [B] in [0, 1] -> [B, D]: 256 sines and cosines of `scale` t in float32, then an MLP."""

    def __init__(self, width: int, scale: float = 1000.0, frequencies: int = 256):
        super().__init__()
        self.scale, self.frequencies = scale, frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        speed = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angle = self.scale * t.float()[:, None] * speed  # [B, half]
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)  # [B, frequencies]
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, S, D] (1 + scale [B, 1, D]) + shift [B, 1, D]."""
    return torch.addcmul(shift, x, 1 + scale)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, c, h, w] -> [B, N, c patch patch], rows of patches from the top."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(x: Tensor, patch: int, shape: torch.Size) -> Tensor:
    """The inverse of `patchify`: [B, N, c patch patch] -> [B, c, h, w]."""
    batch, channels, height, width = shape
    x = x.reshape(batch, height // patch, width // patch, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(shape)


def finer(sit: SiT, config: SiTConfig) -> SiT:
    """The same weights in a SiT of smaller patches, to train on from; a SiT of that shape already is returned as it is.

    A small patch starts with the mean of what a large one does with its parts, on the way in as many times over as the
    side shrinks, for the values are fewer; blocks are taken over whole. Give `config` the spacing that leaves places where
    they were. Raises ValueError when anything that decides weights but patch and spacing differs, or the patches do not
    divide."""
    old = sit.config
    if old == config:
        return sit
    free = {name: getattr(config, name) for name in ("patch", "spacing", "align_depth", "activation_checkpointing")}
    if replace(old, **free) != config or old.patch % config.patch:
        allowed = f"only a patch that divides {old.patch}, spacing, align_depth and activation_checkpointing may differ"
        raise ValueError(f"sit: {config} cannot go on from {old}; {allowed}")
    times, fresh = old.patch // config.patch, SiT(config)
    if times > 1 and config.positions == "stored":
        raise ValueError("sit: stored positions are those of one grid, so the patch cannot change; leave it as it is")
    parts = (old.latent_channels, times, config.patch, times, config.patch)
    state = sit.state_dict()
    state["embed.weight"] = times * state["embed.weight"].unflatten(1, parts).mean((2, 4)).flatten(1)
    for name in ("unembed.weight", "unembed.bias"):
        state[name] = state[name].unflatten(0, parts).mean((1, 3)).flatten(0, 2)
    fresh.load_state_dict(state)
    return fresh


def sincos_2d(width: int, grid: tuple[int, int], size: int, spacing: float = 1.0) -> Tensor:
    """Fixed positions of a grid of rows and columns, [rows columns, width]: half the channels for the row, half the column.
    Token i of `count` along a side stands at (i + 1/2 + (size - count) / 2) spacing - 1/2: the middle of any grid is that of
    a square of `size` tokens."""
    speed = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def axis(count: int) -> Tensor:
        middles = (torch.arange(count, dtype=torch.float64) + 0.5 + (size - count) / 2) * spacing - 0.5
        angle = middles[:, None] * speed  # [count, width / 4]
        return torch.cat([angle.sin(), angle.cos()], dim=-1)  # [count, width / 2]

    rows, columns = axis(grid[0])[:, None].expand(*grid, -1), axis(grid[1])[None].expand(*grid, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()


@lru_cache(maxsize=64)
def _elsewhere(config: SiTConfig, grid: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Positions [N, D] of a grid that is not the SiT's own."""
    side = config.latent_size // config.patch
    return sincos_2d(config.width, grid, side, config.spacing).to(device, dtype)


def _validate(config: SiTConfig) -> None:
    if config.latent_size % config.patch:
        raise ValueError(f"sit.latent_size {config.latent_size} is not a multiple of sit.patch {config.patch}")
    if config.width % config.heads or config.width % 4:
        raise ValueError(f"sit.width {config.width} must be a multiple of 4 and of sit.heads {config.heads}")
    if config.conditioning == "modulation" and config.condition_width != config.width:
        raise ValueError(
            f"sit.condition_width is {config.condition_width} and sit.width {config.width}; make them equal for modulation"
        )
    if not 0 <= config.align_depth <= config.depth:
        raise ValueError(f"sit.align_depth {config.align_depth} must lie between 0 and sit.depth {config.depth}")
