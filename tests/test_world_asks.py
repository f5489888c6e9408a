"""What is asked of a picture, and what a right one has to show."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data.world.asks import KINDS, Mix, make_ask, next_step, without_dropped
from data.world.captions import describe, holds
from data.world.check import agrees
from data.world.edits import FAR, keeps_rules, make_edit, stands_free
from data.world.labels import CHOICES, encode_caption, encode_choice, encode_wanted
from data.world.reader import UNCLEAR, read
from data.world.scene import HELD_OUT_PAIRS, SHAPES, Object, Scene, make_scene, random_for, relation
from data.world.wanted import LOOSE, _near, by_caption, by_edit, by_scene, laid_out
from model.prefix import DRAW_SYSTEM


@pytest.mark.parametrize("split", ["train", "val", "pairs"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_ask_is_a_function_of_its_address_and_keeps_its_split(kind, split):
    for index in range(60):
        ask = make_ask(3, index, split, kind)
        again = make_ask(3, index, split, kind)
        assert (ask.turns, ask.wanted, ask.kind) == (again.turns, again.wanted, kind)
        assert ask.turns[-1].role == "user"
        assert 1 <= len(ask.wanted.things) <= 4
        if split != "pairs":
            assert not any((thing.colour, thing.shape) in HELD_OUT_PAIRS for thing in ask.wanted.things)


def test_kinds_come_as_often_as_the_mix_says():
    mix = Mix(caption=0.2, edit=0.2, swap=0.1, passing=0.1, reconstruct=0.1, subject=0.15)
    counts = Counter(make_ask(1, index, mix=mix, size=16).kind for index in range(800))
    for kind in KINDS:
        assert abs(counts[kind] / 800 - mix.share(kind)) < 0.06
    with pytest.raises(ValueError, match="mix"):
        Mix(caption=0.9)


def test_edits_that_train_more_are_edits():
    """Swaps alone, and what `make_edit` never says: "the circle" where no other is one."""
    parts = {make_ask(1, index, kind="swap", size=16).part for index in range(50)}
    assert parts == {"swap"}
    texts = [make_ask(1, index, kind="passing", size=16).turns[-1].text for index in range(100)]
    assert any("the one on the" in text for text in texts)
    assert any(f"the {shape} " in f"{text} " for text in texts for shape in SHAPES)


def test_every_spot_of_an_open_place_is_right():
    """What `by_edit` tells is one of the scenes that the instruction allows, and stays one a little aside where it can."""
    checked, steady = 0, 0
    for index in range(300):
        edit = make_edit(4, index)
        wanted = by_edit(edit)
        for thing in wanted.things:
            if edit.link is not None and thing.spots:
                how, anchor = edit.link
                spots = [replace(anchor, x=x, y=y) for x, y, _ in thing.spots]
                bears = [all(relation(near, anchor) == how for near in _near(spot)) for spot in spots]
                assert all(bears) or not any(bears)
                steady += all(bears)
            for x, y, spread in thing.spots:
                new = next(t for t in edit.after.objects if t not in edit.before.objects)
                moved = replace(new, x=x, y=y)
                there = replace(edit.after, objects=tuple(moved if t is new else t for t in edit.after.objects))
                assert spread == 0
                assert keeps_rules(there, "train")
                assert edit.link is None or relation(moved, edit.link[1]) == edit.link[0]
                assert all(math.dist((x, y), (old.x, old.y)) >= FAR for old in wanted.gone) or len(thing.spots) == 1
                checked += 1
    assert checked > 200
    assert steady > 20


@pytest.mark.parametrize("split", ["val", "counts"])
def test_a_layout_is_a_picture_that_the_caption_allows(split):
    told = 0
    for index in range(300):
        caption = describe(make_scene(5, index, split), random_for(5, "test", index))
        wanted = by_caption(caption)
        laid = laid_out(wanted)
        assert [thing.words for thing in laid.things] == [thing.words for thing in wanted.things]
        if len(laid.things) == 1:
            assert laid == wanted
            continue
        size = "small" if split == "counts" else "large"
        looks = [(thing.shape or "star", thing.colour or "red", thing.size or size) for thing in laid.things]
        objects = tuple(Object(*look, *thing.place[:2]) for look, thing in zip(looks, laid.things, strict=True))
        assert stands_free(objects, gap=0)
        assert holds(caption, Scene(caption.background or "white", objects))
        assert {thing.place[2] for thing in laid.things} == {LOOSE}
        told += 1
    assert told > 200
    for index in range(40):
        edited = by_edit(make_edit(5, index, split if split == "val" else "train"))
        assert laid_out(edited) == edited


def test_nobody_calls_a_thing_by_what_is_unclear_about_it():
    """Of a scene read from a picture; and what is unclear may come out as it will."""
    scene = Scene("white", (Object("circle", UNCLEAR, "large", 0.3, 0.3), Object(UNCLEAR, "red", "small", 0.7, 0.7)))
    kinds = Counter()
    for index in range(300):
        step = next_step([scene], scene.objects[index % 2], "val", random_for("unclear", index))
        assert step is not None
        assert UNCLEAR not in step.text
        assert not any(UNCLEAR in thing.words for thing in step.wanted.things)
        kinds[step.kind] += 1
    assert len(kinds) == 5
    assert not any(UNCLEAR in thing.words for thing in by_scene(scene).things)
    assert by_scene(Scene(UNCLEAR, scene.objects)).background is None


def test_labels_tell_a_scene_and_a_caption_as_they_are():
    for index in range(50):
        scene = make_scene(5, index)
        caption = describe(scene, random_for(5, "test", index))
        for own, other in zip(encode_caption(caption), encode_wanted(by_caption(caption)), strict=True):
            assert (own == other).all()
        _, places = encode_wanted(by_scene(scene))
        assert np.allclose(places[1 : 1 + len(scene.objects)], [(thing.x, thing.y, 0) for thing in scene.objects])


def test_what_is_open_is_told_in_every_way_that_is_right():
    for index in range(100):
        wanted = by_edit(make_edit(6, index))
        row, words, places = encode_choice(wanted)
        assert words.shape == places.shape == (CHOICES, 3)
        told = {tuple(np.round(place.astype(float), 4).tolist()) for place in places}
        assert told == set(wanted.things[row - 1].spots or [wanted.things[0].place])


def test_what_was_drawn_joins_the_next_turn_of_the_user():
    for index in range(80):
        ask = make_ask(7, index, "val", "dialogue")
        assert all(not turn.images for turn in ask.turns if turn.role != "user")
        pictures = [picture for turn in ask.turns for picture in turn.images]
        assert all(len(turn.images) <= 1 for turn in ask.turns)
        assert pictures
        assert ask.before is not None
        assert agrees(read(np.asarray(pictures[-1])), ask.before)
        roles = [turn.role for turn in ask.turns if turn.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_the_frame_of_drawing_is_among_those_of_an_edit():
    systems = {turns[0].text if turns[0].role == "system" else "" for i in range(60) if (turns := make_ask(8, i).turns)}
    assert {DRAW_SYSTEM, ""} < systems


def test_what_is_lost_is_not_told():
    ask = make_ask(9, 3, "train", "edit")
    assert without_dropped(ask, None) == (ask.turns, ask.wanted)
    turns, wanted = without_dropped(ask, "text")
    assert [turn.text for turn in turns] == [DRAW_SYSTEM, ""]
    assert turns[-1].images == ask.turns[-1].images
    assert ask.before is not None
    assert wanted == by_scene(ask.before)
    turns, wanted = without_dropped(ask, "image")
    assert wanted is None
    assert not any(turn.images for turn in turns)
    assert turns[-1].text == ask.turns[-1].text
    assert without_dropped(ask, "both")[1] is None
    caption = make_ask(9, 4, "train", "caption")
    assert without_dropped(caption, "image") == (caption.turns, caption.wanted)
