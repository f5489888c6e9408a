"""A colour font -> pictures of its emoji with their Unicode names: real drawings with real captions, in one system package.

Only fonts with colour bitmaps work, such as Debian's fonts-noto-color-emoji.
"""

import io
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.pack import Item
from data.records import BadSample

STRIKE_PIXELS = 109  # the one size of Noto Color Emoji's bitmaps; FreeType refuses others
FIRST_CODE_POINT = 0x80  # ASCII digits, # and * are in emoji fonts only as parts of keycaps


@dataclass(frozen=True)
class EmojiFont:
    """The single-code-point emoji of one font, drawn on white squares."""

    font: ImageFont.FreeTypeFont
    code_points: tuple[int, ...]
    size: int  # pixels a side

    def item(self, code_point: int) -> Item:
        """One emoji as PNG with its lower-case Unicode name; BadSample if it has no name or no picture."""
        character = chr(code_point)
        name = unicodedata.name(character, "").lower()
        if not name:
            raise BadSample("the code point has no Unicode name")
        drawn = io.BytesIO()
        self.draw(character).save(drawn, "PNG")
        described = {"character": character, "code_point": f"U+{code_point:04X}"}
        return Item(caption=name, image=drawn.getvalue(), described=described)

    def draw(self, character: str) -> Image.Image:
        """The character's glyph scaled to fit an RGB square and centred; BadSample if the glyph is empty."""
        left, top, right, bottom = (int(edge) for edge in self.font.getbbox(character))
        if right <= left or bottom <= top:
            raise BadSample("the glyph is empty")
        glyph = Image.new("RGB", (right - left, bottom - top), "white")
        ImageDraw.Draw(glyph).text((-left, -top), character, font=self.font, embedded_color=True)
        if glyph.getextrema() == ((255, 255),) * 3:
            raise BadSample("the glyph is empty")
        scale = self.size / max(glyph.size)
        fitted = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
        square = Image.new("RGB", (self.size, self.size), "white")
        corner = ((self.size - fitted[0]) // 2, (self.size - fitted[1]) // 2)
        square.paste(glyph.resize(fitted, Image.Resampling.BICUBIC), corner)
        return square


def open_emoji_font(path: Path, size: int = 128) -> EmojiFont:
    """The emoji of the font file at `path`, to be drawn `size` pixels a side. ValueError if it is no colour bitmap font."""
    try:
        mapped = code_points(path.read_bytes())
        font = ImageFont.truetype(path, STRIKE_PIXELS, layout_engine=ImageFont.Layout.BASIC)
    except FileNotFoundError as error:
        raise ValueError(f"--font {path} does not exist; install fonts-noto-color-emoji or name another font") from error
    except (OSError, struct.error) as error:
        raise ValueError(f"--font {path} cannot be used ({error}); give one like NotoColorEmoji.ttf") from error
    return EmojiFont(font, tuple(code for code in mapped if code >= FIRST_CODE_POINT), size)


def code_points(font: bytes) -> list[int]:
    """The code points that a font maps to glyphs, ascending. ValueError without a cmap of format 12.

    OpenType 1.9, "cmap": format 12 lists (first, last, first glyph) groups and is what fonts beyond 16 bits carry."""
    tables = struct.unpack_from(">H", font, 4)[0]
    records = [struct.unpack_from(">4sIII", font, 12 + 16 * number) for number in range(tables)]
    cmap = next((offset for tag, _, offset, _ in records if tag == b"cmap"), None)
    if cmap is not None:
        for number in range(struct.unpack_from(">H", font, cmap + 2)[0]):
            start = cmap + struct.unpack_from(">HHI", font, cmap + 4 + 8 * number)[2]
            if struct.unpack_from(">H", font, start)[0] == 12:
                return _format_12(font, start)
    raise ValueError("--font maps no code points beyond 16 bits; give a colour bitmap font like NotoColorEmoji.ttf")


def _format_12(font: bytes, start: int) -> list[int]:
    groups = struct.unpack_from(">I", font, start + 12)[0]
    codes: list[int] = []
    for number in range(groups):
        first, last, _ = struct.unpack_from(">III", font, start + 16 + 12 * number)
        codes += range(first, min(last, 0x10FFFF) + 1)
    return codes
