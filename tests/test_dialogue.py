"""A conversation that is read as it grows, against reading all of it afresh, in every family."""

import pytest
import torch

from model import mllm
from model.dialogue import Dialogue
from model.mllm import MLLMConfig
from model.prefix import Turn
from tests import tiny
from tests.tiny_families import BLIND, SEEING

QUERIES = 5
PICTURES = {"none": (0, 0, 0), "one": (1, 0, 0), "late": (0, 0, 1), "several": (1, 0, 2), "each": (2, 1, 1)}


@pytest.fixture(scope="module", params=[*SEEING, *BLIND])
def family(request, tmp_path_factory):
    folder = (SEEING | BLIND)[request.param](tmp_path_factory.mktemp(request.param) / "mllm")
    return request.param, mllm.load(MLLMConfig(str(folder), dtype="float32"))


def asked(counts) -> list[Turn]:
    """The user's turns, with so many pictures of different sizes each."""
    sizes = iter([(16, 16), (24, 16), (16, 32), (32, 32)])
    texts = ("what colour is the star ?", "and left of it ?", "how many ?")
    return [
        Turn("user", text, tuple(tiny.image(next(sizes), seed=number) for _ in range(count)))
        for number, (text, count) in enumerate(zip(texts, counts, strict=True))
    ]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pictures", PICTURES)
def test_three_turns_are_what_reading_all_afresh_gives(family, pictures):
    name, model = family
    if name in BLIND and pictures != "none":
        pytest.skip("sees nothing")
    queries = torch.randn(QUERIES, model.width, generator=torch.Generator().manual_seed(0))
    before, dialogue, turns = model.fingerprint(), Dialogue(model), []
    for turn in asked(PICTURES[pictures]):
        turns.append(turn)
        known, fresh = dialogue.read(turns), model.prefill(model.builder([turns]))
        close(known.states, fresh.states)
        for ours, expected in zip(known.layers, fresh.layers, strict=True):
            close(ours, expected)
        assert torch.equal(known.next_positions, fresh.next_positions)
        close(model.read(known, queries), model.read(fresh, queries))
        answer = "".join(dialogue.reply(turns, max_new_tokens=6))
        assert answer == "".join(model.reply(fresh, max_new_tokens=6))
        turns.append(Turn("assistant", answer))
    assert model.fingerprint() == before
