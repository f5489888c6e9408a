"""A batch of prefixes, read: what is kept of it, and how it is cut so that fewer tokens need reading.

Rows are padded to the longest; where that costs more than another pass, rows of like length are read apart. No row can tell.
Letters: B batch, P prefix tokens, D width."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

PASS_TOKENS = 256
"""What one more pass through the model costs, in tokens that could be read instead."""


@dataclass(frozen=True)
class Prefilled:
    """A prefix the model has read. Nothing grows it: every read and reply works on its own view of the cache."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys, values [B, heads, P, D / heads] of each layer
    mask: Tensor  # [B, P] bool, False on padding, which may lie between a shared head and the rest
    next_positions: Tensor  # [B] long: where the next token stands
    states: Tensor  # [B, P, D] after the last norm
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
            padded=self.padded,
        )

    def repeated(self, count: int) -> "Prefilled":
        """The only row so many times, as views."""
        return Prefilled(
            layers=tuple((keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)) for keys, values in self.layers),
            mask=self.mask.expand(count, -1),
            next_positions=self.next_positions.expand(count),
            states=self.states.expand(count, -1, -1),
            padded=self.padded,
        )

    def first(self, count: int) -> "Prefilled":
        """The first so many columns, as views, to be read on from; only whoever does knows the next positions."""
        return replace(
            self,
            layers=tuple((keys[:, :, :count], values[:, :, :count]) for keys, values in self.layers),
            mask=self.mask[:, :count],
            states=self.states[:, :count],
        )

    def last_states(self, count: int) -> Tensor:
        """States of the last `count` prefix tokens, [B, count, D]; zero where a row is shorter."""
        order = self.mask.byte().argsort(dim=1, stable=True)  # [B, P]: padding first
        states = (self.states * self.mask.unsqueeze(-1)).gather(1, order.unsqueeze(-1).expand_as(self.states))
        missing = max(0, count - states.shape[1])
        return F.pad(states, (0, 0, missing, 0))[:, -count:]


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers in groups to be padded and read together: the cut of the rows in order of length that reads the fewest
    tokens, a pass counted as `PASS_TOKENS`."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    cost, cut = [0], [0]  # of the first n rows in order: the least cost, and where its last group begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = [cost[start] + (end - start) * longest + PASS_TOKENS for start in range(end)]
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
    )
    read = [row for group in groups for row in group]
    return together.select([read.index(row) for row in range(len(read))])
