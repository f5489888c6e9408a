"""Conversations of a page's visitors: who said what, with pictures, and what is to be shown of it.

Each holds what its model has read. So there are few of them at once, and those that nobody goes on with are forgotten.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any

from PIL import Image

from sample.jobs import Tell
from sample.session import Session
from sample.settings import Drawing
from sample.studio import Studio, pictures_from, previews, written

MOST = 8
IDLE_SECONDS = 3600.0

Message = dict[str, Any]
"""`role` and `content`: text, or {"path": of a picture}."""


@dataclass
class Conversation:
    """What a model remembers, and what is shown of it."""

    session: Session
    used: float
    messages: list[Message] = field(default_factory=list)
    drawn: int = 0


class Conversations:
    """One for each visitor, by name."""

    def __init__(
        self,
        studio: Studio,
        folder: Path,
        answer_tokens: int = 256,
        most: int = MOST,
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = monotonic,
    ):
        self.studio, self.folder, self.answer_tokens = studio, folder, answer_tokens
        self.most, self.idle_seconds, self.clock = most, idle_seconds, clock
        self._of: OrderedDict[str, Conversation] = OrderedDict()  # the one not used for longest comes first
        self._lock = Lock()  # the page forgets from other threads
        self._numbers = count()

    def say(self, visitor: str, text: object, paths: Sequence[object] = ()) -> Generator[list[Message], None, None]:
        """All messages, again with each piece of the answer; an answer that is not waited for leaves no trace.

        Raises:
            ValueError: the text is empty or too long, a picture will not do, or it takes too long.
        """
        text, pictures, talk = written("question", text), pictures_from(paths), self._talk(visitor)
        asked = _asked(text, paths)

        def job(tell: Tell[list[Message]]) -> None:
            answer = ""
            tell([*talk.messages, *asked])
            for piece in talk.session.say(text, pictures, max_new_tokens=self.answer_tokens):
                answer += piece
                tell([*talk.messages, *asked, _answer(answer)])
            talk.messages += [*asked, _answer(answer)]
            tell(list(talk.messages))

        return self.studio.jobs.stream(job)

    def draw(self, visitor: str, text: object, paths: Sequence[object] = ()) -> Generator[list[Message], None, None]:
        """As `say`, with the picture that the conversation comes to; the next question can be about it."""
        text, pictures, talk = written("what to draw", text), pictures_from(paths), self._talk(visitor)
        asked, drawing = _asked(f"Draw: {text}", paths), Drawing()

        def job(tell: Tell[list[Message]]) -> None:
            seen: list[Message] = []
            tell([*talk.messages, *asked])

            def show(note: str, drawn: tuple[Image.Image, ...] | None) -> None:
                if drawn is not None:
                    seen[:] = [_answer({"path": self._kept(drawn[0])})]
                tell([*talk.messages, *asked, *seen, _answer(note)])

            watch = previews(self.studio.pipeline, drawing, show)
            picture = talk.session.draw(text, pictures, seed=talk.drawn, drawing=drawing, watch=watch)
            talk.messages += [*asked, _answer({"path": self._kept(picture)})]
            talk.drawn += 1
            tell(list(talk.messages))

        return self.studio.jobs.stream(job)

    def messages(self, visitor: str) -> list[Message]:
        """What was said so far, without what was left unfinished."""
        talk = self._of.get(visitor)
        return [] if talk is None else list(talk.messages)

    def forget(self, visitor: str) -> None:
        """Ends a conversation; the visitor's next word begins another."""
        with self._lock:
            self._of.pop(visitor, None)

    def _talk(self, visitor: str) -> Conversation:
        now = self.clock()
        with self._lock:
            for name in [name for name, talk in self._of.items() if now - talk.used > self.idle_seconds]:
                del self._of[name]
            talk = self._of.setdefault(visitor, Conversation(Session(self.studio.pipeline), now))
            talk.used = now
            self._of.move_to_end(visitor)
            while len(self._of) > self.most:
                self._of.popitem(last=False)
            return talk

    def _kept(self, picture: Image.Image) -> str:
        path = self.folder / f"chat-{next(self._numbers):06d}.png"
        picture.save(path)
        return str(path)


def _asked(text: str, paths: Sequence[object]) -> list[Message]:
    return [{"role": "user", "content": content} for content in (*({"path": str(path)} for path in paths), text)]


def _answer(content: str | dict[str, str]) -> Message:
    return {"role": "assistant", "content": content}
