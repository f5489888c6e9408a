"""An image file of the user's -> an upright RGB picture, or one sentence about what is wrong with it."""

from pathlib import Path

from PIL import Image

from data.transforms import decode_image, to_rgb

FORMATS = ("PNG", "JPEG", "WEBP")


def open_picture(path: Path) -> Image.Image:
    """Reads a PNG, JPEG or WebP, any mode; transparency is laid over white.

    Raises:
        ValueError: the file is missing, damaged, too large, or of another type.
    """
    remedy = "give a whole PNG, JPEG or WebP file"
    if not path.is_file():
        raise ValueError(f"image {path} is not a file; {remedy}")
    try:
        picture = decode_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"image {path}: {error}; {remedy}") from error
    if picture.format not in FORMATS:
        raise ValueError(f"image {path} is of type {picture.format}; {remedy}")
    return to_rgb(picture)
