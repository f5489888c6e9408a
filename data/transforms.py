"""Encoded bytes -> PIL image -> RGB levels [3, H, W] in 0..255 of one shape -> tensor [3, H, W] in [-1, 1], and back."""

import io
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Shape = tuple[int, int]  # height and width in pixels
UNKNOWN: Shape = (0, 0)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow knows others; some run programs
MAX_PIXELS = 64_000_000  # more than any camera of the data sets we know; a decompression bomb claims far more
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)  # on broken bytes
UNREADABLE = "an image cannot be decoded"
ORIENTATION = 0x0112  # EXIF tag; its values 2 to 8 name how to undo a camera's turn
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ON_ITS_SIDE = (5, 6, 7, 8)  # orientations that change width and height over


class TooManyPixels(ValueError):
    """Of an image's header; no pixel was decoded."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A loaded image, first frame of an animation. ValueError with a fixed phrase for bytes that are none.

    The size is read from the header, before any pixel is decoded."""
    try:
        image = _opened(io.BytesIO(data), max_pixels)
        image.load()
    except TooManyPixels:
        raise
    except PILLOW_ERRORS as error:
        raise ValueError(UNREADABLE) from error
    return image


def format_of(path: Path) -> str:
    """What Pillow calls the format of an image file, by its header. ValueError as `decode_image`."""
    try:
        with path.open("rb") as file:
            return _opened(file, MAX_PIXELS).format or ""
    except TooManyPixels:
        raise
    except PILLOW_ERRORS as error:
        raise ValueError(UNREADABLE) from error


def upright_shape(data: bytes) -> Shape:
    """The shape of `to_rgb(decode_image(data))`, mostly from the header alone, of which `data` may be the beginning; UNKNOWN
    where it cannot be told."""
    try:
        image = _opened(io.BytesIO(data), MAX_PIXELS)
        told = image.format != "PNG" or "exif" in image.info  # else Pillow would decode the whole PNG, to look behind it
        on_its_side = told and image.getexif().get(ORIENTATION, 1) in ON_ITS_SIDE
    except PILLOW_ERRORS:
        return UNKNOWN
    return (image.width, image.height) if on_its_side else (image.height, image.width)


def _opened(file: BinaryIO, max_pixels: int) -> Image.Image:
    """An image of which only the header is read; `TooManyPixels`, or one of PILLOW_ERRORS."""
    too_many = TooManyPixels(f"an image has more than {max_pixels:,} pixels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked here
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise too_many from None
    if image.width * image.height > max_pixels:
        raise too_many
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: EXIF orientation applied, transparency laid over white, 16-bit grey scaled to 8."""
    image = _upright(image)
    if image.mode.startswith("I"):  # grey with 16 bits, whichever way Pillow holds it
        grey = np.clip(np.asarray(image).astype(np.float64) / 257, 0, 255)
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """ImageOps.exif_transpose writes the EXIF data anew and fails where it is damaged; the orientation is all we need."""
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except PILLOW_ERRORS:
        return image  # unreadable EXIF data around a readable picture
    return image if method is None else image.transpose(method)


def resize_and_crop(image: Image.Image, shape: int | Shape) -> torch.Tensor:
    """uint8 [3, H, W], RGB, of this height and width (one number: of both): the middle of the picture, as much as has that
    shape in whole pixels, scaled (antialiased bicubic).

    By torch, which gives Pillow's levels within two and takes a third of its time."""
    height, width = (shape, shape) if isinstance(shape, int) else shape
    levels = np.asarray(to_rgb(image))  # [rows, columns, 3]
    scale = min(levels.shape[0] / height, levels.shape[1] / width)  # pixels of the picture for one of the result
    kept = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = ((length - side) // 2 for length, side in zip(levels.shape, kept, strict=False))
    middle = torch.from_numpy(levels[top : top + kept[0], left : left + kept[1]].copy()).permute(2, 0, 1)  # [3, *kept]
    same = kept == (height, width)
    return middle if same else F.interpolate(middle[None], (height, width), mode="bicubic", antialias=True)[0]


def to_tensor(picture: Image.Image | torch.Tensor) -> torch.Tensor:
    """RGB image, or its levels uint8 [3, H, W] -> float32 [3, H, W] in [-1, 1]."""
    if isinstance(picture, Image.Image):
        picture = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    return unit(picture.contiguous())


def unit(levels: torch.Tensor) -> torch.Tensor:
    """Levels uint8 [..., 3, H, W] -> float32 in [-1, 1] where they are: four times as large. What is float stays."""
    return levels if levels.is_floating_point() else levels.float().div_(127.5).sub_(1)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] (clamped) -> RGB image; the inverse of `to_tensor`."""
    levels = (pixels.detach().float().cpu() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)  # [3, H, W]
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
