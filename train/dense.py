"""Which colour and which shape lies at each point of a picture, as a lesson for a network of tokens over it.

A picture's words are few and its noise is large; its points are hundreds and certain. This is REPA's alignment (Yu et al.,
2025) with the world's truth in the place of a vision encoder. Letters: B batch, T tokens in reading order, K points of a
token's cell, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from data.world.dense import COLOUR_NAMES, SHAPE_NAMES, points_of
from model.assets import locate
from model.files import read_tensors

CLASSES = (len(COLOUR_NAMES), len(SHAPE_NAMES))
HEAD_FILE = "align.safetensors"


class DenseHead(nn.Linear):
    """Tokens [B, T, D] -> logits [B, T, K, sum(CLASSES)] of what lies at points x points places of each token's cell."""

    def __init__(self, width: int, points: int) -> None:
        super().__init__(width, points**2 * sum(CLASSES))
        self.points = points

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).unflatten(-1, (-1, sum(CLASSES)))

    def loss(self, logits: Tensor, scenes: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """`dense_loss` of the logits for square pictures of scenes in JSON."""
        points = points_of(scenes, math.isqrt(logits.shape[1]), self.points)
        return dense_loss(logits, *(part.to(logits.device) for part in points))


def load_head(folder: str) -> DenseHead:
    """The head that a labelled SiT's release keeps beside it. Raises ValueError when there is none."""
    found = locate(folder)
    if found is None or not (found / HEAD_FILE).is_file():
        raise ValueError(
            f"decoder.path {folder!r} has no {HEAD_FILE}; train the decoder with task.align, or set task.align to 0"
        )
    tensors = read_tensors(found / HEAD_FILE)
    places, width = tensors["weight"].shape
    head = DenseHead(width, math.isqrt(places // sum(CLASSES)))
    head.load_state_dict(tensors)
    return head.requires_grad_(False)


def dense_loss(logits: Tensor, colours: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, T, K, sum(CLASSES)] -> cross-entropy, and the share of points inside objects whose shape is named rightly.

    Colours and shapes count over all points, shapes inside objects a third more.
    """
    inside = shapes > 0
    colour_logits, shape_logits = logits.float().split(CLASSES, dim=-1)
    of_shapes = F.cross_entropy(shape_logits.flatten(0, 2), shapes.flatten(), reduction="none").view_as(shapes)
    loss = F.cross_entropy(colour_logits.flatten(0, 2), colours.flatten()) + of_shapes.mean()
    loss = loss + 0.3 * (of_shapes * inside).sum() / inside.sum().clamp(min=1)
    right = (shape_logits.argmax(-1) == shapes) & inside
    return loss, right.sum() / inside.sum().clamp(min=1)
