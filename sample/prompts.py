"""What the command line and its files ask for -> jobs: one file to draw each, with its name and its seeds.

Names count pictures and never come from prompts. Picture k of a run has seed `first + k`, or, where its line names a seed,
that seed plus its place in the line.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sample.settings import MAX_SEED


@dataclass(frozen=True)
class Line:
    """One object of a JSONL file of prompts; what is left out is as on the command line."""

    prompt: str = ""
    """What to draw; may stay empty where there are pictures, to draw them anew."""
    images: tuple[Path, ...] = ()
    """The pictures to start from, named from where the file lies: one to edit, several for a subject."""
    seed: int | None = None
    """Of the line's first picture; each further one is one higher."""
    n: int | None = None
    """Pictures for this line."""
    height: int | None = None
    width: int | None = None
    negative: str | None = None
    id: str = ""
    """Kept in the picture, for those who look for it later."""


@dataclass(frozen=True)
class Job:
    """A file to draw; of several seeds, as many pictures side by side in it."""

    name: str
    seeds: tuple[int, ...]
    line: Line


def jobs_of(lines: Sequence[Line], n: int, seed: int) -> list[Job]:
    """A file for every picture of every line.

    Raises:
        ValueError: nothing is asked for, or a number is out of range.
    """
    if not lines:
        raise ValueError("there is no prompt; give one in quotes, a file of them with --prompts, or pictures with --image")
    if n < 1:
        raise ValueError(f"--n {n} is too small; give at least 1")
    counts = [n if line.n is None else line.n for line in lines]
    if not 0 <= seed <= MAX_SEED - sum(counts):
        raise ValueError(f"--seed {seed} cannot be counted up from; give 0 to {MAX_SEED - sum(counts)}")
    jobs: list[Job] = []
    digits = max(5, len(str(sum(counts) - 1)))  # so that names sort as pictures are counted
    for line, count in zip(lines, counts, strict=True):
        first = seed + len(jobs) if line.seed is None else line.seed
        jobs += [Job(f"{len(jobs) + k:0{digits}d}.png", (first + k,), line) for k in range(count)]
    return jobs


def read_lines(path: Path) -> list[Line]:
    """The prompts of a file: of a .jsonl one object a line, of any other one prompt a line; empty lines are left out.

    Raises:
        ValueError: it is not UTF-8 text, holds no prompt, or a line is not as `Line` says.
    """
    numbered = lines_of(path)
    if not numbered:
        raise ValueError(f"prompts file {path} is empty; write one prompt per line")
    if path.suffix == ".jsonl":
        return [_parse(path, number, text) for number, text in numbered]
    return [Line(text.strip()) for _, text in numbered]


def lines_of(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that say something, with their numbers. A newline ends them, and none of the other characters
    that `str.splitlines` breaks at: those may stand in a prompt. Errors as `read_text`."""
    return [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def read_text(path: Path) -> str:
    """A text file, without the mark that some editors begin it with. Raises ValueError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {path} is not UTF-8 text; save it as such, one prompt per line") from error


def _parse(path: Path, number: int, text: str) -> Line:
    from model.files import parse_config

    where = Path(f"{path}, line {number}")
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON object ({error}); write one object a line") from error
    line = parse_config(Line, raw, where)
    if not (line.prompt or line.images):
        raise ValueError(f"{where} asks for nothing; give it a prompt or images")
    if line.n is not None and line.n < 1:
        raise ValueError(f"{where}: n {line.n} is too small; give at least 1")
    if line.seed is not None and not 0 <= line.seed <= MAX_SEED - (line.n or 1 << 32):
        raise ValueError(f"{where}: seed {line.seed} cannot be counted up from; give a smaller one, not below 0")
    for side in ("height", "width"):
        if (pixels := getattr(line, side)) is not None and pixels < 0:
            raise ValueError(f"{where}: {side} {pixels} is no size; give pixels")
    return replace(line, images=tuple(path.parent / image for image in line.images))
