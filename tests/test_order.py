"""The order of the data: permutations are exact, epochs complete, shares as asked."""

from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.address import permute
from data.loader import Positions
from data.order import BLOCK, Order, Place, quotas


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 65, 1000])
def test_permute_is_a_permutation_and_differs_between_epochs(length):
    orders = [tuple(permute(position, length, 5, epoch) for position in range(length)) for epoch in range(2)]
    assert all(sorted(order) == list(range(length)) for order in orders)
    if length >= 64:
        fixed = sum(first == second for first, second in zip(*orders, strict=True))
        assert fixed < 10
        assert sum(place == at for at, place in enumerate(orders[0])) < 10


def test_permute_puts_every_sample_everywhere_equally_often():
    length, epochs = 6, 1200
    counts = Counter(
        (position, permute(position, length, 1, epoch)) for epoch in range(epochs) for position in range(length)
    )
    expected = epochs / length
    chi_square = sum((counts[p, q] - expected) ** 2 / expected for p in range(length) for q in range(length))
    assert chi_square < 60  # 25 degrees of freedom: 1 in 10,000


def test_permute_reaches_far_without_memory():
    far = [permute(position, 10**12, 1) for position in range(50)]
    assert len(set(far)) == 50
    assert max(far) < 10**12


def test_each_epoch_holds_each_sample_once():
    order = Order([13], [1.0], seed=2)
    epochs = [[order.place(sample).index for sample in range(13 * epoch, 13 * epoch + 13)] for epoch in range(50)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 50


def test_each_source_of_a_mixture_keeps_its_own_epochs():
    order = Order([7, 0, 11], [1, 2, 1], seed=2)
    places = [order.place(sample) for sample in range(4_000)]
    for source, length in ((0, 7), (2, 11)):
        indices = [place.index for place in places if place.pool == source]
        whole = len(indices) // length * length
        assert all(sorted(indices[at : at + length]) == list(range(length)) for at in range(0, whole, length))
    endless = [place.index for place in places if place.pool == 1]
    assert endless == list(range(len(endless)))


def test_mixture_shares_match_the_weights():
    order = Order([0, 0, 0], [5, 3, 2], seed=7)
    places = [order.place(sample) for sample in range(2 * BLOCK + 1234)]
    assert Counter(place.pool for place in places[:BLOCK]) == {0: 5000, 1: 3000, 2: 2000}
    for start in range(0, 2 * BLOCK, 1000):  # shares hold within short stretches as well, up to chance
        counts = Counter(place.pool for place in places[start : start + 1000])
        assert abs(counts[0] - 500) < 80
        assert abs(counts[2] - 200) < 64
    assert len(set(places)) == len(places)  # nothing twice, across the border of a block too


def test_the_seed_changes_mixture_and_order():
    first, second = Order([9, 9], [1, 1], seed=0), Order([9, 9], [1, 1], seed=1)
    assert [first.place(sample) for sample in range(40)] != [second.place(sample) for sample in range(40)]


def test_a_number_means_the_same_in_any_company():
    order = Order([100, 0], [1, 3], seed=4)
    places = {sample: order.place(sample) for sample in reversed(range(300))}
    again = Order([100, 0], [1, 3], seed=4)
    assert all(again.place(sample) == places[sample] for sample in range(300))
    assert isinstance(places[0], Place)


def test_quotas():
    assert quotas([0.9, 0.1]) == (9000, 1000)
    assert sum(quotas([1, 1, 1])) == BLOCK
    assert quotas([1e9, 1]) == (BLOCK - 1, 1)
    assert sorted({*quotas([1] * 150)}) == [BLOCK // 150, BLOCK // 150 + 1]
    for weights in ([1] * 180, [1e9] * 3 + [1] * 400, [3, 1, 1, 1, 1]):
        assert sum(quotas(weights)) == BLOCK
        assert min(quotas(weights)) >= 1
    for weights in ([], [1, 0], [1, -1]):
        with pytest.raises(ValueError, match=r"data\.sources"):
            quotas(weights)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    seed=st.integers(0, 2**32),
    parts=st.sampled_from([(1, 1), (2, 1), (3, 2), (4, 3), (1, 4), (2, 2)]),
    other=st.sampled_from([(1, 1), (2, 1), (3, 2), (4, 3), (1, 4), (2, 2)]),
    stop=st.integers(0, 12),
)
def test_every_global_batch_is_the_same_set_however_it_is_read(lengths, weights, seed, parts, other, stop):
    """World sizes 1 to 4, micro-batches, a mixture, and going on at any step with another world: the samples of each step
    are the same, and of each source every epoch holds each sample once."""
    order, batch_size, steps = Order(lengths, weights[: len(lengths)], seed), 24, 13

    def read(first: int, last: int, world: int, accumulation: int) -> list[list[int]]:
        """Numbers of each step, as ranks see them one micro-batch after the other."""
        micro = batch_size // accumulation
        shares = [Positions(range(rank, micro, world), 0) for rank in range(world)]
        starts = range(first * batch_size, last * batch_size, micro)
        read_by_micro = [[n for share in shares for n in share.numbers(start)] for start in starts]
        groups = [read_by_micro[at : at + accumulation] for at in range(0, len(read_by_micro), accumulation)]
        return [list(chain(*group)) for group in groups]

    straight = read(0, steps, 1, 1)
    resumed = read(0, stop, *parts) + read(stop, steps, *other)
    assert [sorted(step) for step in resumed] == straight
    seen: dict[int, list[int]] = {source: [] for source in range(len(lengths))}
    for number in chain(*straight):
        place = order.place(number)
        seen[place.pool].append(place.index)
    for source, length in enumerate(lengths):
        epochs = [seen[source][at : at + length] for at in range(0, len(seen[source]) - length + 1, length)]
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
