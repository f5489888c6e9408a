"""Pictures drawn for edits and dialogues are judged as their scenes would be, and the command writes what it found."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data.world.asks import first_step, make_ask, picture_of
from data.world.captions import describe, holds
from data.world.edits import KINDS, make_edit
from data.world.reader import read
from data.world.render import render
from data.world.scene import Scene, make_scene, random_for
from data.world.wanted import by_caption, by_edit, by_scene
from model.prefix import Turn
from sample import evaluate
from sample.measures import read_json
from sample.pipeline import Pipeline
from sample.settings import Drawing
from sample.world_edits import TURNS, conversing, drawer, editing, judge

QUICK = Drawing(steps=2)


@pytest.mark.parametrize("split", ["val", "pairs"])
def test_the_scene_after_is_right_and_the_one_before_is_not(split):
    kinds = set()
    for index in range(40):
        edit = make_edit(1, index, split)
        kinds.add(edit.kind)
        wanted = by_edit(edit)
        right, left = judge(wanted, picture_of(edit.after, 64)), judge(wanted, picture_of(edit.before, 64))
        assert (right.change, right.kept, right.whole) == (True, True, True)
        assert (left.change, left.whole) == (False, False)
        assert left.kept
    assert kinds == set(KINDS)


def test_a_lost_or_added_object_is_noticed():
    for index in range(30):
        scene, other = make_scene(2, index, "val"), make_scene(2, index + 1000, "val")
        wanted = by_scene(scene)
        fewer = judge(wanted, picture_of(Scene(scene.background, scene.objects[1:]), 64))
        assert not fewer.kept
        assert fewer.at.count(None) == 1
        assert not judge(wanted, picture_of(Scene("white", scene.objects), 64)).kept or scene.background == "white"
        if scene.background == other.background and other != scene:
            assert not judge(wanted, picture_of(other, 64)).whole
    one = next(s for i in range(50) if len((s := make_scene(3, i)).objects) == 2)
    alone = judge(by_scene(Scene(one.background, one.objects[:1])), picture_of(one, 64))
    assert (alone.kept, alone.change, alone.whole) == (True, True, False)


def test_captions_are_judged_as_their_own_check_does():
    agreed = []
    for index in range(60):
        caption = describe(make_scene(4, index), random_for(4, "test", index))
        for scene in (make_scene(4, index), make_scene(4, index + 1)):
            pixels = render(scene)
            whole = judge(by_caption(caption), Image.fromarray(pixels)).whole
            assert whole == holds(caption, read(pixels).scene())
            agreed.append(whole)
    assert 50 < sum(agreed) < 90


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_release("assets/world/release", "cpu")


def test_a_conversation_is_drawn_the_same_alone_and_among_others(pipeline):
    draw = drawer(pipeline, QUICK)
    asks = [make_ask(5, index, "val", kind) for index, kind in enumerate(("dialogue", "caption", "subject"))]
    together = draw([ask.turns for ask in asks], [1, 2, 3])
    alone = draw([asks[1].turns], [2])
    off = np.abs(np.asarray(together[1], np.int16) - np.asarray(alone[0], np.int16))
    assert off.mean() < 2  # bfloat16 rounds a padded row otherwise
    assert draw([[Turn("user", "a red circle")]], [2])[0] != alone[0]


def test_conversations_end_where_they_fail(pipeline):
    measures, held = conversing(drawer(pipeline, QUICK), "val", 3, seed=6, batch_size=2)
    assert len(held) == measures["edit.three_turns"].n == measures["edit.three_turns.turn_1"].n == 3
    for dialogue in held:
        rights = [right for _, _, right in dialogue.steps]
        assert all(rights[:-1])
        assert rights[-1] or len(rights) <= TURNS
        assert [turn.role for turn in dialogue.turns[1:]] == ["user", "assistant"] * len(rights)


def test_a_conversation_has_its_own_seeds_in_any_batch():
    def tell(conversations, seeds):
        asked.extend((tuple(turn.text for turn in turns), seed) for turns, seed in zip(conversations, seeds, strict=True))
        return [truth(turns) for turns in conversations]

    def truth(turns):
        """Every other first picture is right."""
        right = len(turns) > 2 or len(turns[1].text) % 2
        return wanted[turns[1].text] if right else Image.new("RGB", (64, 64))

    wanted = {}
    for index in range(12):
        scene = make_scene(6, index, "val")
        step = first_step(scene, "val", random_for(6, "three turns", "val", index))
        wanted[step.text] = picture_of(step.scene, 64)
    seen = []
    for batch_size in (3, 12):
        asked: list = []
        conversing(tell, "val", 12, seed=6, batch_size=batch_size)
        seen.append(sorted(asked))
    assert seen[0] == seen[1]
    assert 12 < len(seen[0]) < 24


def test_what_does_nothing_changes_nothing():
    def idle(conversations, seeds):
        return [turns[-1].images[-1] for turns in conversations]

    measures, judged = editing(idle, "val", 12, seed=7)
    assert measures["edit.change"].value == measures["edit.source.change"].value == 0
    assert measures["edit.kept"].value == measures["reconstruct.found"].value == measures["reconstruct.whole"].value == 1
    assert measures["reconstruct.psnr"].value == 60
    assert len(judged) == 36


def test_the_command_writes_measures_pictures_and_a_page(tmp_path):
    files = {f"--{kind}": str(tmp_path / f"out.{kind}") for kind in ("json", "grid", "html")}
    options = ["--n", "1", "--steps", "1", *itertools.chain(*files.items())]
    evaluate.main(["edits", "--release", "assets/world/release", *options])
    measures = read_json(tmp_path / "out.json")
    assert {"edit.change", "edit.kept", "edit.three_turns", "subject.whole", "reconstruct.found"} < measures.keys()
    assert Image.open(tmp_path / "out.grid").width > 300
    page = (tmp_path / "out.html").read_text()
    assert 7 <= page.count("<img ") == page.count("data:image/png;base64,") <= 6 + TURNS  # three pairs, and a conversation
    assert make_ask(0, 0, "val", "edit").turns[-1].text in page


def test_wrong_numbers_are_refused():
    command = [sys.executable, "-m", "sample.evaluate", "edits", "--release", "nowhere", "--n", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "--n" in done.stderr) == (2, True)
