"""Conversation -> the frozen MLLM's answers, streamed: one question from the command line, or a dialogue.

With a release the dialogue also draws: `/draw a red circle` shows what the bridge makes of it, and the picture joins the
conversation, so that the next question can be about it.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from tyro.conf import UseAppendAction

from sample.cli import run, sentence

if TYPE_CHECKING:
    from PIL import Image

    from model.frozen import FrozenMLLM
    from model.prefix import Turn
    from sample.pipeline import Pipeline

HELP = """/image PATH   add a picture to the next question
/draw PROMPT  draw a picture (needs --release); it joins the conversation
/reset        forget the conversation
/help         this list
/quit         leave (also Ctrl-D)"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Ask the MLLM about pictures and text; without a question, talk to it."""

    question: tyro.conf.Positional[str | None] = None
    """The question; without it a dialogue starts."""
    release: Path | None = None
    """A release folder: its MLLM answers, its bridge draws."""
    model: str | None = None
    """Instead of a release: the folder or hub id of a bare MLLM."""
    image: UseAppendAction[tuple[Path, ...]] = ()
    """A picture that the (first) question is about; may be given several times."""
    system: str | None = None
    """Instructions for the whole conversation."""
    max_new_tokens: int = 256
    """The longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher is freer."""
    seed: int = 0
    """For temperatures above 0, and for /draw."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of a bare MLLM; a release brings its own."""
    out: Path = Path("pictures")
    """Where /draw puts pictures."""


def main(argv: list[str] | None = None) -> None:
    """Answers one question or holds a dialogue."""
    args = tyro.cli(Args, args=argv)
    if (args.release is None) == (args.model is None):
        raise ValueError("give either --release or --model, whose MLLM is to answer")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} is too small; give at least 1")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature} is impossible; give 0 (the likeliest token) or a bit more")
    # heavy imports wait until the arguments are right, so that --help stays instant
    from sample.pictures import open_picture

    pictures = [open_picture(path) for path in args.image]
    chat = Chat(args, pictures=pictures)
    if args.question is None:
        chat.talk()
    else:
        chat.say(args.question)


@dataclass
class Chat:
    """A conversation and the models that take part in it."""

    args: Args
    pictures: list["Image.Image"] = field(default_factory=list)  # go with the next question
    turns: list["Turn"] = field(default_factory=list)
    drawn: int = 0

    def __post_init__(self) -> None:
        self.pipeline, self.mllm = load_models(self.args)
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system's instructions."""
        from model.prefix import Turn

        self.turns = [Turn("system", self.args.system)] if self.args.system else []

    def say(self, question: str) -> None:
        """Asks and prints the answer as it comes; both join the conversation once the answer is whole."""
        pieces = []
        for piece in self.answer(question):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        self._remember(question, "".join(pieces))

    def answer(self, question: str) -> Iterator[str]:
        """Pieces of the answer to the conversation so far and this question."""
        from model.prefix import Turn

        asked = [*self.turns, Turn("user", question, tuple(self.pictures))]
        prefix = self.mllm.builder([asked]).to(self.mllm.device)
        length = prefix.ids.shape[1]
        if length + self.args.max_new_tokens > self.mllm.context:
            raise ValueError(
                f"the conversation has {length} tokens, the answer may have {self.args.max_new_tokens} "
                f"and the model reads {self.mllm.context}; shorten the question, or /reset the conversation"
            )
        return self.mllm.reply(prefix, self.args.max_new_tokens, self.args.temperature, self.args.seed)

    def talk(self) -> None:
        """Reads lines until /quit or the end of input; what a line gets wrong is said, and the dialogue goes on."""
        if sys.stdin.isatty():
            print(HELP)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            try:
                self.obey(line)
            except (ValueError, OSError) as error:
                print(f"error: {sentence(error)}", file=sys.stderr)
            except KeyboardInterrupt:
                print("\n(stopped; /quit leaves)")

    def obey(self, line: str) -> None:
        """One line of a dialogue: a command or a question."""
        from sample.pictures import open_picture

        command, _, rest = line.partition(" ")
        if not line:
            return
        if command == "/image":
            self.pictures.append(open_picture(Path(rest.strip().strip("\"'")).expanduser()))
        elif command == "/draw":
            self.draw(rest.strip())
        elif command == "/reset":
            self.reset()
            self.pictures.clear()
        elif command == "/help":
            print(HELP)
        elif command.startswith("/"):
            raise ValueError(f"{command} is no command; /help lists them")
        else:
            self.say(line)

    def draw(self, prompt: str) -> None:
        """Draws, writes the picture, and lets the next question be about it."""
        from sample.generate import save

        if self.pipeline is None:
            raise ValueError("/draw needs a bridge; start with --release instead of --model")
        seed = self.args.seed + self.drawn
        picture = self.pipeline([prompt], [seed])[0]
        path = next(p for n in count(self.drawn) if not (p := self.args.out / f"drawn-{n:03d}.png").exists())
        save(path, picture, {"prompt": prompt, "seed": seed, "release": self.pipeline.fingerprint})
        self.drawn += 1
        self.pictures.append(picture)
        print(path)

    def _remember(self, question: str, answer: str) -> None:
        from model.prefix import Turn

        self.turns += [Turn("user", question, tuple(self.pictures)), Turn("assistant", answer)]
        self.pictures.clear()


def load_models(args: Args) -> tuple["Pipeline | None", "FrozenMLLM"]:
    """A release's pipeline and its MLLM, or no pipeline and a bare MLLM."""
    if args.release is not None:
        from sample.pipeline import Pipeline

        pipeline = Pipeline.from_release(args.release)
        return pipeline, pipeline.model.mllm
    from model import mllm
    from sample.pipeline import default_device

    assert args.model is not None
    return None, mllm.load(mllm.MLLMConfig(args.model, dtype=args.dtype)).to(default_device())


if __name__ == "__main__":
    sys.exit(run(main))
