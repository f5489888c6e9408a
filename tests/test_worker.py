"""The thread that owns the model, without HTTP: whatever is asked beside it, each gets what it would get alone."""

import threading
import time
import weakref
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest

from model.frozen import Ended
from model.prefix import Turn
from sample.limits import Capacity
from sample.pipeline import Asked, Pipeline
from sample.settings import Drawing, Guidance
from sample.worker import Full, Question, Stopped, Worker, until
from tests import releases, tiny

FEW = Drawing(steps=3)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return Pipeline.from_release(releases.release(tmp_path_factory.mktemp("worker")))


@pytest.fixture
def worker(pipeline):
    made = Worker(pipeline, pipeline.model.mllm, Capacity(batch=4, answers=2, waiting=8))
    yield made
    made.stop()


class Held:
    """Keeps the worker busy with an answer until it is let go."""

    def __init__(self, worker):
        self.begun, self.go, self.pieces = threading.Event(), threading.Event(), 0
        self.future = worker.answer(question("hold"), self.hear)
        assert self.begun.wait(60)

    def hear(self, _):
        self.pieces += 1
        self.begun.set()
        assert self.go.wait(60)


def question(text, tokens: int | None = 6, **options):
    return Question((Turn("user", text),), tokens, **options)


def eventually(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def heard(worker, asked):
    pieces = []
    said = worker.answer(asked, pieces.append).result(60)
    assert pieces[0] == ""
    return "".join(pieces), said


def test_drawings_that_wait_are_one_batch_and_each_as_if_alone(pipeline, worker):
    prompts = ["a red circle", "a blue square", "a green star", "a red circle"]
    held = Held(worker)
    futures = [worker.draw(Asked(prompt), [seed], FEW)[0] for seed, prompt in enumerate(prompts)]
    held.go.set()
    pictures = [future.result(60) for future in futures]
    assert worker.done["batches"] == 1
    for seed, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        alone = pipeline([prompt], [seed], FEW)[0]
        assert np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max() <= 1  # 1e-5 before rounding


def test_only_drawings_of_one_kind_share_a_batch(worker):
    other = Drawing(steps=3, guidance=Guidance(text=1.0))
    held = Held(worker)
    futures = [worker.draw(Asked("a red circle"), [0], drawing)[0] for drawing in (FEW, other, FEW)]
    futures += worker.draw(Asked("a red circle", (tiny.image((16, 16)),)), [0], FEW)
    held.go.set()
    for future in futures:
        future.result(60)
    assert worker.done["batches"] == 3


def test_a_prompt_that_cannot_be_read_fails_alone(worker):
    held = Held(worker)
    (good,) = worker.draw(Asked("a red circle"), [0], FEW)
    (bad,) = worker.draw(Asked("red " * 400), [1], FEW)
    held.go.set()
    with pytest.raises(ValueError, match="limit"):
        bad.result(60)
    assert good.result(60).size == (16, 16)


def test_answers_go_on_between_the_steps_of_a_drawing(pipeline, worker):
    """And they are the same as without it."""
    (drawn,) = worker.draw(Asked("a red circle"), [0], Drawing(steps=20_000))
    text, said = heard(worker, question("is there a star ?", 12))
    assert not drawn.done()
    assert drawn.cancel()
    mllm = pipeline.model.mllm
    turns = [Turn("user", "is there a star ?")]
    assert text == "".join(mllm.reply(mllm.builder([turns]), 12))
    assert said.tokens <= 12


def test_cancelled_work_ends_at_its_next_step(worker):
    (long,) = worker.draw(Asked("a red circle"), [0], Drawing(steps=20_000))
    time.sleep(0.2)
    assert long.cancel()
    (short,) = worker.draw(Asked("a red circle"), [0], FEW)
    assert short.result(60).size == (16, 16)
    held = Held(worker)
    under_way = weakref.ref(worker._answers[0])
    held.future.cancel()
    held.go.set()
    heard(worker, question("hello", 2))
    assert held.pieces == 1
    assert under_way() is None  # its cache is freed at once: a cycle would keep it until some collection


def test_what_waits_is_bounded_and_none_of_too_many_is_taken(worker):
    held = Held(worker)
    taken = [*worker.draw(Asked("a red circle"), list(range(6)), FEW)]
    with pytest.raises(Full):
        worker.draw(Asked("a red circle"), [0, 1, 2], FEW)
    taken += worker.draw(Asked("a red circle"), [0, 1], FEW)
    taken[0].cancel()  # its place is free again
    taken += worker.draw(Asked("a red circle"), [2], FEW)
    for _ in range(8):
        worker.answer(question("hello"), lambda _: None)
    with pytest.raises(Full):
        worker.answer(question("hello"), lambda _: None)
    held.go.set()
    assert all(future.result(60) for future in taken[1:])


def test_stopping_ends_everything(pipeline):
    worker = Worker(pipeline, pipeline.model.mllm)
    futures = [*worker.draw(Asked("a red circle"), [0, 1], Drawing(steps=20_000))]
    futures += worker.draw(Asked("a red circle"), [0], FEW)
    time.sleep(0.1)
    worker.stop()
    for future in futures:
        with pytest.raises(Stopped):
            future.result(0)
    with pytest.raises(Stopped):
        worker.draw(Asked("a red circle"), [0])


def test_a_conversation_that_goes_on_reads_only_what_is_new(pipeline, worker):
    mllm = pipeline.model.mllm
    first = question("is there a star ?", 4)
    text, said = heard(worker, first)
    longer = (*first.turns, Turn("assistant", text), Turn("user", "what colour is it ?"))
    before = worker._dialogues[-1][1].tokens_read
    answer, further = heard(worker, Question(longer, 4))
    assert answer == "".join(mllm.reply(mllm.builder([longer]), 4))
    (entry,) = worker._dialogues
    assert entry[1].tokens_read - before < further.prompt_tokens - said.prompt_tokens + further.tokens + 4


def test_what_an_answer_has_read_stays_where_it_is_cut_off(worker):
    first, heard_of = question("is there a star ?", 64), threading.Event()
    future = worker.answer(first, lambda piece: heard_of.set())
    assert heard_of.wait(60)
    future.cancel()
    eventually(lambda: worker._dialogues)
    assert worker._dialogues[0][0] == first.turns


def test_without_a_limit_an_answer_may_fill_the_context(pipeline, worker):
    asked = replace(question("is there a star ?", None), longest=10**6)
    _, said = heard(worker, asked)
    assert said.whole or said.prompt_tokens + said.tokens == pipeline.model.mllm.context
    assert heard(worker, replace(asked, longest=3))[1].tokens <= 3


def test_it_is_unwell_after_three_failures_in_a_row(pipeline, worker, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error")

    with monkeypatch.context() as patched:
        patched.setattr(worker, "pipeline", broken)
        for _ in range(3):
            assert worker.well
            with pytest.raises(RuntimeError, match="CUDA error"):
                worker.draw(Asked("a star"), [0], Drawing(1))[0].result(60)
        eventually(lambda: not worker.well)
    worker.draw(Asked("a star"), [0], Drawing(1))[0].result(60)
    eventually(lambda: worker.well)


def test_an_answer_tells_its_tokens_and_why_it_ended(pipeline, worker):
    mllm = pipeline.model.mllm
    text, said = heard(worker, question("is there a star ?", 5))
    assert said.prompt_tokens == mllm.builder([[Turn("user", "is there a star ?")]]).ids.shape[1]
    assert (said.tokens, said.whole) == (5, False) or said.whole
    stop = text[2:4]
    cut, stopped = heard(worker, question("is there a star ?", 5, stop=(stop,)))
    assert cut == text[: text.index(stop)]
    assert stopped.whole
    with pytest.raises(ValueError, match="and the model reads"):
        heard(worker, question("hello", mllm.context))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_a_stop_is_found_however_the_text_is_cut(size):
    text, stop = "one two\n\nthree tw STOP four", ["\n\nthree tw ST", "STOP"]

    def pieces():
        for start in range(0, len(text), size):
            yield text[start : start + size]
        return Ended(len(text), whole=True)

    assert "".join(until(pieces(), stop)) == "one two"
    assert "".join(until(pieces(), ["four!", "absent"])) == text


def test_a_listener_that_fails_ends_its_answer_alone(worker):
    def hear(_):
        raise RuntimeError("nobody there")

    with pytest.raises(RuntimeError):
        worker.answer(question("hello"), hear).result(60)
    assert heard(worker, question("hello"))[1].tokens


def test_a_cancelled_future_stays_so(worker):
    held = Held(worker)
    (drawn,) = worker.draw(Asked("a red circle"), [0], FEW)
    drawn.cancel()
    held.go.set()
    with pytest.raises(CancelledError):
        drawn.result(60)
