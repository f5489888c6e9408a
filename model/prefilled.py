"""A batch of prefixes, read: what is kept of it, and how it is cut so that fewer tokens need reading.

Rows are padded to the longest; where that costs more than another pass, rows of like length are read apart. No row can tell.
Letters: B batch, P prefix tokens, D width."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PASS_TOKENS = 256
"""What one more pass through the model costs on a CPU, in tokens that could be read instead."""
PASS_WORK = 5e12
"""What it costs on a GPU, which is waiting for work to be named to it: in parameters times tokens."""


class Looked(NamedTuple):
    """What the model made of the pictures of each row. V: visual tokens of the row that has most."""

    states: Tensor  # [B, V, D]
    ages: Tensor  # [B, V] long: 1 for the last picture of the row, 2 for the one before it, ...; 0 where there is no token


@dataclass(frozen=True)
class Prefilled:
    """A prefix the model has read. Nothing grows it: every read and reply works on its own view of the cache."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys, values [B, heads, P, D / heads] of each layer
    mask: Tensor  # [B, P] bool, False on padding, which may lie between a shared head and the rest
    next_positions: Tensor  # [B] long: where the next token stands
    states: Tensor  # [B, P, D] after the last norm
    pictures: Tensor  # [B, P] bool, True on tokens that stand for a picture
    padded: bool = True  # whether any row of the prefix is

    @property
    def batch_size(self) -> int:
        return self.mask.shape[0]

    def select(self, rows: Sequence[int]) -> "Prefilled":
        """These rows, in this order; a row named n times serves n images."""
        index = torch.tensor(list(rows), device=self.mask.device)
        return Prefilled(
            layers=tuple((keys[index], values[index]) for keys, values in self.layers),
            mask=self.mask[index],
            next_positions=self.next_positions[index],
            states=self.states[index],
            pictures=self.pictures[index],
            padded=self.padded,
        )

    def repeated(self, count: int) -> "Prefilled":
        """The only row so many times, as views."""
        return Prefilled(
            layers=tuple((keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)) for keys, values in self.layers),
            mask=self.mask.expand(count, -1),
            next_positions=self.next_positions.expand(count),
            states=self.states.expand(count, -1, -1),
            pictures=self.pictures.expand(count, -1),
            padded=self.padded,
        )

    def first(self, count: int) -> "Prefilled":
        """The first so many columns, as views, to be read on from; only whoever does knows the next positions."""
        return replace(
            self,
            layers=tuple((keys[:, :, :count], values[:, :, :count]) for keys, values in self.layers),
            mask=self.mask[:, :count],
            states=self.states[:, :count],
            pictures=self.pictures[:, :count],
        )

    def looked(self) -> Looked:
        """States and ages of the tokens that stand for pictures; a picture ends where its tokens do."""
        ends = self.pictures & ~F.pad(self.pictures[:, 1:], (0, 1))  # [B, P]
        ages = ends.long().flip(1).cumsum(1).flip(1) * self.pictures  # [B, P]
        if self.pictures.is_cuda:  # counting them would wait for the device: all tokens are kept, most of age 0
            return Looked(self.states, ages)
        order = self.pictures.byte().argsort(dim=1, stable=True)[:, self.mask.shape[1] - int(self.pictures.sum(1).max()) :]
        return Looked(
            self.states.gather(1, order.unsqueeze(-1).expand(-1, -1, self.states.shape[-1])), ages.gather(1, order)
        )

    def last_states(self, count: int) -> Tensor:
        """States of the last `count` prefix tokens, [B, count, D]; zero where a row is shorter."""
        order = self.mask.byte().argsort(dim=1, stable=True)  # [B, P]: padding first
        states = (self.states * self.mask.unsqueeze(-1)).gather(1, order.unsqueeze(-1).expand_as(self.states))
        missing = max(0, count - states.shape[1])
        return F.pad(states, (0, 0, missing, 0))[:, -count:]


def by_length(lengths: Sequence[int], pass_tokens: int = PASS_TOKENS) -> list[list[int]]:
    """Row numbers in groups to be padded and read together: the cut of the rows in order of length that reads the fewest
    tokens, a pass counted as `pass_tokens`."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    if len(lengths) * max(lengths) - sum(lengths) <= pass_tokens:
        return [order]
    cost, cut = [0], [0]  # of the first n rows in order: the least cost, and where its last group begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = [cost[start] + (end - start) * longest + pass_tokens for start in range(end)]
        cost.append(min(costs))
        cut.append(costs.index(cost[-1]))
    ends = [len(order)]
    while ends[-1]:
        ends.append(cut[ends[-1]])
    return [order[start:end] for start, end in pairwise(reversed(ends))]


def joined(parts: Sequence[Prefilled], groups: Sequence[Sequence[int]]) -> Prefilled:
    """What was read in groups of rows as one batch, in the order of the rows."""
    width = max(part.mask.shape[1] for part in parts)

    def pad(tensors: Sequence[Tensor], axis: int) -> Tensor:
        """Joined, and filled with zeros from the left to the same width on `axis`."""
        filled = (0, 0) * (tensors[0].ndim - axis - 1)
        return torch.cat([F.pad(tensor, (*filled, width - tensor.shape[axis], 0)) for tensor in tensors])

    layers = tuple(
        (pad([keys for keys, _ in layer], 2), pad([values for _, values in layer], 2))
        for layer in zip(*(part.layers for part in parts), strict=True)
    )
    together = Prefilled(
        layers=layers,
        mask=pad([part.mask for part in parts], 1),
        next_positions=torch.cat([part.next_positions for part in parts]),
        states=pad([part.states for part in parts], 1),
        pictures=pad([part.pictures for part in parts], 1),
    )
    read = [row for group in groups for row in group]
    return together.select([read.index(row) for row in range(len(read))])
