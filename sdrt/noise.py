"""Standard normal noise that equals ``torch.randn`` of torch's CPU generator, in numpy.

torch fills a float32 tensor of 16 values or more from 24-bit uniforms of mt19937, by Box–Muller in blocks of 16 (eight
radii, eight angles); when the size is no multiple of 16, the last 16 values are drawn afresh. Fewer than 16 values come
one by one from 53-bit uniforms, and the second value of each Box–Muller pair is kept for the next call. Source:
``normal_fill`` and ``normal_distribution`` in ATen (native/cpu/DistributionTemplates.h, core/DistributionsHelper.h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import InputError

MAX_SEED = 2**64 - 1


class TorchGenerator:
    """The stream of ``torch.Generator("cpu").manual_seed(seed)``. As in torch, only the seed's low 32 bits count."""

    def __init__(self, seed: int) -> None:
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed is {seed}, expected 0 to 2^64 - 1")
        self._bits = np.random.RandomState(seed & 0xFFFFFFFF)  # mt19937 with init_genrand, as in torch
        self._kept: float | None = None

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Normal noise, f32[shape], mean 0, variance 1; equal to ``torch.randn(shape, generator=…)`` within 1e-6."""
        size = math.prod(shape)
        if size < 16:
            values = np.array([self._one() for _ in range(size)], np.float32)
            return values.reshape(shape)
        values = self._uniforms(size)
        blocks = values[: size - size % 16].reshape(-1, 16)
        _box_muller(blocks)
        if size % 16:
            tail = self._uniforms(16).reshape(1, 16)
            _box_muller(tail)
            values[-16:] = tail[0]
        return values.reshape(shape)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._bits.randint(0, 2**32, size=count, dtype=np.uint32)

    def _uniforms(self, count: int) -> NDArray[np.float32]:
        return (self._words(count) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def _one(self) -> float:
        if self._kept is not None:
            value, self._kept = self._kept, None
            return value
        words = [int(word) for word in self._words(4)]
        u1, u2 = (((hi << 32 | lo) & (2**53 - 1)) * 2.0**-53 for hi, lo in (words[:2], words[2:]))
        radius = math.sqrt(-2.0 * math.log1p(-u2))
        self._kept = radius * math.sin(2.0 * math.pi * u1)
        return radius * math.cos(2.0 * math.pi * u1)


def _box_muller(blocks: NDArray[np.float32]) -> None:
    """In place: u[:, :8] give radii, u[:, 8:] angles; the cosines land in the first half, the sines in the second."""
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - blocks[:, :8]))
    angle = np.float32(2.0 * math.pi) * blocks[:, 8:]
    blocks[:, :8] = radius * np.cos(angle)
    blocks[:, 8:] = radius * np.sin(angle)


def initial_latents(generators: Sequence[TorchGenerator], shape: Sequence[int]) -> NDArray[np.float32]:
    """One draw a picture: f32[len(generators), *shape]."""
    return np.stack([generator.randn(shape) for generator in generators])
