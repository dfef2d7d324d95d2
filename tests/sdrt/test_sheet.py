"""The contact sheet."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from PIL import Image, ImageFont

from sdrt import sheet
from sdrt.sheet import Cell, contact_sheet


def test_a_sheet_holds_every_picture_where_it_belongs() -> None:
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta"]
    cells = [
        Cell(Image.new("RGB", (32, 32), colour), f"a caption of {colour} words that is long") for colour in colours
    ]
    sheet = contact_sheet([cells[:3], [*cells[3:5], Cell(None)]], ["first row", "second row"], side=64)
    shown = np.asarray(sheet)
    centres = {}
    for colour in colours[:5]:
        rgb = np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))
        found = np.argwhere((shown == rgb).all(axis=2))
        assert len(found) >= 64 * 64, colour
        centres[colour] = found.mean(axis=0)
    assert centres["red"][0] == centres["lime"][0] < centres["yellow"][0]
    assert centres["red"][1] < centres["lime"][1] < centres["blue"][1]
    assert abs(centres["red"][1] - centres["yellow"][1]) < 1
    assert not (shown == (255, 0, 255)).all(axis=2).any()


def test_a_wrong_picture_has_a_frame() -> None:
    def framed(wrong: bool) -> int:
        cell = Cell(Image.new("RGB", (32, 32), "blue"), "", wrong)
        return int((np.asarray(contact_sheet([[cell]], side=64)) == (200, 30, 30)).all(axis=2).sum())

    assert framed(True) > 4 * 64
    assert framed(False) == 0


def test_lines_are_as_wide_as_they_may() -> None:
    font = ImageFont.load_default(11)
    text = "a small yellow triangle to the left of a large purple heart on a gray background incomprehensibilities"
    lines = sheet._wrapped(text, font, 90)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 90 or " " not in line for line in lines)
    assert all(font.getlength(f"{a} {b.split()[0]}") > 90 for a, b in pairwise(lines))
