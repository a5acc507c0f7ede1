"""Sheets of pictures, each with its caption: what a person looks at to see what an image model has learnt."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.run import file_atomic

DRAWINGS = "drawings.png"  # in the evaluate stage's folder
_CELL = 96  # pixels: small pictures are enlarged to it, so that their pixels can be seen
_LINE = 12
_LINES = 2  # of a caption
_MARGIN = 4


def write_sheet(path: Path, rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str], columns: int = 8) -> None:
    """A PNG of groups of pictures, [height, width, 3] uint8, one above the other, the n-th of each under caption n.

    `rows` are sequences of as many pictures as there are captions: drawings, say, and the nearest pictures of the
    training set.
    """
    count, high = len(captions), len(rows)
    columns = min(columns, count)
    group = high * (_CELL + _MARGIN) + _LINES * _LINE + 2 * _MARGIN
    size = (columns * (_CELL + _MARGIN) + _MARGIN, -(-count // columns) * group + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, caption in enumerate(captions):
        left, top = _MARGIN + i % columns * (_CELL + _MARGIN), _MARGIN + i // columns * group
        for line, text in enumerate(_wrapped(caption, draw, font)):
            draw.text((left, top + line * _LINE), text, fill="black", font=font)
        for n, row in enumerate(rows):
            sheet.paste(_fitted(row[i]), (left, top + _LINES * _LINE + _MARGIN + n * (_CELL + _MARGIN)))
    with file_atomic(path) as temporary:
        sheet.save(temporary, "PNG")


def _fitted(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    enlarged = max(image.size) < _CELL
    factor = _CELL / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """At most _LINES lines that fit over a picture; what is left over is told by an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or draw.textlength(longer, font) <= _CELL:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1]} …"]
    return [_cut(line, draw, font) for line in lines]


def _cut(line: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    while draw.textlength(line, font) > _CELL:
        line = line.rstrip("…").rstrip()[:-1] + "…"
    return line
