"""One conversation with a model that may also draw: what chat and page share.

Answers and drawings read the same key/value cache. A drawing is conditioned on the whole conversation; the assistant's turn
is then empty and the picture joins the user's next turn, so that talking about it and editing it need nothing else.
"""

from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from PIL import Image

from model.dialogue import Dialogue
from model.frozen import FrozenMLLM
from model.prefix import DRAW_SYSTEM, THINK, Turn
from sample.pipeline import Asked, Pictures, Pipeline, Watch
from sample.settings import Drawing


class Session:
    """A conversation that grows by what is said and drawn; nothing joins it before it is whole."""

    def __init__(self, speaker: Pipeline | FrozenMLLM, system: str | None = None):
        """`speaker`: a pipeline draws too. `system`: instructions for the whole conversation; without them, one that begins
        with a drawing has the instruction that drawing was trained with."""
        self.pipeline = speaker if isinstance(speaker, Pipeline) else None
        self.mllm = speaker.model.mllm if isinstance(speaker, Pipeline) else speaker
        self.system = system
        self.dialogue = Dialogue(self.mllm)
        self.reset()

    def reset(self) -> None:
        """Forget all but the instructions."""
        self.turns: list[Turn] = [Turn("system", self.system)] if self.system else []
        self.drawn: Pictures = ()  # what joins the user's next turn

    def say(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generator[str, None, None]:
        """Pieces of the answer; question and answer join the conversation once all of them were taken.

        Raises:
            ValueError: at once, for what cannot be read or is too long.
        """
        asked = [*self.turns, Turn("user", text, (*self.drawn, *images))]
        return self._answer(asked, self.dialogue.reply(asked, max_new_tokens, temperature, seed))

    def draw(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        *,
        seed: int = 0,
        drawing: Drawing = Drawing(),
        watch: Watch | None = None,
        think: bool = False,
        tell: Callable[[str], object] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
    ) -> Image.Image:
        """A picture from the whole conversation and `text`; it joins the user's next turn. `think`: a plan of
        up to `max_new_tokens` is written first, at that temperature and with the picture's seed; `tell` is given its pieces,
        and the picture follows it too.

        Raises:
            ValueError: nothing here draws, or something cannot be read, is too long or impossible.
        """
        if self.pipeline is None:
            raise ValueError("drawing needs a bridge; give a release instead of a bare MLLM")
        model = self.pipeline.model
        begun = self.turns or [Turn("system", DRAW_SYSTEM)]
        sources = (*self.drawn, *images)
        asked = [*begun, Turn("user", text, sources)]
        if think:
            thought = [*begun, Turn("user", f"{text}\n{THINK}", sources)]
            pieces = self.dialogue.reply(thought, max_new_tokens, temperature, seed)
            plan = "".join(_told(pieces, tell or (lambda piece: None)))
            asked = [*thought, Turn("assistant", plan), Turn("user", text)]
        with torch.no_grad():
            condition = model.condition(self.dialogue.read(asked, room=model.config.queries))
        picture = self.pipeline([Asked(text, sources, condition)], [seed], drawing, watch)[0]
        self.turns = [*asked, Turn("assistant", "")]
        self.drawn = (picture,) if self.mllm.builder.images is not None else ()
        return picture

    def _answer(self, asked: list[Turn], pieces: Iterator[str]) -> Generator[str, None, None]:
        said: list[str] = []
        for piece in pieces:
            said.append(piece)
            yield piece
        self.turns, self.drawn = [*asked, Turn("assistant", "".join(said))], ()


def _told(pieces: Iterator[str], tell: Callable[[str], object]) -> Iterator[str]:
    for piece in pieces:
        tell(piece)
        yield piece
