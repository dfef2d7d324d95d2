"""Pictures of scenes: flat shapes on a flat background, with smooth edges, in places and shades that vary a little."""

from __future__ import annotations

import math
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.demo.scenes import Scene, Thing

SIZE = 128
"""Width and height of a picture in pixels."""

SHADES = {
    "red": (220, 38, 38), "orange": (245, 130, 30), "yellow": (250, 215, 50), "green": (40, 160, 70),
    "blue": (40, 90, 220), "purple": (125, 50, 170), "pink": (245, 145, 190), "white": (245, 245, 245),
    "black": (22, 22, 22), "gray": (140, 140, 140),
}  # fmt: skip
"""The middle of each colour, RGB in [0, 255]; a picture's own is up to 8 away in each channel."""

RADII = {("one", "small"): (19.0, 23.0), ("one", "large"): (38.0, 44.0),
         ("two", "small"): (14.5, 17.5), ("two", "large"): (24.5, 28.0)}  # fmt: skip
"""Least and greatest radius in pixels, by how many things a picture has."""

_OVERSAMPLING = 4


def draw(scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
    """Draw one picture of a scene.

    Returns
    -------
    ``uint8[128, 128, 3]``, RGB. Which one of the many that the scene allows is ``rng``'s.
    """
    picture = Image.new("RGB", (SIZE, SIZE), _shade(scene.background, rng))
    for thing, (x, y) in zip(scene.placed(), _centres(scene, rng), strict=True):
        low, high = RADII["one" if scene.axis == "one" else "two", thing.size]
        mask = _mask(thing, x, y, rng.uniform(low, high))
        picture.paste(_shade(thing.colour, rng), (0, 0), mask)
    return np.asarray(picture)


def _centres(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    middle = SIZE / 2
    if scene.axis == "one":
        reach = 9.0 if scene.things[0].size == "large" else 16.0
        return [(middle + rng.uniform(-reach, reach), middle + rng.uniform(-reach, reach))]
    places = []
    for side in (-1, 1):
        along, across = middle + side * 31 + rng.uniform(-3, 3), middle + rng.uniform(-8, 8)
        places.append((along, across) if scene.axis == "row" else (across, along))
    return places


def _shade(colour: str, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, channel + rng.randint(-8, 8))) for channel in SHADES[colour])
    return red, green, blue


def _mask(thing: Thing, x: float, y: float, radius: float) -> Image.Image:
    """Coverage of each pixel by a shape, 0 to 255: drawn at four times the size and averaged."""
    big = Image.new("L", (SIZE * _OVERSAMPLING, SIZE * _OVERSAMPLING))
    pen = ImageDraw.Draw(big)
    x, y, radius = x * _OVERSAMPLING, y * _OVERSAMPLING, radius * _OVERSAMPLING
    if thing.shape in ("circle", "ring"):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if thing.shape == "ring":
            hole = radius * 0.55
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        pen.polygon([(x + radius * u, y + radius * v) for u, v in OUTLINES[thing.shape]], fill=255)
    return big.reduce(_OVERSAMPLING)


def _regular(corners: int, *, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners of a polygon with one corner up; every second one at ``inner`` times the radius."""
    angles = [2 * math.pi * n / corners for n in range(corners)]
    radii = [1.0 if n % 2 == 0 else inner for n in range(corners)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _cross(arm: float) -> list[tuple[float, float]]:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    turned = []
    for _ in range(4):
        turned += quarter
        quarter = [(-v, u) for u, v in quarter]
    return turned


def _heart() -> list[tuple[float, float]]:
    points = []
    for n in range(48):
        t = 2 * math.pi * n / 48
        u = 16 * math.sin(t) ** 3
        v = -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        points.append((u / 16.5, (v - 2.5) / 16.5))
    return points


OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "star": _regular(10, inner=0.42),
    "cross": _cross(0.32),
    "heart": _heart(),
}
"""Corners of the shapes that have them, in units of the radius, x to the right and y down."""
