"""Standard normal noise in numpy: of torch's CPU generator, of torch's CUDA generator (Philox), and numpy's own.

torch on a CPU fills a float32 tensor of 16 values or more from 24-bit uniforms of mt19937, by Box–Muller in blocks of
16 (eight radii, eight angles); when the size is no multiple of 16, the last 16 values are drawn afresh. Fewer than 16
values come one by one from 53-bit uniforms, and the second value of each Box–Muller pair is kept for the next call.
Source: ``normal_fill`` and ``normal_distribution`` in ATen (native/cpu/DistributionTemplates.h,
core/DistributionsHelper.h).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.brownian import BrownianTree, Increments
from sdrt.errors import InputError

MAX_SEED = 2**64 - 1

Rng = Literal["cpu", "cuda", "numpy"]
"""Whose stream: torch's on a CPU, torch's on CUDA (A1111's source "NV"), numpy's ``RandomState``."""


class Generator(Protocol):
    """One picture's stream of noise."""

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next draw, f32[shape], mean 0, variance 1."""


class TorchGenerator:
    """The stream of ``torch.Generator("cpu").manual_seed(seed)``. As in torch, only the seed's low 32 bits count."""

    def __init__(self, seed: int) -> None:
        _check_seed(seed)
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


class PhiloxGenerator:
    """The stream of ``torch.Generator("cuda").manual_seed(seed)``; A1111's random number source "NV".

    Element i of draw d is the first normal that Box–Muller makes of Philox 4×32-10 with the counter (d, 0, i, 0) and
    the seed as its key; so it is in torch for draws of no more elements than a GPU runs threads (latents have fewer).
    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11); cuRAND's ``curand_normal4``.
    """

    def __init__(self, seed: int) -> None:
        _check_seed(seed)
        self._key = seed & 0xFFFFFFFF, seed >> 32
        self._draws = 0

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        size = math.prod(shape)
        counter = np.zeros((4, size), np.uint32)
        counter[0], counter[2] = self._draws & 0xFFFFFFFF, np.arange(size, dtype=np.uint32)
        self._draws += 1
        first, second, *_ = philox(counter, self._key)
        radius = np.sqrt(-2.0 * np.log((first + 0.5) * 2.0**-32))
        values: NDArray[np.float32] = (radius * np.sin((second + 0.5) * (2.0 * math.pi * 2.0**-32))).astype(np.float32)
        return values.reshape(shape)


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox 4×32 with 10 rounds: u32[4,n] of counters → u32[4,n]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = c0.astype(np.uint64) * 0xD2511F53, c2.astype(np.uint64) * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (right >> 32).astype(np.uint32) ^ c1 ^ np.uint32(k0), right.astype(np.uint32),
            (left >> 32).astype(np.uint32) ^ c3 ^ np.uint32(k1), left.astype(np.uint32),
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


class NumpyGenerator:
    """The stream of ``np.random.RandomState(seed).randn``, which diffusers' ONNX pipelines draw from.

    Of the seed only the low 32 bits count: numpy takes no more.
    """

    def __init__(self, seed: int) -> None:
        _check_seed(seed)
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        return self._state.standard_normal(tuple(shape)).astype(np.float32)


GENERATORS: dict[Rng, Callable[[int], Generator]] = {
    "cpu": TorchGenerator,
    "cuda": PhiloxGenerator,
    "numpy": NumpyGenerator,
}
A1111_SOURCES: dict[Rng, str] = {"cpu": "CPU", "cuda": "NV", "numpy": "NumPy"}
"""As A1111 writes them into a picture; it has no numpy."""


def _check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed is {seed}, expected 0 to 2^64 - 1")


def slerp(low: NDArray[np.float32], high: NDArray[np.float32], part: float) -> NDArray[np.float32]:
    """Noise between two draws f32[C,h,w], along the sphere: low for part 0, high for 1.

    As A1111 mixes variation seeds: each column of each channel on a sphere of its own, straight where the two are all
    but the same. (Shoemake, Animating Rotation with Quaternion Curves, 1985.)
    """
    if part <= 0 or part >= 1:
        return low if part <= 0 else high
    lengths = np.linalg.norm(low, axis=1, keepdims=True) * np.linalg.norm(high, axis=1, keepdims=True)
    cosine = (low * high).sum(axis=1, keepdims=True) / lengths
    if cosine.mean() > ALIKE:
        return low * np.float32(1 - part) + high * np.float32(part)
    angle = np.arccos(np.clip(cosine, -1, 1))
    sine = np.sin(angle)
    flat = sine < PARALLEL  # columns of one value, and some of two: no arc leads from one to the other
    sine = np.where(flat, 1, sine)
    first = np.where(flat, 1 - part, np.sin((1 - part) * angle) / sine)
    second = np.where(flat, part, np.sin(part * angle) / sine)
    mixed: NDArray[np.float32] = (first * low + second * high).astype(np.float32)
    return mixed


ALIKE = 0.9995
"""Cosine from which on two draws are mixed along a straight line."""
PARALLEL = 1e-3
"""Sine of the angle of two columns up to which they are, too."""


def _box_muller(blocks: NDArray[np.float32]) -> None:
    """In place: u[:, :8] give radii, u[:, 8:] angles; the cosines land in the first half, the sines in the second."""
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - blocks[:, :8]))
    angle = np.float32(2.0 * math.pi) * blocks[:, 8:]
    blocks[:, :8] = radius * np.cos(angle)
    blocks[:, 8:] = radius * np.sin(angle)


def initial_latents(generators: Sequence[Generator], shape: Sequence[int]) -> NDArray[np.float32]:
    """One draw a picture: f32[len(generators), *shape]."""
    return np.stack([generator.randn(shape) for generator in generators])


class StepNoise:
    """What the steps of a generation draw, f32[B,*shape]: each picture of its own stream, or of its own seed's motion.

    Calling it goes on in the streams that the first latents were drawn from.
    """

    def __init__(self, generators: Sequence[Generator], seeds: Sequence[int], shape: Sequence[int], rng: Rng) -> None:
        self._generators, self._seeds, self._shape, self._rng = generators, seeds, shape, rng

    def __call__(self) -> NDArray[np.float32]:
        return initial_latents(self._generators, self._shape)

    def brownian(self, low: float, high: float) -> Increments:
        """As in A1111; and in diffusers for one picture, its seed in the config as ``noise_sampler_seed``."""
        trees = [BrownianTree(low, high, seed, self._shape, GENERATORS[self._rng]) for seed in self._seeds]
        return lambda start, end: np.stack([tree(start, end) for tree in trees])
