"""Attention as the SiT and the connector need it: tokens [B, S, D] -> tokens [B, S, D].

Letters: B batch, S tokens, N latent tokens, L conditioning tokens, D width, d channels of a head."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHORT = 512  # tokens up to which the plain product wins on a CPU


class RMSNorm(nn.RMSNorm):
    """torch's RMS norm in the input's dtype, so that autocast neither widens bf16 nor leaves the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, tuple(self.normalized_shape), weight, self.eps)


class HeadNorm(nn.Module):
    """RMS norm within each head of [B, heads, S, d], with a gain per head and channel."""

    def __init__(self, heads: int, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps) * self.weight.to(x.dtype)


class SelfAttention(nn.Module):
    """Bidirectional attention; normalised queries and keys keep its logits bounded (Dehghani et al. 2023)."""

    def __init__(self, width: int, heads: int, qk_norm: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))  # [B, heads, S, D / heads]
        return self.out(merge_heads(attend(self.q_norm(q), self.k_norm(k), v)))


class CrossAttention(nn.Module):
    """Latent tokens look up the conditioning tokens; starts as the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = split_heads(self.q(self.norm(x)), self.heads)  # [B, heads, N, D / heads]
        k, v = (split_heads(part, self.heads) for part in self.kv(context).chunk(2, dim=-1))  # [B, heads, L, ..]
        return self.out(merge_heads(attend(self.q_norm(q), self.k_norm(k), v)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, D] -> [B, heads, S, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, S, D / heads] -> [B, S, D]."""
    return x.transpose(1, 2).flatten(2)


@contextmanager
def fused() -> Iterator[None]:
    """Within, torch's fused kernel attends whatever the length: for comparison."""
    global _SHORT
    usual, _SHORT = _SHORT, 0
    try:
        yield
    finally:
        _SHORT = usual


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Bidirectional attention over [B, heads, S, D / heads]; mask [B, 1, 1 or S, keys] bool, True = may be seen.

    torch's fused CPU kernel takes 3 times as long on short sequences (forward and backward in bf16 at 72 tokens), so
    the product is written out there."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    if q.device.type != "cpu" or k.shape[-2] > _SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    logits = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()  # [B, heads, S, keys]
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return logits.softmax(dim=-1).to(v.dtype) @ v
