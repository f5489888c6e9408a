"""Conversation -> the frozen MLLM's answers, streamed, and pictures: one question from the command line, or a dialogue.

With a release the dialogue also draws: `/draw a red circle` draws from all that was said, and the picture joins the
conversation, so that the next question can be about it and `/edit make it blue` changes it. A script writes the same lines
to --once, or pipes as many as it likes, and reads --json, one line for each answer and picture, and of what was piped
{"error": ...} for each line that came to nothing (exit code 2 at the end):

    python -m sample.chat --release RELEASE --once --json --image cat.png "what is this?"
    {"answer": "a cat", "picture": null, "seed": 0, "tokens": 95, "seconds_to_first_token": 0.21, "seconds": 0.35}
"""

import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from os.path import expanduser  # unlike that of pathlib, it leaves users alone who are not there
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, UseAppendAction

from sample.cli import run, sentence
from sample.settings import MAX_SEED, Drawing

if TYPE_CHECKING:
    from PIL import Image

    from model.frozen import FrozenMLLM
    from sample.pipeline import Pipeline, Progress

HELP = """/image PATH...     add pictures to the next question
/draw PROMPT       draw a picture from all that was said (needs --release); it joins the conversation
/edit INSTRUCTION  change the last picture
/save FILE         write the conversation as JSON, its pictures beside it; --resume FILE goes on from there
/reset             forget the conversation
/help              this list
/quit              leave (also Ctrl-D); Ctrl-C stops an answer"""
MOST_SEED = MAX_SEED // 2  # so that pictures can be counted up from it


@dataclass(frozen=True, kw_only=True)
class Args:
    """Ask the MLLM about pictures and text; without a question, talk to it."""

    question: tyro.conf.Positional[str | None] = None
    """The question, or a command of a dialogue, like "/draw a red circle"; without it a dialogue starts."""
    release: Path | None = None
    """A release folder: its MLLM answers, its bridge draws."""
    model: str | None = None
    """Instead of a release: the folder or hub id of a bare MLLM."""
    image: UseAppendAction[tuple[Path, ...]] = ()
    """A picture that the (first) question is about; may be given several times."""
    system: str | None = None
    """Instructions for the whole conversation."""
    resume: Path | None = None
    """Go on with a conversation that /save wrote."""
    once: bool = False
    """For scripts: answer one line, the question or all of standard input, and leave."""
    json: bool = False
    """Print one line of JSON for each answer and picture."""
    think: bool = False
    """Before it draws, the MLLM writes a plan; the picture follows prompt and plan."""
    max_new_tokens: int = 256
    """The longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher is freer."""
    seed: int = 0
    """For temperatures above 0, and for the first picture; each further one is one higher."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of a bare MLLM; a release brings its own."""
    out: Path = Path("pictures")
    """Where pictures go."""
    drawing: Annotated[Drawing, OmitArgPrefixes] = Drawing()


@dataclass
class Told:
    """What one question or command came to, as --json has it."""

    answer: str | None = None
    picture: str | None = None
    seed: int = 0
    tokens: int = 0
    """That went through the MLLM: read anew, and said."""
    seconds_to_first_token: float | None = None
    seconds: float = 0.0


def main(argv: list[str] | None = None) -> None:
    """Answers one question or holds a dialogue."""
    args = tyro.cli(Args, args=argv)
    check(args)
    # heavy imports wait until the arguments are right, so that --help stays instant
    from sample.pictures import open_picture

    pictures = [open_picture(path) for path in args.image]
    line = sys.stdin.read() if args.question is None and args.once else args.question
    if line is not None and not (line := line.strip()):
        raise ValueError("there is no question; give one in quotes, or on standard input with --once")
    chat = Chat(args, pictures)
    if line is None:
        chat.talk()
    else:
        chat.obey(line)


def check(args: Args) -> None:
    """ValueError for what no model need be loaded to refuse."""
    if (args.release is None) == (args.model is None):
        raise ValueError("give either --release or --model, whose MLLM is to answer")
    if args.resume is not None and args.system is not None:
        raise ValueError("--resume brings the conversation's instructions along; leave out --system")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} is too small; give at least 1")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature} is impossible; give 0 (the likeliest token) or a bit more")
    if not 0 <= args.seed <= MOST_SEED:
        raise ValueError(f"--seed {args.seed} cannot be counted up from; give 0 to {MOST_SEED}")


@dataclass
class Chat:
    """A session at the command line."""

    args: Args
    pictures: list["Image.Image"] = field(default_factory=list)  # go with the next question
    drawn: int = 0

    def __post_init__(self) -> None:
        from sample.session import Session
        from sample.transcript import resume

        self.session = Session(load_speaker(self.args), self.args.system)
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.show,
            "/draw": self.draw,
            "/edit": self.edit,
            "/save": self.save,
            "/reset": self.reset,
            "/help": lambda rest: print(HELP, file=sys.stderr if self.args.json else sys.stdout),
        }
        if self.args.resume is not None:
            self.pictures = [*resume(self.args.resume, self.session), *self.pictures]

    def talk(self) -> None:
        """Reads lines until /quit or the end of input; what a line gets wrong is said, and the dialogue goes on.
        ValueError at the end where a script's lines were wrong."""
        wrong, person = 0, sys.stdin.isatty()
        if person:
            import readline  # noqa: F401  # lends `input` its history and arrow keys

            print(HELP)
        while True:
            try:
                line = input("> " if person else "").strip()
                if line == "/quit":
                    break
                self.obey(line)
            except EOFError:
                break
            except (ValueError, OSError) as error:
                wrong += 1
                print(f"error: {sentence(error)}", file=sys.stderr)
                if self.args.json:
                    print(json.dumps({"error": sentence(error)}), flush=True)
            except KeyboardInterrupt:
                print("\n(stopped; /quit leaves)", file=sys.stderr)
        if wrong and not person:
            raise ValueError(f"{wrong} of these lines came to nothing, as said above; mend them, or leave them out")

    def obey(self, line: str) -> None:
        """One line of a dialogue: a command or a question."""
        command, _, rest = line.partition(" ")
        if command in self.commands:
            self.commands[command](rest.strip())
        elif command.startswith("/"):
            raise ValueError(f"{command} is no command; /help lists them")
        elif line:
            self.say(line)

    def say(self, question: str) -> None:
        """Asks and prints the answer as it comes; both join the conversation once the answer is whole."""
        told, clock = Told(seed=self.args.seed), Clock(self.session.dialogue.tokens_read)
        args, pieces = self.args, list[str]()
        answer = self.session.say(
            question, self.pictures, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed
        )
        with closing(answer):
            for piece in answer:
                told.seconds_to_first_token = told.seconds_to_first_token or clock.seconds
                pieces.append(piece)
                if not args.json:
                    print(piece, end="", flush=True)
        self.pictures = []
        told.answer = "".join(pieces)
        self.tell(told, clock, "")

    def draw(self, prompt: str) -> None:
        """Draws, writes the picture, and lets the next question be about it."""
        if not prompt:
            raise ValueError("/draw: there is no prompt; say what to draw, as in /draw a red circle")
        self._draw(prompt, self.pictures)

    def edit(self, instruction: str) -> None:
        """Draws from the last picture, which joins the turn where the conversation has it further back."""
        if not instruction:
            raise ValueError("/edit: there is no instruction; say what to change, as in /edit make it blue")
        earlier = [image for turn in self.session.turns for image in turn.images]
        if not (self.session.drawn or self.pictures or earlier):
            raise ValueError("/edit: there is no picture to change; /draw one, or add one with /image")
        self._draw(instruction, self.pictures if self.session.drawn or self.pictures else earlier[-1:])

    def show(self, rest: str) -> None:
        """Adds the pictures that a line names to the next question."""
        from sample.pictures import open_picture

        names = [rest] if Path(rest).is_file() else shlex.split(rest)
        if not names:
            raise ValueError("/image: there is no path; name a picture, as in /image cat.png")
        self.pictures += [open_picture(Path(expanduser(name))) for name in names]

    def save(self, rest: str) -> None:
        """Writes the conversation."""
        from sample.transcript import save

        if not rest:
            raise ValueError("/save: there is no file; name one, as in /save talk.json")
        path = Path(expanduser(rest.strip("\"'")))
        save(path, self.session, [*self.session.drawn, *self.pictures])
        print(path, file=sys.stderr if self.args.json else sys.stdout)

    def reset(self, rest: str) -> None:
        """Forgets all but the system's instructions."""
        self.session.reset()
        self.pictures = []

    def _draw(self, prompt: str, pictures: list["Image.Image"]) -> None:
        from sample.drawn import about, save

        session, args = self.session, self.args
        told, clock = Told(seed=args.seed + self.drawn), Clock(session.dialogue.tokens_read)
        plan: list[str] = []

        def tell(piece: str) -> None:
            told.seconds_to_first_token = told.seconds_to_first_token or clock.seconds
            plan.append(piece)
            if not args.json:
                print(piece, end="", flush=True)

        with Bar() as bar:
            picture = session.draw(
                prompt,
                pictures,
                seed=told.seed,
                drawing=args.drawing,
                watch=bar.watch,
                think=args.think,
                tell=tell,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
            )
        if args.think:
            told.answer = "".join(plan)
        assert session.pipeline is not None
        release = session.pipeline.fingerprint
        path = next(p for n in count(self.drawn) if not (p := args.out / f"drawn-{n:03d}.png").exists())
        save(path, picture, about(prompt, told.seed, args.drawing, release, plan=told.answer))
        self.drawn += 1
        self.pictures = []
        told.picture = str(path)
        self.tell(told, clock, f"\n{path}" if plan else str(path))

    def tell(self, told: Told, clock: "Clock", text: str) -> None:
        """Ends a line of output, or prints all of it as JSON."""
        told.tokens = self.session.dialogue.tokens_read - clock.tokens
        told.seconds = clock.seconds
        print(json.dumps(vars(told)) if self.args.json else text, flush=True)


class Clock:
    """Since when, and how many tokens there were then."""

    def __init__(self, tokens: int):
        self.tokens, self.began = tokens, time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self.began, 4)


class Bar:
    """Shows how far a drawing is, where a terminal looks on; from its first step, because a plan is written before that."""

    def __enter__(self) -> "Bar":
        from rich.console import Console

        self.status = Console(stderr=True).status("drawing")
        return self

    def watch(self, progress: "Progress") -> None:
        if self.status.console.is_terminal:
            self.status.update(f"drawing, {1 - float(progress.time):.0%}")
            self.status.start()  # does nothing where it has begun

    def __exit__(self, *_: object) -> None:
        self.status.stop()


def load_speaker(args: Args) -> "Pipeline | FrozenMLLM":
    """A release's pipeline, or a bare MLLM."""
    from sample.pipeline import Pipeline, default_device

    if args.release is not None:
        return Pipeline.from_release(args.release)
    from model import mllm

    assert args.model is not None
    return mllm.load(mllm.MLLMConfig(args.model, dtype=args.dtype)).to(default_device())


if __name__ == "__main__":
    sys.exit(run(main))
