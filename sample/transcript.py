"""A session -> a JSON file with its pictures as PNG files beside it, and back.

Pictures are named by what they show, so that a file that is saved again never points to a picture that is not there yet.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from model.files import dump_config, parse_config, read_json, write_json, write_whole
from model.prefix import DRAW_SYSTEM, Turn
from sample.pictures import open_picture, png
from sample.session import Session


@dataclass(frozen=True)
class SavedTurn:
    """A turn; images by the names of their files."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Saved:
    """A conversation as its file has it."""

    turns: tuple[SavedTurn, ...]
    joining: tuple[str, ...] = ()
    """Pictures of the user's next turn."""


def save(path: Path, session: Session, joining: Sequence[Image.Image] = ()) -> None:
    """Write the conversation, and the pictures that join it with the next turn; whole or, of the JSON, not at all."""
    turns = tuple(
        SavedTurn(turn.role, turn.text, tuple(_write(path, image) for image in turn.images)) for turn in session.turns
    )
    saved = Saved(turns, tuple(_write(path, image) for image in joining))
    write_whole(path, lambda temporary: write_json(temporary, dump_config(saved)))


def resume(path: Path, session: Session) -> list[Image.Image]:
    """Go on from a file; returns the pictures that join the next turn.

    Raises:
        ValueError: it is no conversation, or a picture is missing.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give one that /save wrote")
    saved = parse_config(Saved, read_json(path), path)
    first = saved.turns[0] if saved.turns else None
    session.system = first.text if first and first.role == "system" and first.text != DRAW_SYSTEM else None
    session.turns = [Turn(said.role, said.text, tuple(_read(path, name) for name in said.images)) for said in saved.turns]
    return [_read(path, name) for name in saved.joining]


def _write(path: Path, image: Image.Image) -> str:
    """The picture's name, beside `path`."""
    encoded = png(image, {})
    name = f"{path.stem}-{hashlib.sha256(encoded).hexdigest()[:12]}.png"
    if not (path.parent / name).exists():
        write_whole(path.parent / name, lambda temporary: temporary.write_bytes(encoded))
    return name


def _read(path: Path, name: str) -> Image.Image:
    if Path(name).name != name:
        raise ValueError(f"{path}: the picture {name!r} does not lie beside it; give its name alone")
    return open_picture(path.parent / name)
