"""Conditions are dropped as often as asked, by sample number alone."""

from collections import Counter

import pytest

from data.dropout import Dropout, drop


def test_counted_equals_expected():
    probabilities = Dropout(text=0.1, image=0.2, both=0.05)
    counts = Counter(drop(index, 3, probabilities) for index in range(20_000))
    for event, expected in (("text", 0.1), ("image", 0.2), ("both", 0.05), (None, 0.65)):
        spread = (expected * (1 - expected) / 20_000) ** 0.5
        assert abs(counts[event] / 20_000 - expected) < 4 * spread


def test_a_function_of_seed_and_sample_number():
    probabilities = Dropout(text=0.5)
    forwards = [drop(index, 3, probabilities) for index in range(200)]
    backwards = [drop(index, 3, probabilities) for index in reversed(range(200))][::-1]
    assert forwards == backwards
    assert forwards != [drop(index, 4, probabilities) for index in range(200)]


def test_certain_events():
    assert {drop(index, 0, Dropout(text=0)) for index in range(100)} == {None}
    assert {drop(index, 0, Dropout(text=0, both=1)) for index in range(100)} == {"both"}


@pytest.mark.parametrize(
    ("changes", "message"), [({"text": -0.1}, "dropout.text"), ({"text": 0.6, "both": 0.6}, "at most 1")]
)
def test_impossible_probabilities_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Dropout(**changes)
