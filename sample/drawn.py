"""Pictures in a folder, each a PNG that says what made it: whole or absent, drawn once, by one of many processes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from sample.settings import Drawing

T = TypeVar("T")


def share(items: Sequence[T], shard: str = "0/1") -> Sequence[T]:
    """What this process draws: part i of n, counted from 0, and of that what falls to its rank under torchrun. Neighbours go
    to different processes.

    Raises:
        ValueError: the shard is not of the form i/n, or the environment's rank is impossible.
    """
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {shard} is not of the form i/n; give 0/8 to 7/8 for eight processes")
    rank, world = ranks()
    return items[int(index) :: int(count)][rank::world]


def ranks() -> tuple[int, int]:
    """This process's rank and their number, as torchrun tells them. Raises ValueError when they cannot be."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world:
        raise ValueError(f"environment: RANK is {rank} and WORLD_SIZE {world}; launch with torchrun, or unset RANK")
    return rank, world


def about(prompt: str, seed: object, drawing: Drawing, release: str, **more: object) -> dict[str, object]:
    """What a picture's file says of itself: what decides it, and `more` that is not empty."""
    told = {name: value for name, value in more.items() if value}
    return {"prompt": prompt, "seed": seed, **told, "release": release, **drawing.told(), "software": "querybridge"}


def save(path: Path, picture: Image.Image, about: Mapping[str, object]) -> None:
    """A PNG with `about` as its text chunks, whole or absent."""
    from model.files import write_whole
    from sample.pictures import png

    data = png(picture, about)
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def is_there(path: Path, about: Mapping[str, object]) -> bool:
    """Whether `save` has written the picture with the same `about`.

    Raises:
        ValueError: what is there is another picture, or none.
    """
    if not path.exists():
        return False
    told, asked = read_about(path), {key: str(value) for key, value in about.items()}
    for key in (*asked, *told):
        if told.get(key) != asked.get(key):
            has, wants = (repr(each[key]) if key in each else "nothing" for each in (told, asked))
            raise ValueError(
                f"--out: {path} was drawn with other settings; remove it, or name another folder "
                f"({key}: it has {has}, asked for is {wants})"
            )
    return True


def read_about(path: Path) -> dict[str, str]:
    """What `save` wrote beside the pixels, which are not read. Raises ValueError for a file that is no picture."""
    try:
        with Image.open(path) as picture:
            return {str(key): value for key, value in picture.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no picture; remove it") from error
