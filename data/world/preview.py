"""Scenes or edits -> one picture of them with their words underneath."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.world.captions import describe
from data.world.edits import make_edit, mask
from data.world.render import render
from data.world.scene import make_scene, random_for

MARGIN, LINES, LINE = 8, 6, 13  # pixels, lines of text under a picture, pixels a line


def preview(seed: int, split: str, task: str, n: int, size: int, columns: int) -> Image.Image:
    """`n` scenes with captions, or edits as before, after and changed pixels with instructions, `size` pixels a picture."""
    cells = [_edit(seed, i, split, size) if task == "edit" else _scene(seed, i, split, size) for i in range(n)]
    width, height = cells[0][0].shape[1] + MARGIN, size + MARGIN + LINES * LINE
    rows = -(-n // columns)
    page = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), (255, 255, 255))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for number, (picture, words) in enumerate(cells):
        x, y = MARGIN + number % columns * width, MARGIN + number // columns * height
        page.paste(Image.fromarray(picture), (x, y))
        lines = textwrap.wrap(words, max(12, (width - MARGIN) // 5))[:LINES]
        draw.multiline_text((x, y + size + 2), "\n".join(lines), (30, 30, 30), font, spacing=2)
    return page


def _scene(seed: int, index: int, split: str, size: int) -> tuple[np.ndarray, str]:
    scene = make_scene(seed, index, split)
    return render(scene, size), describe(scene, random_for(seed, "caption", split, index)).text


def _edit(seed: int, index: int, split: str, size: int) -> tuple[np.ndarray, str]:
    edit = make_edit(seed, index, split)
    changed = np.repeat(mask(edit.before, edit.after, size)[..., None], 3, axis=2).astype(np.uint8) * 255
    gap = np.full((size, MARGIN // 2, 3), 255, np.uint8)
    strip = [render(edit.before, size), gap, render(edit.after, size), gap, changed]
    return np.concatenate(strip, 1), edit.instruction
