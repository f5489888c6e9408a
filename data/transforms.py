"""Encoded bytes -> PIL image -> square RGB levels [3, H, W] in 0..255 -> tensor [3, H, W] in [-1, 1], and back."""

import io
import struct
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # Pillow knows others; some run programs
MAX_PIXELS = 64_000_000  # more than any camera of the data sets we know; a decompression bomb claims far more
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)  # on broken bytes
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


def decode_image(data: bytes) -> Image.Image:
    """A loaded image, first frame of an animation. ValueError with a fixed phrase for bytes that are none.

    The size is read from the header, before any pixel is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            image.load()
            return image
    except Image.DecompressionBombError:
        pass
    except PILLOW_ERRORS as error:
        raise ValueError("an image cannot be decoded") from error
    raise ValueError(f"an image has more than {MAX_PIXELS:,} pixels")


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


def resize_and_crop(image: Image.Image, size: int) -> torch.Tensor:
    """uint8 [3, size, size], RGB: the central square, in whole pixels, scaled (antialiased bicubic).

    By torch, which gives Pillow's levels within two and takes a third of its time."""
    levels = np.asarray(to_rgb(image))  # [H, W, 3]
    side = min(levels.shape[:2])
    top, left = ((length - side) // 2 for length in levels.shape[:2])
    square = torch.from_numpy(levels[top : top + side, left : left + side].copy()).permute(2, 0, 1)  # [3, side, side]
    return square if side == size else F.interpolate(square[None], (size, size), mode="bicubic", antialias=True)[0]


def to_tensor(picture: Image.Image | torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """RGB image, or its levels uint8 [3, H, W] -> float32 [3, H, W] in [-1, 1], into `out` where it is given."""
    if isinstance(picture, Image.Image):
        picture = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    out = torch.empty(picture.shape) if out is None else out
    return out.copy_(picture.contiguous()).div_(127.5).sub_(1)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] (clamped) -> RGB image; the inverse of `to_tensor`."""
    levels = (pixels.detach().float().cpu() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)  # [3, H, W]
    return Image.fromarray(levels.permute(1, 2, 0).numpy())
