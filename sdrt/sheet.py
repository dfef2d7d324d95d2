"""A contact sheet: pictures in rows and columns with their captions, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GAP = 8
TEXT = 12
"""Height of the letters in pixels."""
INK, FAINT, EDGE, WRONG = (20, 20, 20), (110, 110, 110), (200, 200, 200), (200, 30, 30)


@dataclass(frozen=True)
class Cell:
    """A picture and what stands below it; ``wrong`` frames it in red. None leaves the place empty."""

    picture: Image.Image | None
    caption: str = ""
    wrong: bool = False


def contact_sheet(rows: Sequence[Sequence[Cell]], labels: Sequence[str] = (), *, side: int = 128) -> Image.Image:
    """An RGB picture of all cells; ``labels``: one a row, above it. Pictures are scaled to ``side`` pixels of width."""
    font = ImageFont.load_default(TEXT)
    columns = max(len(row) for row in rows)
    width = GAP + columns * (side + GAP)
    planned = []
    height = GAP
    for index, row in enumerate(rows):
        label = labels[index] if labels else ""
        texts = [_wrapped(cell.caption, font, side) for cell in row]
        tall = max((_height(cell, side) for cell in row), default=side)
        lines = max((len(text) for text in texts), default=0)
        planned.append((height, label, texts, tall))
        height += (TEXT + GAP if label else 0) + tall + lines * (TEXT + 3) + 2 * GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (top, label, texts, tall) in zip(rows, planned, strict=True):
        if label:
            pen.text((GAP, top), label, INK, font)
            top += TEXT + GAP  # noqa: PLW2901 - what follows lies below the label
        for column, (cell, text) in enumerate(zip(row, texts, strict=True)):
            left = GAP + column * (side + GAP)
            if cell.picture is not None:
                down = _height(cell, side)
                colour, edge = (WRONG, 3) if cell.wrong else (EDGE, 1)  # a white background ends somewhere too
                pen.rectangle((left - edge, top - edge, left + side + edge - 1, top + down + edge - 1), colour)
                sheet.paste(cell.picture.convert("RGB").resize((side, down)), (left, top))
            for n, line in enumerate(text):
                pen.text((left, top + tall + 4 + n * (TEXT + 3)), line, WRONG if cell.wrong else FAINT, font)
    return sheet


def _height(cell: Cell, side: int) -> int:
    return side if cell.picture is None else max(1, round(cell.picture.height * side / cell.picture.width))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines that are no wider than ``width``, but for a single word that is."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
