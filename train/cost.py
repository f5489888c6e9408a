"""A step -> what it costs without running a clock: floating-point operations, and what it keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flop(step: Callable[[], Tensor]) -> int:
    """Operations of all matrix products and convolutions, forward and (where the result asks for one) backward, a
    multiplication and an addition counted as two."""

    def both_ways() -> None:
        made = step()
        if made.requires_grad:
            made.sum().backward()

    return flop_within(both_ways)


def flop_within(work: Callable[[], object]) -> int:
    """Operations of all matrix products and convolutions that `work` runs, in its own backward passes too."""
    own = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=own) as counter, sdpa_kernel(SDPBackend.MATH):  # counted everywhere
        work()
    return counter.get_total_flops()


def kept_bytes(step: Callable[[], Tensor], fused_attention: bool = False) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for its backward, parameters not counted. With
    `fused_attention`, attention keeps what a GPU's would: the meta device has none, and would keep every score."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            alive.append(tensor)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        if fused_attention:
            with _fused_attention():
                step()
        else:
            step()
    return sum(kept.values())


def _convolution_backward(
    grad_shape: Sequence[int], x_shape: Sequence[int], weight_shape: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Once the forward's FLOP for each gradient that is asked for; torch 2.13 forgets the groups of a depthwise one."""
    output_mask = rest[7]
    return 2 * prod(grad_shape) * prod(weight_shape[1:]) * sum(output_mask[:2])


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention that keeps queries, keys, values and the answer, and computes nothing."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(q, k, v)  # pyright: ignore[reportReturnType]

    own, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        answer = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, answer)
        return answer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.empty_like(part) for part in ctx.saved_tensors[:3])
