"""The vision tower of Qwen2.5-VL, faster where all pictures have one size.

transformers runs attention picture by picture and cuts patches with a 3-D convolution. With equal pictures the first is one
batched product, and the second is a matrix product; on a CPU a training step then takes half the time. Rounding aside, the
states are the same (tests/test_vision.py). Letters: N patches of all pictures, A attention windows, D width.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision


def batch_equal_pictures(visual: Any) -> None:
    """Replace the forwards of a Qwen2.5-VL vision tower, for pictures whose windows are all of one size; others go the way
    they went."""
    visual.patch_embed.forward = _linear_patches(visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = _batched_attention(block.attn)


def _linear_patches(embed: Any) -> Callable[[Tensor], Tensor]:
    """A convolution whose stride is its kernel is a linear map of each patch [N, values] -> [N, D]."""

    def forward(patches: Tensor) -> Tensor:
        return F.linear(patches.to(embed.proj.weight.dtype), embed.proj.weight.flatten(1), embed.proj.bias)

    return forward


def _batched_attention(attention: Any) -> Callable[..., Tensor]:
    """Attention inside each of A windows of equal length, all at once: [N, D] -> [N, D]."""
    by_window = attention.forward

    def forward(hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **_: Any) -> Tensor:
        count, windows = hidden_states.shape[0], len(cu_seqlens) - 1
        if bool((cu_seqlens.diff() * windows != count).any()):
            return by_window(hidden_states, cu_seqlens=cu_seqlens, position_embeddings=position_embeddings)
        split = attention.qkv(hidden_states).reshape(count, 3, attention.num_heads, -1)
        q, k, v = split.permute(1, 0, 2, 3).unbind(0)  # [N, heads, D / heads]
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (part.unflatten(0, (windows, -1)).transpose(1, 2) for part in (q, k, v))  # [A, heads, N / A, D / heads]
        weights = ((q @ k.transpose(-1, -2)) * attention.scaling).softmax(dim=-1)
        return attention.proj((weights @ v).transpose(1, 2).reshape(count, -1))

    return forward
