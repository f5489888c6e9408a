"""Edits: pure, allowed, and doing what their words say, checked by the pixel reader where it can be."""

from collections import Counter

import numpy as np
import pytest

from data.records import Edit as EditRecord
from data.records import to_record
from data.world.check import agrees
from data.world.edits import KINDS, edit_sample, keeps_rules, make_edit, mask, refer
from data.world.reader import read
from data.world.render import footprint, render
from data.world.scene import HELD_OUT_PAIRS, SPLITS, Object, Scene, make_scene, relation


@pytest.mark.parametrize("split", SPLITS)
def test_no_edit_leaves_the_rules(split):
    kinds = Counter()
    for index in range(300):
        edit = make_edit(1, index, split)
        assert keeps_rules(edit.before, split)
        assert keeps_rules(edit.after, split)
        assert edit == make_edit(1, index, split)
        kinds[edit.kind] += 1
    assert set(kinds) == ({"recolour", "move", "swap"} if split == "counts" else set(KINDS))


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_changes_what_its_kind_says(kind):
    edits = [edit for i in range(250) if (edit := make_edit(2, i)).kind == kind]
    assert len(edits) > 10
    for edit in edits:
        before, after = edit.before.objects, edit.after.objects
        assert edit.before.background == edit.after.background
        gone, new = set(before) - set(after), set(after) - set(before)
        counts = {"recolour": (1, 1), "add": (0, 1), "remove": (1, 0), "move": (1, 1), "swap": (2, 2)}
        assert (len(gone), len(new)) == counts[kind]
        assert all(thing.name in edit.instruction for thing in gone if kind != "recolour")
        if kind == "recolour":
            (old,), (made,) = gone, new
            assert (old.shape, old.size, old.x, old.y) == (made.shape, made.size, made.x, made.y)
            assert edit.instruction.endswith(made.colour)
        if kind == "swap":
            assert {(o.x, o.y) for o in gone} == {(o.x, o.y) for o in new}
            assert {(o.name, o.size) for o in gone} == {(o.name, o.size) for o in new}


def test_moves_and_additions_end_where_they_were_told():
    checked = Counter()
    for index in range(300):
        edit = make_edit(3, index)
        new = [thing for thing in edit.after.objects if thing not in edit.before.objects]
        for words in ("left of", "right of", "above", "below"):
            head, found, anchor = edit.instruction.partition(f" {words} ")
            if found and edit.kind in ("add", "move"):
                there = next(o for o in edit.before.objects if refer(o, edit.before) == anchor)
                assert relation(new[0], there) == words, (head, edit)
                checked[edit.kind] += 1
    assert min(checked["add"], checked["move"]) > 10


def test_the_mask_covers_the_objects_that_changed_and_nothing_else():
    for index in range(60):
        edit = make_edit(4, index)
        changed = mask(edit.before, edit.after, 64)
        touched = np.zeros((64, 64), bool)
        for thing in set(edit.before.objects) ^ set(edit.after.objects):
            rows, columns, coverage = footprint(thing, 64)
            touched[rows, columns] |= coverage > 0
        assert changed.any()
        assert not (changed & ~touched).any()
        restored = np.where(changed[..., None], render(edit.before), render(edit.after))
        assert (restored == render(edit.before)).all()


def test_the_reader_sees_both_scenes():
    for index in range(25):
        edit = make_edit(5, index, "pairs")
        for scene in (edit.before, edit.after):
            assert agrees(read(render(scene)), scene)


def test_words_single_one_object_out():
    for index in range(200):
        scene = make_scene(6, index, "counts")
        words = [name for thing in scene.objects if (name := refer(thing, scene))]
        assert len(words) == len(set(words))
    left, right = Object("circle", "red", "small", 0.2, 0.5), Object("circle", "red", "small", 0.8, 0.5)
    star = Object("star", "blue", "large", 0.5, 0.2)
    scene = Scene("white", (left, right, star))
    assert [refer(o, scene) for o in scene.objects] == [
        "the leftmost red circle",
        "the rightmost red circle",
        "the blue star",
    ]
    large = Object("circle", "red", "large", 0.8, 0.5)
    assert refer(large, Scene("white", (left, large))) == "the large red circle"


def test_rules_know_the_splits():
    (colour, shape), *_ = sorted(HELD_OUT_PAIRS)
    held_out = Scene("white", (Object(shape, colour, "small", 0.5, 0.5),))
    assert keeps_rules(held_out, "pairs")
    assert not keeps_rules(held_out, "train")
    assert not keeps_rules(Scene("white", ()), "train")
    near = Object("circle", "red", "small", 0.5, 0.5), Object("circle", "red", "small", 0.7, 0.5)
    assert not keeps_rules(Scene("white", near), "train")
    assert not keeps_rules(Scene("white", (Object("circle", "red", "large", 0.1, 0.5),)), "val")


def test_a_sample_becomes_an_edit_record():
    edit, record = make_edit(7, 3), to_record("edit", edit_sample(7, 3, "train", 64))
    assert isinstance(record, EditRecord)
    assert record.instruction == edit.instruction
    assert (np.asarray(record.sources[0]) == render(edit.before)).all()
    assert (np.asarray(record.image) == render(edit.after)).all()
