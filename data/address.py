"""An address (seed, purpose, sample number, ...) -> a number that looks random and depends on nothing else.

Randomness that is addressed instead of streamed stays the same on resume, in other batches and on other ranks.
"""

import hashlib
from functools import lru_cache

ROUNDS = 6  # of the Feistel network; four leave the permutations of a handful of samples visibly uneven


def draw(*address: int | str) -> int:
    """64 random bits for this address."""
    return int.from_bytes(hashlib.blake2b(repr(address).encode(), digest_size=8).digest(), "little")


def uniform(*address: int | str) -> float:
    """A number in [0, 1) for this address."""
    return (draw(*address) >> 11) / (1 << 53)


def permute(position: int, length: int, *address: int | str) -> int:
    """Where a random permutation of range(length) puts `position`, in constant memory.

    A Feistel network (Luby and Rackoff 1988) permutes the next power of four; values outside the range are
    sent on until they land inside (cycle walking, Black and Rogaway 2002)."""
    assert 0 <= position < length
    half = max(3, ((length - 1).bit_length() + 1) // 2)  # bits; a network narrower than this mixes poorly
    mask = (1 << half) - 1
    key = draw(*address)
    while True:
        left, right = position >> half, position & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_round(key, turn, right) & mask)
        position = left << half | right
        if position < length:
            return position


@lru_cache(maxsize=1 << 15)  # all that one permutation of ten million ever asks
def _round(key: int, turn: int, right: int) -> int:
    return draw(key, turn, right)
