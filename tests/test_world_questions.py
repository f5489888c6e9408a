"""Questions: answers that the picture alone decides. Plans: what a caption says, by number."""

from collections import Counter

import numpy as np

from data.world.captions import NUMBERS, plural
from data.world.conversations import PLANNED, Shares, conversation
from data.world.questions import CELLS, KINDS, ask, questions
from data.world.render import render
from data.world.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene, make_scene, random_for
from model.prefix import DRAW_SYSTEM


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
        ways = ("picture?", " of ", "above", "below", "column and row")
        wheres += all(any(way in text for way in ways) for text in texts)
    assert wheres > 50  # a scene of one thing in the middle has nowhere to be


def test_a_plan_holds_what_its_caption_says_and_no_more():
    """Every word of the caption that names something comes back as often as the caption counts it."""
    orders = set()
    for index in range(200):
        system, user, assistant = conversation(9, index, shares=Shares(describe=0.0, read=0.0, plan=1.0))
        assert (system.role, system.text, user.role, assistant.role) == ("system", DRAW_SYSTEM, "user", "assistant")
        lines = dict(line.split(" ", 1) for line in assistant.text.removesuffix(".").split(". "))
        assert sorted(lines) == sorted([*map(str, range(1, PLANNED + 1)), "background"])
        orders.add(tuple(lines))
        picture, _, behind = user.text.partition(" on a ")
        assert lines["background"] == (behind.split()[0] if behind else "any")
        assert lines["background"] in {*BACKGROUNDS, "any"}
        named = {**{word: word for word in (*COLOURS, *SHAPES, *SIZES)}, **{plural(s): s for s in SHAPES}}
        said, count = Counter(), 1
        for word in picture.replace(",", "").split():
            count = NUMBERS.index(word) if word in NUMBERS else 1 if word in ("a", "an") else count
            if word in named:
                said[named[word]] += count
        planned = Counter(word for key, thing in lines.items() if key != "background" for word in thing.split())
        assert said == Counter({word: n for word, n in planned.items() if word in named})
        assert sum(thing == "none" for thing in lines.values()) == PLANNED - len(make_scene(9, index).objects)
        links = [place for place in ("left", "right", "above", "below") if place in planned]
        assert links in ([], ["left", "right"], ["above", "below"])
        if links:  # the caption names the linked thing first
            way = next(word for word in ("left", "right", "above", "below") if word in user.text.split())
            assert lines["1"].endswith(way)
            assert not lines["2"].endswith(way)
    assert len(orders) > 100


def test_a_thing_is_located_in_the_cell_where_its_pixels_are():
    """The middle of the pixels of its colour; a triangle's centre is a little below it."""
    seen = 0
    for index in range(200):
        scene = make_scene(12, index)
        asked = ask("locate", scene, random_for(12, "locate", index))
        if len(scene.objects) != 1 or asked is None:
            continue
        seen += 1
        colour = np.array(COLOURS[scene.objects[0].colour])
        rows, columns = np.nonzero(np.abs(render(scene, 128).astype(int) - colour).sum(-1) < 60)
        column, row = map(int, asked.answer.split())
        for told, at in ((column, columns), (row, rows)):
            middle = (at.min() + at.max() + 1) / 2 / 128 * CELLS
            assert told - 1.5 < middle < told + 0.5
    assert seen > 30
