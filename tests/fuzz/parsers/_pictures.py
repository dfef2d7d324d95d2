"""What the three parsers of pictures share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdrt import image


def picture(mode: str = "RGB", width: int = 20, height: int = 12) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    made = Image.fromarray(np.stack([x * 12, y * 20, x * y], -1).astype(np.uint8))
    return Image.fromarray(np.asarray(made)[..., 0].astype(np.uint16) * 257) if mode == "I;16" else made.convert(mode)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    picture(mode).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112], made[271], made[305] = orientation, "maker", "software"
    return made


def feed(data: bytes, folder: Path) -> None:
    path = folder / "x"
    path.write_bytes(data)
    got = image.rgb(path)
    assert got.mode == "RGB"
    sample = image.to_sample(got, (16, 24))
    assert sample.shape == (1, 3, 24, 16)
    assert np.abs(sample).max() <= 1
    assert image.rgb(got).tobytes() == got.tobytes()
