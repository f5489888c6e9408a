"""How far conditioning is from what a decoder would have been told: the nearest right answer, found in two ways."""

import itertools

import numpy as np
import pytest
import torch

from data.world.asks import KINDS, Mix, make_ask, without_dropped
from data.world.labels import OBJECTS, labels_config
from model.labels import Labels
from model.metaquery import Heard
from train.tell import TOLD, ToldBatch, _label, reading_of, told_errors

WIDTH = 32
HEARD = Heard(torch.zeros(0), None)  # what is asked does not count here


@pytest.fixture(scope="module")
def labels():
    torch.manual_seed(0)
    return Labels(labels_config(WIDTH)).requires_grad_(False)


@pytest.fixture(scope="module")
def batch():
    """Edits of every kind, captions and dialogues."""
    asks = [make_ask(3, index, mix=Mix(caption=0.2, edit=0.5)) for index in range(24)]
    told = zip(*(_label(without_dropped(ask, None)[1]) for ask in asks), strict=True)
    words, places, *ways = (torch.from_numpy(np.stack(part)) for part in told)
    kinds = torch.tensor([KINDS.index(ask.kind) for ask in asks])
    return ToldBatch(HEARD, words, places, *ways, kinds)  # pyright: ignore[reportCallIssue] (three ways)


def test_the_error_is_that_of_the_nearest_right_answer(labels, batch):
    torch.manual_seed(1)
    told, ways = labels(batch.words, batch.places), labels(batch.open_words, batch.open_places)
    given = told + 0.5 * torch.randn(told.shape)
    off, felt = told_errors(given, batch, labels)
    torch.testing.assert_close(off, felt)
    for row in range(len(told)):
        found = []
        for way, order in itertools.product(ways[row], itertools.permutations(range(OBJECTS))):
            right = told[row].clone()
            right[batch.open_row[row]] = way
            right[1:] = right[1:][list(order)]
            found.append((given[row] - right).square().mean(-1).sum() / TOLD)
        torch.testing.assert_close(off[row], torch.stack(found).min())


@pytest.mark.parametrize("reads", [False, True])
def test_right_answers_in_any_order_have_no_error(labels, batch, reads):
    reading = reading_of(labels) if reads else None
    told, ways = labels(batch.words, batch.places), labels(batch.open_words, batch.open_places)
    rows = torch.arange(len(told))
    told[rows, batch.open_row] = ways[rows, rows % ways.shape[1]]  # any of them
    off, felt = told_errors(told[:, [0, 5, 1, 3, 2, 4]], batch, labels, reading)
    assert off.max() < 1e-5
    assert felt.max() < 1e-4
    off, _ = told_errors(told.roll(1, 0), batch, labels, reading)  # another's
    assert off.median() > 0.01


def test_a_thing_that_moves_stays_the_same_thing(labels):
    """Of two that trade places, each is to be told elsewhere, and not as the other where it was."""
    asks = (make_ask(5, number, kind="swap") for number in range(50))
    ask = next(ask for ask in asks if ask.before is not None and len(ask.before.objects) == 2)
    words, places, row, *ways = (torch.from_numpy(part)[None] for part in _label(ask.wanted))
    batch = ToldBatch(HEARD, words, places, row, *ways, torch.zeros(1))  # pyright: ignore[reportCallIssue] (two ways)
    reading = reading_of(labels)
    was = places.clone()
    was[:, 1:3] = places[:, [2, 1]]  # their words as they are, their places as they were
    given = labels(words, was)
    _, felt = told_errors(given, batch, labels, reading)
    told = labels(words, places)
    expected = (given - told).square().mean(-1) + ((given - told) @ reading * reading.shape[1] ** 0.5).square().mean(-1)
    torch.testing.assert_close(felt, expected.sum(-1) / TOLD)
