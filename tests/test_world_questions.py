"""Questions: answers that the picture alone decides."""

from collections import Counter

from data.world.conversations import Shares, conversation
from data.world.questions import KINDS, ask, questions
from data.world.scene import Object, Scene, make_scene, random_for


def test_every_answer_is_among_its_choices_and_every_kind_is_asked():
    asked = [question for index in range(200) for question in questions(make_scene(5, index), random_for(5, "test", index))]
    assert {question.kind for question in asked} == set(KINDS)
    assert all(question.answer in (question.choices or (question.answer,)) for question in asked)
    assert all(count < len(asked) / 2 for count in Counter(question.kind for question in asked).values())


def test_a_place_is_the_half_in_which_a_thing_clearly_lies():
    top_right = Scene("white", (Object("star", "red", "small", 0.8, 0.2),))
    told = {(q.text, q.answer) for n in range(20) if (q := ask("place", top_right, random_for(n)))}
    assert told == {
        ("Is the red star on the left or on the right of the picture?", "right"),
        ("Is the red star above or below the middle of the picture?", "above"),
    }
    assert ask("place", Scene("white", (Object("star", "red", "small", 0.55, 0.45),)), random_for(0)) is None


def test_conversations_about_where_things_stand_ask_nothing_else_and_nothing_twice():
    only = Shares(describe=0.0, read=0.0, where=1.0)
    wheres = 0
    for index in range(60):
        turns = conversation(9, index, shares=only)
        texts = [turn.text for turn in turns if turn.role == "user"]
        assert len(set(texts)) == len(texts)
        wheres += all("picture?" in text or " of " in text or "above" in text or "below" in text for text in texts)
    assert wheres > 50  # a scene of one thing in the middle has nowhere to be
