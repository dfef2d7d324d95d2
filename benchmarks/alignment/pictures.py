"""Pictures that the reader learns from: scenes as they are drawn, pictures that break the grammar, and spoilt ones.

A generated picture is softer than a drawn one, a little off in colour and place, and may show what no caption says: no
thing, three, a shape that is none. Who never saw that guesses, and is right by chance.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.alignment.reading import HEADS, NONE, Reading
from benchmarks.demo.draw import OUTLINES, RADII, SHADES, SIZE, draw
from benchmarks.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing, is_held_out, random_scene

Labels = Mapping[str, str | None]
"""By head its word, or None where nothing is learned from the picture: what is there is open to opinion."""

OUTLINED = {**OUTLINES, "circle": [(math.sin(n * math.pi / 32), math.cos(n * math.pi / 32)) for n in range(64)]}
"""All shapes without a hole, as in ``benchmarks.demo.draw.OUTLINES``."""

ODD_SHARE, BLANK_SHARE, GARBAGE_SHARE = 0.12, 0.03, 0.06
STRANGE = 70.0
"""Distance of a colour without a name from all that have one, in RGB of [0, 255]."""

_OVERSAMPLING = 4
Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


def lesson(rng: random.Random) -> tuple[NDArray[np.uint8], Labels]:
    """One picture ``uint8[128, 128, 3]`` and what is to be read from it; some went through JPEG."""
    drawn = rng.random()
    if drawn < ODD_SHARE:
        picture, labels = odd(rng)
    elif drawn < ODD_SHARE + BLANK_SHARE:
        picture, labels = blank(rng)
    elif drawn < ODD_SHARE + BLANK_SHARE + GARBAGE_SHARE:
        picture, labels = garbage(rng), dict.fromkeys(HEADS, NONE)
    else:
        scene = random_scene(rng)
        picture, labels = draw(scene, rng), Reading.of_scene(scene).words
    if rng.random() < 0.15:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=rng.randint(25, 80))
        picture = np.asarray(Image.open(file))
    return picture, labels


def blank(rng: random.Random) -> tuple[NDArray[np.uint8], Labels]:
    """A background with nothing on it."""
    background = rng.choice(BACKGROUNDS)
    picture = Image.new("RGB", (SIZE, SIZE), _near(SHADES[background], rng))
    return np.asarray(picture), dict.fromkeys(HEADS, NONE) | {"background": background}


def garbage(rng: random.Random) -> NDArray[np.uint8]:
    """Blots of all colours, from a few large ones to noise: neither thing nor background."""
    cells = int(2 ** rng.uniform(1, 7))
    small = np.frombuffer(rng.randbytes(cells * cells * 3), np.uint8).reshape(cells, cells, 3)
    return np.asarray(Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def odd(rng: random.Random) -> tuple[NDArray[np.uint8], Labels]:
    """A picture that breaks the grammar somewhere.

    One, two or three things; some are blobs, some things and backgrounds have a colour without a name, one thing may
    lie where one of two would. Where three are, nobody can say which are the first two. What is named is never of the
    combinations held out.
    """
    while True:
        picture, labels = _any_odd(rng)
        words = [(str(labels[f"shape_{slot}"]), str(labels[f"colour_{slot}"])) for slot in range(2)]
        named = [
            Thing(shape, colour, "large")  # a size takes no part in what is held out
            for shape, colour in words
            if shape in SHAPES and colour in COLOURS
        ]
        if not named or not is_held_out(Scene(tuple(named), str(labels["background"]))):
            return picture, labels


def _any_odd(rng: random.Random) -> tuple[NDArray[np.uint8], Labels]:
    labels: dict[str, str | None] = dict.fromkeys(HEADS, NONE)
    background = rng.choice(BACKGROUNDS)
    shade, labels["background"] = _near(SHADES[background], rng), background
    if rng.random() < 0.2:
        shade, labels["background"] = _nameless(rng), NONE
    picture = Image.new("RGB", (SIZE, SIZE), shade)
    count = rng.choice((1, 1, 2, 2, 3))
    axis = rng.choice(("row", "column"))
    aside = count == 1 and rng.random() < 0.4
    labels["axis"] = ("one", axis, NONE)[count - 1]
    steps = {1: (rng.choice((-31, 31)) if aside else 0,), 2: (-31, 31), 3: (-42, 0, 42)}[count]
    for slot, step in enumerate(steps):
        along, across = SIZE / 2 + step + rng.uniform(-3, 3), SIZE / 2 + rng.uniform(-8, 8)
        x, y = (along, across) if axis == "row" else (across, along)
        size = rng.choice(SIZES)
        low, high = (13.0, 18.0) if count == 3 else RADII["one" if count == 1 and not aside else "two", size]
        shape = rng.choice(sorted(OUTLINED))
        outline = OUTLINED[shape]
        if rng.random() < 0.3:
            outline, shape = _blob(rng), NONE
        colour = rng.choice([name for name in COLOURS if name != background])
        paint = _near(SHADES[colour], rng)
        if rng.random() < 0.2:
            paint, colour = _nameless(rng, shade), NONE
        picture.paste(paint, (0, 0), _coverage(outline, x, y, rng.uniform(low, high)))
        measured = None if aside or shape == NONE else size
        if slot < 2:
            labels |= {f"shape_{slot}": shape, f"colour_{slot}": colour, f"size_{slot}": measured}
    if count == 3:
        labels |= {head: None for head in HEADS if head not in ("axis", "background")}
    return np.asarray(picture), labels


def _coverage(outline: Points, x: float, y: float, radius: float) -> Image.Image:
    big = Image.new("L", (SIZE * _OVERSAMPLING, SIZE * _OVERSAMPLING))
    points = [(_OVERSAMPLING * (x + radius * u), _OVERSAMPLING * (y + radius * v)) for u, v in outline]
    ImageDraw.Draw(big).polygon(points, fill=255)
    return big.reduce(_OVERSAMPLING)


def _blob(rng: random.Random) -> Points:
    """A closed smooth outline that is far from round and has no other regularity."""
    waves = [(k, rng.uniform(0.1, 0.3) / math.sqrt(k - 1), rng.uniform(0, 2 * math.pi)) for k in range(2, 7)]
    points = []
    for n in range(64):
        angle = n * math.pi / 32
        radius = 0.85 + sum(a * math.cos(k * angle + phase) for k, a, phase in waves)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def _near(shade: Colour, rng: random.Random) -> Colour:
    red, green, blue = (max(0, min(255, channel + rng.randint(-8, 8))) for channel in shade)
    return red, green, blue


def _nameless(rng: random.Random, *others: Colour) -> Colour:
    """A colour far from all that have a name, and from ``others``."""
    while True:
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if all(math.dist(colour, shade) > STRANGE for shade in (*SHADES.values(), *others)):
            return colour


def spoil(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures ``float32[B, 3, 128, 128]`` in [-1, 1] as a small diffusion model may make them.

    Moved, stretched, tinted, paler, uneven, noisy; of four parts of the batch two are blurred (one by a Gaussian, one
    by resizing). A quarter of all pictures is left as it is.
    """
    count, device = len(batch), batch.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return (torch.rand(shape or (count, 1, 1, 1), generator=generator) * (high - low) + low).to(device)

    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = uniform(0.94, 1.06, 2, count)
    theta[:, :, 2] = uniform(-8 / SIZE, 8 / SIZE, count, 2)  # of half a width: four pixels
    grid = torch.nn.functional.affine_grid(theta, list(batch.shape), align_corners=False)
    spoilt = torch.nn.functional.grid_sample(batch, grid, padding_mode="border", align_corners=False)
    parts = list(spoilt.chunk(4))
    parts[0] = gaussian(parts[0], float(uniform(0.5, 2.2, 1)))
    side = int(uniform(36, 110, 1))
    parts[-1] = _resized(_resized(parts[-1], side), SIZE)
    spoilt = torch.cat(parts)
    spoilt = spoilt * uniform(0.82, 1.08) + uniform(-0.1, 0.1, count, 3, 1, 1)
    spoilt = spoilt + _resized(uniform(-0.12, 0.12, count, 3, 8, 8), SIZE) * uniform(0, 1)
    noise = torch.randn(spoilt.shape, generator=generator).to(device) * uniform(0, 0.12)
    kept = uniform(0, 1) < 0.25
    return torch.where(kept, batch, (spoilt + noise).clamp(-1, 1))


def _resized(batch: torch.Tensor, side: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(batch, size=(side, side), mode="bilinear", antialias=side < batch.shape[-1])


def gaussian(batch: torch.Tensor, sigma: float) -> torch.Tensor:
    """``float32[B, C, H, W]`` blurred by a Gaussian of ``sigma`` pixels; edges are repeated outwards."""
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=batch.device) / sigma) ** 2)
    weights = (weights / weights.sum()).reshape(1, 1, 1, -1).repeat(batch.shape[1], 1, 1, 1)
    padded = torch.nn.functional.pad(batch, (reach, reach, reach, reach), mode="replicate")
    across = torch.nn.functional.conv2d(padded, weights, groups=batch.shape[1])
    return torch.nn.functional.conv2d(across, weights.transpose(2, 3), groups=batch.shape[1])
