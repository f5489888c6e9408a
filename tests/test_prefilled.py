"""How a batch is cut into passes; that no row can tell is in test_families.py."""

import itertools
import random

import pytest

from model.prefilled import PASS_TOKENS, by_length


def cost(groups, lengths):
    return sum(len(group) * max(lengths[row] for row in group) + PASS_TOKENS for group in groups)


@pytest.mark.parametrize("case", range(30))
def test_the_cut_is_the_cheapest_of_all(case):
    draw = random.Random(case)
    lengths = [draw.choice((40, 60, 150, 400, 1500)) for _ in range(draw.randint(1, 7))]
    groups = by_length(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    order = sorted(lengths)
    cuts = (
        [0, *inner, len(order)]
        for count in range(len(order))
        for inner in itertools.combinations(range(1, len(order)), count)
    )
    best = min(sum((b - a) * order[b - 1] + PASS_TOKENS for a, b in itertools.pairwise(cut)) for cut in cuts)
    assert cost(groups, lengths) == best


def test_texts_stay_together_and_pictures_are_read_apart():
    assert by_length([30, 60, 45]) == [[0, 2, 1]]
    assert by_length([40, 1500, 50, 1400]) == [[0, 2], [3, 1]]
