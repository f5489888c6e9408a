"""One conversation with a model that may also draw: what chat, page and server share.

Answers and drawings read the same key/value cache. A drawing is conditioned on the whole conversation; the assistant's turn
is then empty and the picture joins the user's next turn, so that talking about it and editing it need nothing else.
"""

from collections.abc import Iterator, Sequence

from PIL import Image

from model.dialogue import Dialogue
from model.frozen import FrozenMLLM
from model.prefix import DRAW_SYSTEM, Turn
from sample.pipeline import Asked, Pictures, Pipeline, Watch
from sample.settings import Drawing

THINKING_TOKENS = 256  # the longest plan
REASON = "First plan the picture in a few words: each thing in it, its colour and place, and the background."


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
    ) -> Iterator[str]:
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
    ) -> Image.Image:
        """A picture from the whole conversation and `text`; it joins the user's next turn. `think`: a plan is written first,
        and drawn from too.

        Raises:
            ValueError: nothing here draws, or something cannot be read, is too long or impossible.
        """
        if self.pipeline is None:
            raise ValueError("drawing needs a bridge; give a release instead of a bare MLLM")
        model = self.pipeline.model
        begun = self.turns or [Turn("system", DRAW_SYSTEM)]
        asked = [*begun, Turn("user", text, (*self.drawn, *images))]
        if think:
            plan = "".join(self.dialogue.reply(asked, THINKING_TOKENS))
            asked = [*asked, Turn("assistant", plan), Turn("user", text)]
        condition = model.condition(self.dialogue.read(asked, room=model.config.queries))
        sources = tuple(image for turn in asked[len(begun) :] for image in turn.images)
        picture = self.pipeline([Asked(text, sources, condition)], [seed], drawing, watch)[0]
        self.turns = [*asked, Turn("assistant", "")]
        self.drawn = (picture,) if self.mllm.builder.images is not None else ()
        return picture

    def _answer(self, asked: list[Turn], pieces: Iterator[str]) -> Iterator[str]:
        said: list[str] = []
        for piece in pieces:
            said.append(piece)
            yield piece
        self.turns, self.drawn = [*asked, Turn("assistant", "".join(said))], ()
