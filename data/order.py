"""Sample number -> which source gives it, and which of its samples: the order of the data as arithmetic.

Nothing here remembers anything, so resuming is to go on with the next number, and neither ranks nor workers can change
what a number means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data.address import draw, permute

BLOCK = 10_000  # sample numbers over which a mixture's shares come out exactly


@dataclass(frozen=True)
class Place:
    """Sample `index` of source number `source`."""

    source: int
    index: int


class Order:
    """Sample number -> Place, for sources of these lengths (0: endless) mixed by these weights.

    Each source is read epoch after epoch, each epoch a new permutation of it; an endless one is read from 0 on."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int):
        self._lengths = tuple(lengths)
        self._seed = seed
        self._quotas = quotas(weights)
        self._sources, self._turns = _pattern(self._quotas, seed)

    def place(self, sample: int) -> Place:
        """Where sample number `sample` (from 0) comes from."""
        block, slot = divmod(sample, BLOCK)
        source = self._sources[slot]
        turn = block * self._quotas[source] + self._turns[slot]  # how often this source has been asked before
        length = self._lengths[source]
        if length == 0:
            return Place(source, turn)
        epoch, position = divmod(turn, length)
        return Place(source, permute(position, length, self._seed, "epoch", source, epoch))


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of BLOCK samples each source gives: at least one; the largest source takes the rounding."""
    if not weights or min(weights) <= 0 or len(weights) > BLOCK:
        raise ValueError("data.sources needs at least one source, and every weight above 0; remove sources you do not want")
    counts = [max(1, round(weight / sum(weights) * BLOCK)) for weight in weights]
    counts[counts.index(max(counts))] += BLOCK - sum(counts)
    return tuple(counts)


def _pattern(quotas: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """For each slot of a block: its source, and how many slots of that source come before it."""
    slots = [source for source, quota in enumerate(quotas) for _ in range(quota)]
    if len(quotas) > 1:
        shuffled = sorted(range(BLOCK), key=lambda slot: draw(seed, "mixture", slot))
        slots = [slots[slot] for slot in shuffled]
    seen = [0] * len(quotas)
    turns = []
    for source in slots:
        turns.append(seen[source])
        seen[source] += 1
    return slots, turns
