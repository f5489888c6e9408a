"""Raw samples of every task become the right record; anything less is a BadSample with a countable reason."""

import pytest
from PIL import Image

from data.records import BadSample, Conversation, Edit, Labelled, TextToImage, parse_messages, to_record
from model.prefix import Turn

RED, BLUE = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")


def raw(**changes):
    return {"key": "k", "image": RED, "txt": "a red square", "json": {}} | changes


def test_text_to_image():
    assert to_record("t2i", raw(txt=" a red square\n")) == TextToImage("k", "a red square", RED)
    assert to_record("t2i", raw(txt="", json={"caption": "from json"})) == TextToImage("k", "from json", RED)


def test_edit_and_reconstruction():
    assert to_record("edit", raw(sources=(BLUE,))) == Edit("k", (BLUE,), "a red square", RED)
    assert to_record("instruct", raw(sources=(BLUE, RED))) == Edit("k", (BLUE, RED), "a red square", RED)
    assert to_record("i2i", raw(txt="")) == Edit("k", (RED,), "", RED)


def test_labelled():
    assert to_record("labelled", raw(json={"label": 3})) == Labelled("k", RED, 3)
    assert to_record("labelled", raw(json={"scene": {"background": "white"}})) == Labelled("k", RED, {"background": "white"})
    assert to_record("labelled", raw(json={"scene": "a beach", "label": 3})) == Labelled("k", RED, 3)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}],
        [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}],
        [{"from": "human", "value": "what?\n<image>"}, {"from": "gpt", "value": "red"}],
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ],
    ],
)
def test_the_usual_spellings_of_a_conversation_agree(messages):
    expected = Conversation("k", (Turn("user", "what?", (RED,)), Turn("assistant", "red")))
    assert to_record("chat", raw(json={"messages": messages})) == expected
    assert to_record("chat", raw(json={"conversations": messages})) == expected


def test_images_go_to_the_turns_that_mark_them():
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "<image> colour?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "<image> and this?"},
        {"role": "assistant", "content": "blue"},
    ]
    turns = parse_messages(messages, (RED, BLUE))
    assert [turn.images for turn in turns] == [(), (RED,), (), (BLUE,), ()]
    assert [turn.text for turn in turns] == ["be short", "colour?", "red", "and this?", "blue"]


USER, ANSWER = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("t2i", {"txt": " "}, "no caption"),
        ("t2i", {"txt": "", "json": {"caption": 3}}, "no caption"),
        ("t2i", {"txt": "", "json": {"caption": "a cat \ud83d"}}, "a text is not Unicode"),
        ("t2i", {"image": None}, "no image"),
        ("i2i", {"image": None}, "no image"),
        ("edit", {}, "no source image"),
        ("labelled", {}, "no label"),
        ("labelled", {"json": {"label": True}}, "no label"),
        ("labelled", {"json": {"label": "cat"}}, "no label"),
        ("labelled", {"json": {"label": -1}}, "a label is below 0"),
        ("chat", {}, "no messages"),
        ("chat", {"json": {"messages": []}}, "no messages"),
        ("chat", {"json": {"messages": [USER]}}, "messages do not end with an answer to a user"),
        ("chat", {"json": {"messages": [ANSWER]}}, "messages do not end with an answer to a user"),
        ("chat", {"json": {"messages": ["hello", ANSWER]}}, "a message is not an object"),
        (
            "chat",
            {"json": {"messages": [USER, {"role": "tool", "content": ""}]}},
            "a message lacks a known role or its text",
        ),
        (
            "chat",
            {"json": {"messages": [USER, {"role": ["user"], "content": ""}]}},
            "a message lacks a known role or its text",
        ),
        ("chat", {"json": {"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}}, "a text is not Unicode"),
        ("chat", {"json": {"messages": [USER, {"role": "assistant"}]}}, "a message lacks a known role or its text"),
        (
            "chat",
            {"json": {"messages": [{"role": "user", "content": [{"type": "audio"}]}, ANSWER]}},
            "a message has a part that is neither text nor image",
        ),
        (
            "chat",
            {"json": {"messages": [{"role": "user", "content": "<image><image>"}, ANSWER]}},
            "messages name another number of images than the sample has",
        ),
    ],
)
def test_rejects_name_their_reason(task, changes, reason):
    with pytest.raises(BadSample) as caught:
        to_record(task, raw(**changes))
    assert caught.value.reason == reason
