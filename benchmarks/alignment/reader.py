"""The reader: a small convolutional network that says what a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from benchmarks.alignment.reading import HEADS, Reading
from benchmarks.demo.draw import SIZE
from benchmarks.demo.training import pixels

WEIGHTS = Path(__file__).with_name("reader.safetensors")
"""The trained weights: float16."""

WIDTHS = ((16, 2), (32, 2), (32, 1), (48, 2), (48, 1), (48, 2), (48, 2))
"""Channels and stride of each convolution; what is left is 4 pixels wide."""


class Reader(nn.Module):
    """Pictures ``float32[B, 3, 128, 128]`` in [-1, 1] → scores ``float32[B, n]`` of all heads' words, in their order.

    The last features are laid side by side, not averaged: which thing is the left one is a matter of place.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[Any] = []
        before = 3
        for width, stride in WIDTHS:
            kernel = 5 if before == 3 else 3
            layers += [nn.Conv2d(before, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(inplace=True)]
            before = width
        self.features = nn.Sequential(*layers)
        self.heads = nn.Linear(before * 16, sum(map(len, HEADS.values())))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.heads(self.features(pictures).flatten(1))
        return scores


def by_head(scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """``float32[B, n]`` of all heads as ``float32[B, words]`` of each."""
    return dict(zip(HEADS, scores.split([len(words) for words in HEADS.values()], dim=1), strict=True))


def load(file: Path = WEIGHTS) -> Reader:
    """The reader with trained weights. FileNotFoundError, which says how to make them, where there are none."""
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; make it: python -m benchmarks.alignment.train {file}")
    reader = Reader()
    reader.load_state_dict(load_file(file))
    reader.eval()
    return reader


def read(reader: Reader, pictures: Sequence[Image.Image | NDArray[np.uint8]], batch: int = 64) -> list[Reading]:
    """What each picture shows. PIL pictures, or ``uint8[H, W, 3]``; other sizes are brought to 128x128 first."""
    readings: list[Reading] = []
    for start in range(0, len(pictures), batch):
        arrays = [_sized(picture) for picture in pictures[start : start + batch]]
        with torch.inference_mode():
            found = by_head(reader(pixels(arrays, torch.device("cpu"))))
        chosen = {head: scores.argmax(1).tolist() for head, scores in found.items()}
        readings += [
            Reading.of_words({head: words[chosen[head][i]] for head, words in HEADS.items()})
            for i in range(len(arrays))
        ]
    return readings


def _sized(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    made = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    made = made.convert("RGB")
    return np.asarray(made if made.size == (SIZE, SIZE) else made.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
