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
"""Fixed cost of one more forward pass on a CPU, in tokens that could be read instead."""
PASS_WORK = 5e12
"""The same on a GPU, where it is the time to launch kernels: in parameters times tokens."""
LOOKED_LAYERS = 6
"""Layers of the cache that are looked at, evenly from the first to the last, where there are more."""


class Looked(NamedTuple):
    """What the model made of all that was said and shown: a token's values in the cache, from layers that know what it is
    to those that know what it means, and its last state; each of RMS 1."""

    states: Tensor  # [B, P, S]
    ages: Tensor  # [B, P] long: 1 on the last picture of a row, 2 on the one before it, ...; -1 on words after the last
    # picture, -2 on those between it and the one before, ...; 0 on padding

    def select(self, rows: Sequence[int], count: int) -> "Looked":
        """The last `count` tokens of these rows."""
        index = torch.tensor(list(rows), device=self.ages.device)
        return Looked(self.states[index, self.ages.shape[1] - count :], self.ages[index, self.ages.shape[1] - count :])


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
        """States and ages of all tokens, padding first; a picture ends where its tokens do, and the tiles that some families
        cut one into are a picture each."""
        ends = self.pictures & ~F.pad(self.pictures[:, 1:], (0, 1))  # [B, P]
        to_come = ends.long().flip(1).cumsum(1).flip(1)  # [B, P]: pictures that end here or later
        ages = torch.where(self.pictures, to_come, -1 - to_come) * self.mask
        order = self.mask.byte().argsort(dim=1, stable=True)
        if self.mask.device.type == "cpu":  # counting what is padding in every row would wait for a GPU
            order = order[:, self.mask.shape[1] - int(self.mask.sum(1).max()) :]
        states = torch.cat([F.rms_norm(part, part.shape[-1:]) for part in self._parts()], dim=-1)  # [B, P, S]
        return Looked(states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1])), ages.gather(1, order))

    def _parts(self) -> list[Tensor]:
        """Values of layers, and the last states, [B, P, ..] each."""
        layers = looked_layers(len(self.layers))
        return [*(self.layers[number][1].transpose(1, 2).flatten(2) for number in layers), self.states]

    def last_states(self, count: int) -> Tensor:
        """States of the last `count` prefix tokens, [B, count, D]; zero where a row is shorter."""
        order = self.mask.byte().argsort(dim=1, stable=True)  # [B, P]: padding first
        states = (self.states * self.mask.unsqueeze(-1)).gather(1, order.unsqueeze(-1).expand_as(self.states))
        missing = max(0, count - states.shape[1])
        return F.pad(states, (0, 0, missing, 0))[:, -count:]


def looked_layers(count: int) -> list[int]:
    """Which of so many layers are looked at."""
    steps = max(1, min(LOOKED_LAYERS, count) - 1)
    return sorted({round(number * (count - 1) / steps) for number in range(steps + 1)})


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
