import numpy as np
import pytest
from PIL import Image

from model.prefix import Turn
from sample.jobs import Jobs
from sample.page_conversations import Conversations
from sample.pipeline import Asked, Pipeline
from sample.session import Session
from sample.settings import Drawing
from sample.studio import PREVIEWS, Studio, drawing_from, pictures_from
from tests import releases, tiny

FEW = Drawing(steps=3)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return Pipeline.from_release(releases.release(tmp_path_factory.mktemp("studio")), "cpu")


@pytest.fixture
def studio(pipeline):
    jobs = Jobs(seconds=60)
    yield Studio(pipeline, jobs)
    jobs.close()


@pytest.fixture
def photo(tmp_path):
    tiny.image((16, 16)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def same(one: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_the_pictures_are_those_of_the_pipeline_and_say_what_made_them(studio, pipeline):
    *_, last = studio.draw(" a red circle ", count=2, seed=5, drawing=FEW)
    straight = pipeline(["a red circle"] * 2, [5, 6], FEW)
    assert last.done
    assert last.seed == 5
    assert all(map(same, last.pictures, straight))
    assert [(p.info["prompt"], p.info["seed"], p.info["steps"]) for p in last.pictures] == [
        ("a red circle", "5", "3"),
        ("a red circle", "6", "3"),
    ]
    assert last.pictures[0].info["release"] == pipeline.fingerprint


@pytest.mark.parametrize("solver", ["dpm++", "heun"])
def test_each_step_is_told_and_some_are_shown(studio, solver):
    *steps, last = studio.draw("a star", drawing=Drawing(steps=2 * PREVIEWS, solver=solver))
    assert steps[-1].note == f"Step {2 * PREVIEWS} of {2 * PREVIEWS}"
    shown = [view.pictures for view in steps if view.pictures]
    assert len(shown) == PREVIEWS if solver == "dpm++" else PREVIEWS - 1 <= len(shown) <= PREVIEWS
    assert same(shown[-1][0], last.pictures[0]) or solver == "heun"  # the last step goes to where it said it would
    assert not same(shown[0][0], last.pictures[0])


def test_an_edit_starts_from_the_picture(studio, pipeline, photo):
    sources = pictures_from([photo])
    drawing = drawing_from(steps=3, guidance=2, image_guidance=1.5)
    *_, last = studio.draw("a star", drawing=drawing, sources=sources)
    assert same(last.pictures[0], pipeline([Asked("a star", sources)], [0], drawing)[0])
    assert not same(last.pictures[0], pipeline(["a star"], [0], drawing)[0])


def test_what_will_not_do_is_refused_in_a_sentence(studio, photo, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    bomb = tmp_path / "bomb.png"
    Image.new("1", (9000, 9000)).save(bomb)

    def draw(prompt: object = "a star", **given):
        return lambda: list(studio.draw(prompt, **given))

    cases = {
        "prompt: there is nothing": draw("  "),
        "prompt: there is nothing; write": draw(None),
        "prompt: 2,001 characters are too many": draw("a" * 2001),
        "limit is 256": draw("star " * 300),
        "pictures: 9 will not do; give a whole number from 1 to 8": draw(count=9),
        "pictures: 1.5 will not do": draw(count=1.5),
        "seed: nothing will not do": draw(seed=None),
        "seed: -1": draw(seed=-1),
        "seed: inf": draw(seed=float("inf")),
        "steps: 101": lambda: drawing_from(101, 3),
        "steps: '9' will": lambda: drawing_from("9", 3),
        "guidance: nan": lambda: drawing_from(10, float("nan")),
        "picture guidance: 21": lambda: drawing_from(10, 3, image_guidance=21),
        "solver: 'magic' is unknown": lambda: drawing_from(10, 3, "magic"),
        "what to avoid: 2,001": lambda: drawing_from(10, 3, negative="a" * 2001),
        "^image text.png: an image cannot be decoded; give a whole PNG": lambda: pictures_from([tmp_path / "text.png"]),
        "^image bomb.png: an image has more than 64,000,000 pixels": lambda: pictures_from([bomb]),
        "pictures: 5 are too many": lambda: pictures_from([photo] * 5),
        "absent.png is not a file": lambda: pictures_from([tmp_path / "absent.png"]),
        "^image x.png is not a file": lambda: pictures_from(["http://example.org/x.png"]),
    }
    for words, act in cases.items():
        with pytest.raises(ValueError, match=words):
            act()


def test_large_pictures_are_kept_small(tmp_path):
    Image.new("RGB", (5000, 100)).save(tmp_path / "wide.jpg")
    assert pictures_from([tmp_path / "wide.jpg"])[0].size == (2048, 41)


def test_a_visitor_talks_and_has_pictures_drawn_in_one_conversation(studio, pipeline, photo, tmp_path):
    talks = Conversations(studio, tmp_path, answer_tokens=8)
    *_, said = talks.say("ann", "is there a star ?", [photo])
    *_, drawn = talks.draw("ann", "a red circle")
    *_, asked = talks.say("ann", "what colour is it ?")

    session = Session(pipeline)
    first = "".join(session.say("is there a star ?", pictures_from([photo]), max_new_tokens=8))
    picture = session.draw("a red circle")
    second = "".join(session.say("what colour is it ?", max_new_tokens=8))
    assert [message["content"] for message in said] == [{"path": str(photo)}, "is there a star ?", first]
    assert drawn[:3] == said
    with Image.open(drawn[-1]["content"]["path"]) as shown:
        assert same(shown, picture)
    assert [(m["role"], m["content"]) for m in asked[-2:]] == [("user", "what colour is it ?"), ("assistant", second)]
    assert talks.messages("ann") == asked
    assert session.turns[-1] == Turn("assistant", second)


def test_an_answer_that_is_broken_off_or_refused_leaves_no_trace(studio, tmp_path):
    talks = Conversations(studio, tmp_path, answer_tokens=8)
    *_, before = talks.say("ann", "is there a star ?")
    for begun in (talks.say("ann", "what colour is it ?"), talks.draw("ann", "a red circle")):
        next(begun)
        begun.close()
        assert talks.messages("ann") == before
    with pytest.raises(ValueError, match="limit is 512"):
        list(talks.say("ann", "star " * 300))
    with pytest.raises(ValueError, match="question: there is nothing"):
        talks.say("ann", "")
    assert talks.messages("ann") == before
    *_, after = talks.say("ann", "what colour is it ?")
    assert after[: len(before)] == before


def test_conversations_are_apart_few_and_forgotten_when_old(studio, tmp_path):
    now = 0.0
    talks = Conversations(studio, tmp_path, 8, most=2, idle_seconds=10, clock=lambda: now)
    for visitor in ("ann", "bob", "cat"):
        now += 1
        *_, shown = talks.say(visitor, f"is there a {visitor} ?")
        assert len(shown) == 2
    assert not talks.messages("ann")  # the one that was not used for longest
    talks.forget("bob")
    assert not talks.messages("bob")
    now += 10.5
    *_, shown = talks.say("dan", "is there a star ?")
    assert not talks.messages("cat")
    assert talks.messages("dan") == shown
