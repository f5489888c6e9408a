"""Sample number -> which pool of samples gives it, and which of them: the order of the data as arithmetic.

A pool is a source, or one of its buckets where every batch has pictures of one shape (data/buckets.py).

Nothing here remembers anything, so resuming is to go on with the next number, and neither ranks nor workers can change
what a number means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data.address import draw, permute

BLOCK = 10_000  # sample numbers over which a mixture's shares come out exactly


@dataclass(frozen=True)
class Place:
    """Sample `index` of pool number `pool`."""

    pool: int
    index: int


class Order:
    """Sample number -> Place, for sources of these lengths (0: endless) mixed by these weights; each is a pool.

    Each source is read epoch after epoch, each epoch a new permutation of it; an endless one is read from 0 on."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int):
        self._lengths, self._seed = tuple(lengths), seed
        self._mixture = _Mixture(weights, seed)

    def place(self, sample: int) -> Place:
        """Where sample number `sample` (from 0) comes from."""
        source, turn = self._mixture.turn(sample)
        return _in_epoch(turn, source, self._lengths[source], self._seed)


class BucketedOrder:
    """Like Order, for sources whose pictures fall into buckets of one shape: every `batch` numbers that follow one another
    from a multiple of it on are of one bucket.

    lengths: for every source, the sizes of its buckets (a single 0: endless); each is a pool, in this order. The weights mix
    batches.
    In an epoch of a source its buckets give as many whole batches as they have, in random order; what is left of one begins
    its first batch of the next epoch. So at the end of an epoch each bucket has given each of its samples once, but for less
    than a batch."""

    def __init__(self, lengths: Sequence[Sequence[int]], weights: Sequence[float], seed: int, batch: int):
        self._lengths, self._seed, self._batch = tuple(map(tuple, lengths)), seed, batch
        self._mixture = _Mixture(weights, seed)
        self._pools = [sum(map(len, self._lengths[:source])) for source in range(len(lengths))]  # the first of each
        self._known = (-1, (0, 0, 0))  # the last batch asked for: all its samples ask alike

    def place(self, sample: int) -> Place:
        """Where sample number `sample` (from 0) comes from."""
        batch, row = divmod(sample, self._batch)
        if self._known[0] != batch:
            self._known = batch, self._bucket(batch)
        source, bucket, turn = self._known[1]
        length = self._lengths[source][bucket]
        return _in_epoch(turn * self._batch + row, self._pools[source] + bucket, length, self._seed)

    def _bucket(self, batch: int) -> tuple[int, int, int]:
        """Of a batch: its source, its bucket there, and how many batches of that bucket come before it."""
        source, turn = self._mixture.turn(batch)
        lengths = self._lengths[source]
        if not sum(lengths):
            return source, 0, turn
        epoch = turn * self._batch // sum(lengths)  # or later: each bucket's unfinished batch is not yet counted
        while self._before(source, epoch + 1) <= turn:
            epoch += 1
        first, end = self._before(source, epoch), self._before(source, epoch + 1)
        slot = permute(turn - first, end - first, self._seed, "batches", source, epoch)
        for bucket, length in enumerate(lengths):
            begun, ended = epoch * length // self._batch, (epoch + 1) * length // self._batch
            if slot < ended - begun:
                return source, bucket, begun + slot
            slot -= ended - begun
        raise AssertionError("an epoch's batches are those of its buckets")

    def _before(self, source: int, epoch: int) -> int:
        """Batches of a source before its epoch."""
        return sum(epoch * length // self._batch for length in self._lengths[source])


class _Mixture:
    """Number -> source, and how many numbers of that source come before: every BLOCK numbers in its own share each."""

    def __init__(self, weights: Sequence[float], seed: int):
        self._quotas = quotas(weights)
        self._sources, self._turns = _pattern(self._quotas, seed)

    def turn(self, number: int) -> tuple[int, int]:
        block, slot = divmod(number, BLOCK)
        source = self._sources[slot]
        return source, block * self._quotas[source] + self._turns[slot]


def _in_epoch(turn: int, pool: int, length: int, seed: int) -> Place:
    """The sample that a pool gives at its `turn`: epoch after epoch, each a permutation; from 0 on where it is endless."""
    if length == 0:
        return Place(pool, turn)
    epoch, position = divmod(turn, length)
    return Place(pool, permute(position, length, seed, "epoch", pool, epoch))


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of BLOCK samples each source gives: at least one, and else its share to less than one, largest remainders
    first."""
    if not weights or min(weights) <= 0 or len(weights) > BLOCK:
        raise ValueError("data.sources needs at least one source, and every weight above 0; remove sources you do not want")
    shares = [weight / sum(weights) * BLOCK for weight in weights]
    counts = [max(1, int(share)) for share in shares]
    while (off := BLOCK - sum(counts)) != 0:
        step = 1 if off > 0 else -1  # above BLOCK where small sources were given their one
        able = [source for source, quota in enumerate(counts) if quota + step > 0]
        counts[max(able, key=lambda source: step * (shares[source] - counts[source]))] += step
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
