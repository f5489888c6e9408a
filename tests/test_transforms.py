"""Images of every mode become upright RGB squares in [-1, 1]; broken files become one of a few sentences."""

import io
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from data.transforms import decode_image, resize_and_crop, to_pil, to_rgb, to_tensor


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(rows / 7 + phase) * np.cos(columns / 5) for phase in (0, 1, 2)]
    return Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))


def test_every_level_survives_the_way_to_a_tensor_and_back():
    levels = Image.fromarray(np.arange(256 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8))
    tensor = to_tensor(levels)
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert to_pil(tensor).tobytes() == levels.tobytes()


def test_to_pil_clamps():
    assert to_pil(torch.full((3, 1, 1), 7.0)).getpixel((0, 0)) == (255, 255, 255)


SIZES = [(96, 64, 32), (64, 96, 40), (30, 20, 64), (64, 64, 64), (65, 48, 48), (301, 200, 97), (90, 700, 256), (1, 50, 4)]


def central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_resize_and_crop_equals_torch_on_the_central_square(width, height, size):
    image = picture(width, height)
    square = to_tensor(central_square(image))[None]  # [1, 3, S, S]
    expected = F.interpolate(square, (size, size), mode="bicubic", antialias=True, align_corners=False)[0].clamp(-1, 1)
    ours = to_tensor(resize_and_crop(image, size))
    assert ours.shape == (3, size, size)
    assert (ours - expected).abs().max() * 127.5 <= 2  # levels


@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_a_jpeg_becomes_the_levels_that_plain_pillow_makes_of_it(width, height, size):
    random = np.random.default_rng(0)
    noisy = np.asarray(picture(width, height)) // 2 + random.integers(0, 128, (height, width, 3))
    jpeg = encoded(Image.fromarray(noisy.astype(np.uint8)), "JPEG", quality=90)
    plain = central_square(Image.open(io.BytesIO(jpeg))).resize((size, size), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(plain)).permute(2, 0, 1).int()
    ours = resize_and_crop(decode_image(jpeg), size)
    assert ours.dtype == torch.uint8
    off = (ours.int() - expected).abs()
    assert off.max() <= 2
    assert off.float().mean() < 0.05
    if size == min(width, height):
        assert off.max() == 0


def test_levels_become_unit_values():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    assert torch.equal(to_tensor(levels), levels.float() / 127.5 - 1)


def test_transparency_lies_over_white():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    for kind in ("PNG", "WEBP"):
        rgb = to_rgb(decode_image(encoded(clear, kind, lossless=True)))
        assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    rgb = to_rgb(decode_image(encoded(palette, "PNG", transparency=0)))
    assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied_as_pillow_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode_image(encoded(picture(8, 5), "PNG", exif=exif))
    expected = ImageOps.exif_transpose(turned)
    assert to_rgb(turned).size == expected.size == ((5, 8) if orientation in (5, 6, 7, 8) else (8, 5))
    assert to_rgb(turned).tobytes() == expected.tobytes()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_data_leaves_the_picture_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a maker's name"
    whole = encoded(picture(8, 5), "WEBP", exif=exif, lossless=True)
    start = max(whole.find(b"II*\0"), whole.find(b"MM\0*"))
    random = np.random.default_rng(0)
    for position in range(start, len(whole) - 1):
        broken = bytearray(whole)
        broken[position] = random.integers(256)
        with suppress(ValueError):  # the container itself may be damaged
            assert sorted(to_rgb(decode_image(bytes(broken))).size) == [5, 8]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (9, 7))
    assert (to_rgb(image).mode, resize_and_crop(image, 4).shape) == ("RGB", (3, 4, 4))


def test_sixteen_bit_grey_keeps_its_brightness():
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    rgb = to_rgb(decode_image(encoded(grey, "PNG")))
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (100, 100, 100), (255, 255, 255)]


def test_colours_survive_jpeg_cmyk():
    rgb = to_rgb(decode_image(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)))
    assert np.abs(np.array(rgb.getpixel((8, 8))) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_anywhere_is_refused(kind):
    whole = encoded(picture(40, 30), kind)
    assert decode_image(whole).size == (40, 30)
    end = len(whole) - {"PNG": 12, "JPEG": 2, "WEBP": 1}[kind]  # all pixels are there when only the end marker is missing
    for cut in range(0, end, 37):
        with pytest.raises(ValueError, match="an image cannot be decoded"):
            decode_image(whole[:cut])


def test_a_decompression_bomb_is_refused_from_its_header():
    bomb = encoded(Image.new("1", (14_000, 13_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="more than 64,000,000 pixels"):
        decode_image(bomb)
    with pytest.raises(ValueError, match="more than 64,000,000 pixels"):
        decode_image(encoded(Image.new("1", (9_000, 9_000)), "PNG"))
