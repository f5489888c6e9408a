"""A conversation that is read as it grows, against reading all of it afresh, in every family."""

import itertools

import pytest
import torch

from model import mllm
from model.dialogue import Dialogue
from model.mllm import MLLMConfig
from model.prefix import DRAW_SYSTEM, Turn
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


@pytest.mark.parametrize("pictures", PICTURES)
def test_every_token_goes_through_the_model_once_and_every_picture_is_looked_at_once(family, pictures, monkeypatch):
    name, model = family
    if name in BLIND and pictures != "none":
        pytest.skip("sees nothing")
    if name == "llava_onevision" and pictures == "several":
        pytest.skip("looks at its only picture again once another joins")
    reader = model.builder.images and Counting(model.builder.images)
    monkeypatch.setattr(model.builder, "images", reader)
    passed: list[int] = []
    hook = model.model.get_decoder().register_forward_hook(
        lambda module, given, out: passed.append(out.last_hidden_state.shape[1])
    )
    dialogue, turns = Dialogue(model), []
    for turn in asked(PICTURES[pictures]):
        turns.append(turn)
        first, again = dialogue.read(turns), dialogue.read(turns)
        turns.append(Turn("assistant", "red"))
        assert first.states.data_ptr() == again.states.data_ptr()
        assert dialogue.tokens_read == sum(passed) == again.mask.shape[1]
    hook.remove()
    assert (reader.looks if reader else 0) == sum(PICTURES[pictures])


class Counting:
    """An image reader that counts."""

    def __init__(self, reader):
        self.reader, self.looks = reader, 0
        self.image_id, self.single_differs = reader.image_id, reader.single_differs

    def __call__(self, image, alone):
        self.looks += 1
        return self.reader(image, alone)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return mllm.load(MLLMConfig(str(tiny.mllm_folder(tmp_path_factory.mktemp("qwen") / "mllm")), dtype="float32"))


def test_what_was_said_is_not_read_again():
    """By a model whose answers are words: the ids that it says are those that its words have."""
    embedded = mllm.load(MLLMConfig("assets/world/mllm", dtype="float32"))
    dialogue, turns = Dialogue(embedded), [Turn("system", DRAW_SYSTEM), Turn("user", "a red circle above a blue star")]
    said = "".join(dialogue.reply(turns))
    length, read = embedded.builder([turns]).ids.shape[1], dialogue.tokens_read
    assert read == length + len(embedded.builder.encode(said)) > length + 20
    dialogue.read([*turns, Turn("assistant", said), Turn("user", "a star")])
    known = dialogue.read([*turns, Turn("assistant", said), Turn("user", "a star")])
    assert dialogue.tokens_read == known.mask.shape[1]


def test_other_pictures_of_the_same_size_are_other_pictures(qwen):
    dialogue = Dialogue(qwen)
    for seed in (0, 1, 0):
        turns = [Turn("user", "how many ?", (tiny.image(seed=seed), tiny.image(seed=5)))]
        close(dialogue.read(turns).states, qwen.prefill(qwen.builder([turns])).states)


def test_a_conversation_may_turn_into_another(qwen):
    """Shorter, changed in the middle, the same again; what others hold of it stays as it is."""
    dialogue, picture = Dialogue(qwen), tiny.image()
    first = [Turn("user", "a", (picture,)), Turn("assistant", "red"), Turn("user", "how many ?")]
    held = dialogue.read(first)
    before = [tensor.clone() for layer in held.layers for tensor in layer]
    for turns in (first[:1], [*first[:1], Turn("assistant", "blue"), *first[2:]], [Turn("user", "a")], first):
        known, fresh = dialogue.read(turns), qwen.prefill(qwen.builder([turns]))
        close(known.states, fresh.states)
        assert torch.equal(known.next_positions, fresh.next_positions)
        "".join(dialogue.reply(turns, max_new_tokens=4))
    after = [tensor for layer in held.layers for tensor in layer]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_answer_that_is_broken_off_leaves_the_cache_whole(qwen):
    dialogue, turns = Dialogue(qwen), [Turn("user", "is there a star ?")]
    passes = iter(range(100))

    def interrupt(module, given, out):
        if next(passes) == 3:
            raise KeyboardInterrupt

    hook = qwen.model.get_decoder().layers[0].register_forward_hook(interrupt)  # the other layer's cache is behind
    with pytest.raises(KeyboardInterrupt):
        list(dialogue.reply(turns, max_new_tokens=8))
    hook.remove()
    turns += [Turn("assistant", "".join(qwen.reply(qwen.builder([turns]), max_new_tokens=8))), Turn("user", "a")]
    assert dialogue.tokens_read == qwen.builder([turns[:1]]).ids.shape[1] + 2  # two were said and read, the third was not
    close(dialogue.read(turns).states, qwen.prefill(qwen.builder([turns])).states)


def test_a_conversation_that_is_too_long_is_refused_in_a_sentence(qwen):
    with pytest.raises(ValueError, match=r"has \d+ tokens, what follows may have 500 and the model reads 512; shorten"):
        Dialogue(qwen).reply([Turn("user", "how many ?")], max_new_tokens=500)


def test_what_was_made_of_a_conversation_is_the_same_read_at_once_or_on_the_way(tmp_path):
    """Ages count pictures from the last, and the words after, between and before them."""
    seeing = mllm.load(MLLMConfig(str(tiny.mllm_folder(tmp_path)), dtype="float32"))
    turns = [
        Turn("user", "a star?", (tiny.image(),)),
        Turn("assistant", "no"),
        Turn("user", "and here?", (tiny.image(seed=1),)),
    ]
    dialogue = Dialogue(seeing)
    dialogue.read(turns[:1])
    states, ages = dialogue.read(turns).looked()
    whole = seeing.prefill(seeing.builder([turns, [Turn("user", "hello")]])).looked()
    torch.testing.assert_close(states[0], whole.states[0, whole.ages[0] != 0], atol=1e-5, rtol=1e-4)
    assert torch.equal(ages[0], whole.ages[0, whole.ages[0] != 0])
    assert [age for age, _ in itertools.groupby(ages[0].tolist())] == [-3, 2, -2, 1, -1]
    assert (ages == 1).sum() == (ages == 2).sum() > 0
    assert [age for age, _ in itertools.groupby(whole.ages[1].tolist())] == [0, -1]
