"""Pictures and their captions -> one labelled picture.

`sheet` sets each caption under its picture, `table` sets one caption beside a row of pictures under headings (before and
after, or one column per seed). A judged picture carries a frame and a mark: a green tick or a red cross.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (30, 30, 30), (255, 255, 255)
RIGHT, WRONG = (0, 140, 90), (205, 60, 40)
MARGIN, LETTERS = 8, 13  # pixels; height of the letters


@dataclass(frozen=True)
class Cell:
    """A picture of any size and, once judged, whether it is right."""

    picture: Image.Image
    right: bool | None = None


@dataclass(frozen=True)
class Row:
    """One caption and the pictures that answer it, one for each heading."""

    caption: str
    cells: tuple[Cell, ...]


def sheet(rows: Sequence[Row], columns: int = 6, cell_pixels: int = 128) -> Image.Image:
    """All cells in reading order, `columns` to a line, each row's caption under each of its pictures.

    Raises:
        ValueError: there is nothing to show.
    """
    cells = [(row.caption, cell) for row in rows for cell in row.cells]
    if not cells:
        raise ValueError("grid: there is no picture to show")
    columns = min(columns, len(cells))
    captions = [_wrap(caption, cell_pixels) for caption, _ in cells]
    lines = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    heights = [max(_height(captions[i]) for i in line) + cell_pixels + 2 * MARGIN for line in lines]
    canvas = Image.new("RGB", (columns * (cell_pixels + MARGIN) + MARGIN, sum(heights) + MARGIN), PAPER)
    top = MARGIN
    for line, height in zip(lines, heights, strict=True):
        for column, i in enumerate(line):
            left = MARGIN + column * (cell_pixels + MARGIN)
            _place(canvas, cells[i][1], left, top, cell_pixels)
            _write(canvas, captions[i], left, top + cell_pixels + MARGIN // 2)
        top += height
    return canvas


def table(headings: Sequence[str], rows: Sequence[Row], cell_pixels: int = 128, caption_pixels: int = 190) -> Image.Image:
    """One line per row: its caption at the left, then a picture under each heading.

    Raises:
        ValueError: there is no row, or a row has not one picture for each heading.
    """
    if not rows:
        raise ValueError("grid: there is no row to show")
    for row in rows:
        if len(row.cells) != len(headings):
            raise ValueError(f"grid: row {row.caption!r} has {len(row.cells)} pictures for {len(headings)} headings")
    captions = [_wrap(row.caption, caption_pixels) for row in rows]
    titles = [_wrap(heading, cell_pixels) for heading in headings]
    head = max(map(_height, titles)) + MARGIN
    heights = [max(cell_pixels, _height(caption)) + MARGIN for caption in captions]
    pitch, first = cell_pixels + MARGIN, 2 * MARGIN + caption_pixels
    canvas = Image.new("RGB", (first + pitch * len(headings), MARGIN + head + sum(heights)), PAPER)
    for column, title in enumerate(titles):
        _write(canvas, title, first + column * pitch, MARGIN)
    top = MARGIN + head
    for row, caption, height in zip(rows, captions, heights, strict=True):
        _write(canvas, caption, MARGIN, top + max(0, (cell_pixels - _height(caption)) // 2))
        for column, cell in enumerate(row.cells):
            _place(canvas, cell, first + column * pitch, top, cell_pixels)
        top += height
    return canvas


def tiles(pictures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Pictures of one size edge to edge, in reading order; one alone stays as it is."""
    if len(pictures) == 1:
        return pictures[0]
    width, height = pictures[0].size
    canvas = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), PAPER)
    for place, picture in enumerate(pictures):
        canvas.paste(picture, (place % columns * width, place // columns * height))
    return canvas


def _place(canvas: Image.Image, cell: Cell, left: int, top: int, side: int) -> None:
    """The picture, as large as fits into a square, in its middle; over it the frame and mark of its verdict."""
    scale = side / max(cell.picture.size)
    width, height = (max(1, round(length * scale)) for length in cell.picture.size)
    picture = cell.picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(picture, (left + (side - width) // 2, top + (side - height) // 2))
    if cell.right is None:
        return
    draw, colour = ImageDraw.Draw(canvas), RIGHT if cell.right else WRONG
    draw.rectangle((left - 2, top - 2, left + side + 1, top + side + 1), outline=colour, width=3)
    x, y = left + side - 12, top + side - 12  # the mark: 12 pixels in the corner
    draw.rectangle((x, y, x + 11, y + 11), fill=PAPER, outline=colour)
    if cell.right:
        draw.line(((x + 3, y + 6), (x + 5, y + 8), (x + 9, y + 3)), fill=colour, width=2)
    else:
        draw.line((x + 3, y + 3, x + 8, y + 8), fill=colour, width=2)
        draw.line((x + 3, y + 8, x + 8, y + 3), fill=colour, width=2)


def _wrap(text: str, width: int) -> list[str]:
    """Breaks a caption at spaces (long words anywhere) into lines of at most `width` pixels."""
    font, lines = _font(), [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += " " + word
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _write(canvas: Image.Image, lines: list[str], left: int, top: int) -> None:
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((left, top + number * (LETTERS + 4)), line, fill=INK, font=_font())


def _height(lines: list[str]) -> int:
    return len(lines) * (LETTERS + 4)


def _font():
    return ImageFont.load_default(LETTERS)
