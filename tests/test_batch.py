"""Batches hold what the records say, dropped or not, with the real prefix builder of a tiny MLLM."""

from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image

from data.batch import ChatCollate, LabelledCollate, T2IBatch, TextToImageCollate, count_tokens, shorten
from data.dropout import Dropout, drop
from data.records import BadSample, Conversation, Edit, Labelled, TextToImage
from data.transforms import resize_and_crop, to_tensor
from model.mllm import MLLMConfig, load
from model.prefix import Prefix, PrefixBuilder, Turn

ALL = Dropout(text=0)
RED, BLUE = Image.new("RGB", (24, 16), "red"), Image.new("RGB", (16, 16), "blue")


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> PrefixBuilder:
    return load(MLLMConfig(str(tiny.mllm_folder(tmp_path_factory.mktemp("mllm"))), dtype="float32")).builder


def equal(ours: Prefix, expected: Prefix) -> bool:
    given, wanted = ours.arguments(), expected.arguments()
    return given.keys() == wanted.keys() and all(torch.equal(given[name], wanted[name]) for name in wanted)


def test_text_to_image(builder):
    records = [TextToImage("a", "a red circle", RED), TextToImage("b", "a blue square on white", BLUE)]
    batch = TextToImageCollate(builder, 16, ALL, seed=0)(records, [7, 1 << 40])
    assert batch.index.tolist() == [7, 1 << 40]
    assert batch.index.dtype == torch.int64
    assert equal(batch.prefix, builder.draw(["a red circle", "a blue square on white"]))
    assert batch.pixels is not None
    assert batch.pixels.shape == (2, 3, 16, 16)
    assert torch.equal(batch.pixels[0], to_tensor(resize_and_crop(RED, 16)))


def test_dropped_conditions_are_the_null_branches(builder):
    dropout = Dropout(text=0.25, image=0.25, both=0.25)
    indices = list(range(40))
    records = [Edit(str(index), (RED,), "make it blue", BLUE) for index in indices]
    batch = TextToImageCollate(builder, 16, dropout, seed=3)(records, indices)
    events = [drop(index, 3, dropout) for index in indices]
    assert set(events) == {None, "text", "image", "both"}
    texts = ["" if event in ("text", "both") else "make it blue" for event in events]
    images = [() if event in ("image", "both") else (RED,) for event in events]
    assert equal(batch.prefix, builder.draw(texts, images))
    assert batch.pixels is not None
    assert batch.pixels.min() == -1
    assert (batch.pixels[:, 2] == 1).all()


def test_a_sample_is_the_same_in_any_batch(builder):
    collate = TextToImageCollate(builder, 16, Dropout(text=0.5), seed=0)
    records = [TextToImage(str(n), "a red circle", RED) for n in range(8)]
    together = collate(records, list(range(8)))
    alone: list[T2IBatch] = [collate([record], [n]) for n, record in enumerate(records)]
    lengths = together.prefix.mask.sum(-1)
    assert lengths.tolist() == [int(batch.prefix.mask.sum()) for batch in alone]
    assert len(set(lengths.tolist())) == 2


def test_a_caption_too_long_loses_its_last_words(builder):
    narrow = PrefixBuilder(builder.tokenizer, builder.images, builder.positions, max_text_tokens=10)
    caption = "a red circle left of a blue square on a white background " * 5
    short = shorten(caption, narrow)
    assert caption.startswith(short)
    assert 5 < count_tokens(short, narrow) <= 10
    assert shorten("a red circle", narrow) == "a red circle"
    batch = TextToImageCollate(narrow, 16, ALL, seed=0)([TextToImage("a", caption, RED)], [0])
    assert equal(batch.prefix, narrow.draw([short]))


def test_text_without_spaces_loses_its_last_letters(builder):
    narrow = PrefixBuilder(builder.tokenizer, builder.images, builder.positions, max_text_tokens=10)
    for caption in ("赤い丸の上に青い四角" * 20, "a " + "赤い丸" * 60, "x" * 500):
        short = shorten(caption, narrow)
        assert caption.startswith(short)
        assert 3 < count_tokens(short, narrow) <= 10


def test_chat(builder):
    turns = (Turn("user", "what colour is it ?", (RED,)), Turn("assistant", "red"))
    records = [Conversation("a", turns), Conversation("b", (Turn("user", "how many ?"), Turn("assistant", "one")))]
    batch = ChatCollate(builder)(records, [3, 4])
    prefix, targets = builder.with_targets([record.turns for record in records])
    assert equal(batch.prefix, prefix)
    assert torch.equal(batch.targets, targets)
    assert batch.targets.shape == batch.prefix.ids.shape
    assert (batch.targets != -100).any(-1).all()


def test_chat_refuses_a_question_too_long(builder):
    narrow = PrefixBuilder(builder.tokenizer, builder.images, builder.positions, max_text_tokens=10)
    short = Conversation("a", (Turn("user", "how many ?"), Turn("assistant", "one " * 30)))
    long = Conversation("b", (Turn("user", "how many ? " * 30), Turn("assistant", "one")))
    ChatCollate(narrow).check(short)
    with pytest.raises(BadSample, match="max_text_tokens"):
        ChatCollate(narrow).check(long)
    thin = Turn("user", "?", (Image.new("RGB", (1000, 4)),))
    with pytest.raises(BadSample, match="100 times as long as wide"):
        ChatCollate(builder).check(Conversation("c", (thin, Turn("assistant", "red"))))


def test_labels():
    numbers = LabelledCollate(16)([Labelled("a", RED, 3), Labelled("b", BLUE, 0)], [0, 1])
    assert isinstance(numbers.labels, torch.Tensor)
    assert numbers.labels.tolist() == [3, 0]
    scenes = LabelledCollate(16)([Labelled("a", RED, {"background": "red"})], [0])
    assert scenes.labels == ({"background": "red"},)
    assert scenes.pixels.shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"data\.sources mixes"):
        LabelledCollate(16)([Labelled("a", RED, 3), Labelled("b", RED, {})], [0, 1])
    with pytest.raises(ValueError, match="label by class number, and this task learns from scenes"):
        LabelledCollate(16, points=(4, 2))([Labelled("a", RED, 3)], [0])
    with pytest.raises(ValueError, match="a label is no scene of the generated world"):
        LabelledCollate(16, points=(4, 2))([Labelled("a", RED, {"background": "red"})], [0])


def test_batches_move_to_a_device(builder):
    images = TextToImageCollate(builder, 16, ALL, seed=0)([Edit("a", (RED,), "make it blue", BLUE)], [0])
    chats = ChatCollate(builder)([Conversation("a", (Turn("user", "?"), Turn("assistant", "red")))], [0])
    labels = LabelledCollate(16)([Labelled("a", RED, 3)], [0])
    for batch in (images, chats, labels, replace(labels, labels=({},))):
        moved = batch.to("meta")
        for name, value in vars(moved).items():
            for tensor in vars(value).values() if isinstance(value, Prefix) else (value,):
                assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", name


def test_a_source_picture_that_image_processors_refuse_is_a_bad_sample(builder):
    collate = TextToImageCollate(builder, 16, ALL, seed=0)
    collate.check(Edit("a", (BLUE,), "make it red", RED))
    with pytest.raises(BadSample, match="a source picture is more than 100 times as long as wide"):
        collate.check(Edit("a", (Image.new("RGB", (1000, 4)),), "make it red", RED))
