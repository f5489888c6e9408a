"""Drawings and answers that are asked for from many threads -> done on one thread, which owns the model.

Drawings wait in order. Those with the settings of the one that waits longest are drawn with it as one batch; a picture is
the same in any. After each step of a drawing, each answer under way says one piece, so that neither holds the other up.
After a batch the worker waits a moment for as many drawings as it had: clients that ask one picture after the other would
else fall into batches that take turns. A future that is cancelled ends its work at the next step or piece; the last one of
a batch, the batch. Nothing here knows of HTTP.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from model.dialogue import Dialogue
from model.frozen import Ended, FrozenMLLM
from model.prefix import Turn
from sample.limits import Capacity
from sample.pipeline import Asked, Pipeline, Progress
from sample.settings import Drawing

log = logging.getLogger(__name__)


class Full(Exception):
    """As much waits as may."""


class Stopped(Exception):
    """The worker takes nothing more, and ended what it had."""


@dataclass(frozen=True)
class Question:
    """A conversation that wants an answer."""

    turns: tuple[Turn, ...]
    max_new_tokens: int | None = None
    """None: `longest`, or what the model's context leaves."""
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """What ends the answer, and is not said."""
    longest: int = 1024


@dataclass(frozen=True)
class Said:
    """How an answer came to its end."""

    prompt_tokens: int
    tokens: int
    whole: bool
    """It ended by itself or at a stop, not at the limit of tokens."""


Hear = Callable[[str], None]
"""Takes a piece of an answer, on the worker's thread: it must not block. The first is empty: the question was read."""

SICK = 3  # jobs in a row that failed inside the server


@dataclass(eq=False)
class _Drawn:
    asked: Asked
    seed: int
    drawing: Drawing
    future: "Future[Image.Image]" = field(default_factory=Future)

    @property
    def kind(self) -> tuple[Drawing, bool]:
        """Drawings of one kind make a batch."""
        return self.drawing, bool(self.asked.images)


@dataclass(eq=False)
class _Answered:
    question: Question
    hear: Hear
    future: "Future[Said]" = field(default_factory=Future)
    pieces: "Generator[str, None, Said] | None" = None


class Worker:
    """One thread that draws and answers."""

    def __init__(self, pipeline: Pipeline | None, mllm: FrozenMLLM, capacity: Capacity = Capacity()):
        self.pipeline, self.mllm, self.capacity = pipeline, mllm, capacity
        self.done: Counter[str] = Counter()
        """Of pictures, batches, answers, tokens, prompt_tokens: how many since the start."""
        self._drawings: deque[_Drawn] = deque()
        self._questions: deque[_Answered] = deque()
        self._answers: list[_Answered] = []
        self._dialogues: deque[tuple[tuple[Turn, ...], Dialogue]] = deque(maxlen=capacity.conversations)
        self._stopped, self._failed = False, 0  # failures in a row
        self._changed = threading.Condition()
        self._last, self._patience = 0, 0.0  # size of the last batch; until when one as large is waited for
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def draw(self, asked: Asked, seeds: list[int], drawing: Drawing = Drawing()) -> "list[Future[Image.Image]]":
        """One picture for each seed.

        Raises:
            ValueError: the model draws nothing.
            Full: too many pictures would wait; none of these does.
            Stopped: the worker has.
        """
        if self.pipeline is None:
            raise ValueError("this model draws nothing; start with a release")
        drawn = [_Drawn(asked, seed, drawing) for seed in seeds]
        self._enter(self._drawings, drawn)
        return [each.future for each in drawn]

    def answer(self, question: Question, hear: Hear) -> "Future[Said]":
        """Says the answer to `hear`, piece by piece. Its future raises ValueError for what the model cannot read.

        Raises:
            Full: too many questions wait.
            Stopped: the worker has.
        """
        answered = _Answered(question, hear)
        self._enter(self._questions, [answered])
        return answered.future

    def stop(self) -> None:
        """Ends at the next step: everything that is under way or waits raises Stopped. Waits for the thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> dict[str, int]:
        """How many pictures and answers wait."""
        return {"pictures": len(self._drawings), "answers": len(self._questions)}

    @property
    def well(self) -> bool:
        """Whether it works: its thread lives, and of the last SICK jobs not all have failed inside the server."""
        return self._thread.is_alive() and self._failed < SICK

    def _enter(self, queue: deque[Any], jobs: list[Any]) -> None:
        with self._changed:
            if self._stopped:
                raise Stopped
            for job in [job for job in queue if job.future.cancelled()]:
                queue.remove(job)
            if len(queue) + len(jobs) > self.capacity.waiting:
                raise Full
            queue.extend(jobs)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._questions or self._drawings or self._answers)
                if self._stopped:
                    break
                batch = self._next_batch()
                if not batch and not self._answers and not self._questions:  # it waits for more of them
                    self._changed.wait(max(0.0, self._patience - time.monotonic()))
                    continue
            if batch:
                self._draw(batch)
                self._last, self._patience = len(batch), time.monotonic() + self.capacity.regather_seconds
            else:
                self._speak()
        for job in [*self._drawings, *self._questions, *self._answers]:
            _settle(job.future, Stopped())
        for held in (self._drawings, self._questions, self._answers, self._dialogues):
            held.clear()

    def _next_batch(self) -> list[_Drawn]:
        """The drawing that waits longest, and those like it; none while more of them may come."""
        for job in [job for job in self._drawings if job.future.cancelled()]:
            self._drawings.remove(job)
        if not self._drawings or (len(self._drawings) < self._last and time.monotonic() < self._patience):
            return []
        alike = [job for job in self._drawings if job.kind == self._drawings[0].kind][: self.capacity.batch]
        for job in alike:
            self._drawings.remove(job)
        return alike

    def _draw(self, batch: list[_Drawn]) -> None:
        assert self.pipeline is not None
        asked, seeds = [job.asked for job in batch], [job.seed for job in batch]
        try:
            pictures = self.pipeline(asked, seeds, batch[0].drawing, partial(self._between_steps, batch))
        except ValueError as error:
            if len(batch) == 1:
                _settle(batch[0].future, error)
            else:  # one of them cannot be read; which, shows alone
                for job in batch:
                    self._draw([job])
        except _Ended:
            for job in batch:
                _settle(job.future, Stopped())
        except Exception as error:
            log.exception("a drawing failed")
            self._failed += 1
            for job in batch:
                _settle(job.future, error)
        else:
            self._failed = 0
            self.done.update(pictures=len(batch), batches=1)
            for job, picture in zip(batch, pictures, strict=True):
                _settle(job.future, picture)

    def _between_steps(self, batch: list[_Drawn], _: Progress) -> None:
        if self._stopped or all(job.future.cancelled() for job in batch):
            raise _Ended
        self._speak()

    def _speak(self) -> None:
        """Begins answers that wait, then says a piece of each."""
        with self._changed:
            while self._questions and len(self._answers) < self.capacity.answers:
                self._answers.append(self._questions.popleft())
        for job in list(self._answers):
            if not self._say_on(job):
                self._answers.remove(job)
                job.pieces = None  # and with it its cache

    def _say_on(self, job: _Answered) -> bool:
        """Whether there is more to say."""
        if job.future.cancelled():
            return False
        job.pieces = job.pieces or self._pieces(job.question)
        try:
            job.hear(next(job.pieces))
        except StopIteration as end:
            self._failed = 0
            self.done.update(answers=1, tokens=end.value.tokens, prompt_tokens=end.value.prompt_tokens)
            _settle(job.future, end.value)
            return False
        except ValueError as error:
            _settle(job.future, error)
            return False
        except Exception as error:
            log.exception("an answer failed")
            self._failed += 1
            _settle(job.future, error)
            return False
        return True

    def _pieces(self, question: Question) -> Generator[str, None, Said]:
        dialogue = self._dialogue(question.turns)
        length = dialogue.read(question.turns).mask.shape[1]
        limit = question.max_new_tokens or max(1, min(question.longest, self.mllm.context - length))
        pieces = dialogue.reply(question.turns, limit, question.temperature, question.seed)
        yield ""
        try:
            said, ended = yield from until(pieces, question.stop)
        except GeneratorExit:  # nobody listens any more; what was read is worth as much
            self._dialogues.append((question.turns, dialogue))
            raise
        self._dialogues.append((question.turns, dialogue))
        if ended is None:
            return Said(length, len(self.mllm.builder.encode(said)), whole=True)
        return Said(length, ended.tokens, ended.whole)

    def _dialogue(self, turns: tuple[Turn, ...]) -> Dialogue:
        """That of which these turns go on the longest part, or a new one."""
        begun = [entry for entry in self._dialogues if turns[: len(entry[0])] == entry[0]]
        if not begun:
            return Dialogue(self.mllm)
        longest = max(begun, key=lambda entry: len(entry[0]))
        self._dialogues.remove(longest)
        return longest[1]


class _Ended(Exception):
    """Nobody waits for this drawing any more."""


def until(pieces: Generator[str, None, Ended], stop: Sequence[str]) -> Generator[str, None, tuple[str, Ended | None]]:
    """The pieces up to the first of the texts in `stop`, of which nothing is let through. Returns all that came through, and
    how the pieces ended by themselves."""
    said = held = ""
    while True:
        try:
            held += next(pieces)
        except StopIteration as end:
            yield held
            return said + held, end.value
        found = [place for text in stop if (place := held.find(text)) >= 0]
        begun = max((n for text in stop for n in range(len(text)) if held.endswith(text[:n])), default=0)
        passed = min(found) if found else len(held) - begun
        yield held[:passed]
        said, held = said + held[:passed], held[passed:]
        if found:
            pieces.close()
            return said, None


def _settle(future: "Future[Any]", outcome: Any) -> None:
    with suppress(InvalidStateError):  # it was cancelled in the meantime
        if isinstance(outcome, Exception):
            future.set_exception(outcome.with_traceback(None))  # which would keep caches in a cycle
        else:
            future.set_result(outcome)
