"""A user's image, a file or bytes -> an upright RGB picture, or one sentence about what is wrong; a picture -> PNG."""

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.transforms import MAX_PIXELS, decode_image, format_of, to_rgb

FORMATS = ("PNG", "JPEG", "MPO", "WEBP")  # MPO: a camera's JPEG with a small one beside it
REMEDY = "give a whole PNG, JPEG or WebP file"


def open_picture(path: Path) -> Image.Image:
    """Reads a PNG, JPEG or WebP, any mode; transparency is laid over white.

    Raises:
        ValueError: the file is missing, damaged, too large, or of another type.
    """
    if not path.is_file():
        raise ValueError(f"image {path} is not a file; {REMEDY}")
    return read_picture(path.read_bytes(), f"image {path}")


def check_picture(path: Path) -> None:
    """Raises ValueError for what the name and the header of a file show to be wrong; no pixel is decoded."""
    if not path.is_file():
        raise ValueError(f"image {path} is not a file; {REMEDY}")
    try:
        kind = format_of(path)
    except ValueError as error:
        raise ValueError(f"image {path}: {error}; {REMEDY}") from error
    if kind not in FORMATS:
        raise ValueError(f"image {path} is of type {kind}; {REMEDY}")


def read_picture(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The same of bytes; errors call it `name`, and are `TooManyPixels` before any is decoded."""
    try:
        picture = decode_image(data, max_pixels)
    except ValueError as error:
        raise type(error)(f"{name}: {error}; {REMEDY}") from error
    if picture.format not in FORMATS:
        raise ValueError(f"{name} is of type {picture.format}; {REMEDY}")
    return to_rgb(picture)


def png(picture: Image.Image, about: Mapping[str, object]) -> bytes:
    """A PNG file with `about` as its text chunks."""
    info, file = PngInfo(), io.BytesIO()
    for key, value in about.items():
        info.add_text(key, str(value))
    picture.save(file, format="PNG", pnginfo=info)
    return file.getvalue()
