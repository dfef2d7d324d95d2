"""Noise for one picture of 512×512 and 1024×1024: ours, which is torch's stream, beside numpy's own and torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sdrt.brownian import BrownianTree
from sdrt.noise import TorchGenerator, initial_latents

Draw = Callable[[tuple[int, ...]], object]


def ours() -> Draw:
    return TorchGenerator(1).randn


def numpys() -> Draw:
    generator = np.random.default_rng(1)
    return lambda shape: generator.standard_normal(shape, dtype=np.float32)


def torchs() -> Draw:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(1)
    return lambda shape: torch.randn(shape, generator=generator)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("draw", [ours, numpys, torchs])
def test_draw(benchmark: Any, draw: Callable[[], Draw], size: int) -> None:
    benchmark(draw(), (4, size, size))


@pytest.mark.parametrize("size", [64, 128])
def test_initial_latents(benchmark: Any, size: int) -> None:
    """With seeding, as each picture has a generator of its own."""
    benchmark(lambda: initial_latents([TorchGenerator(1)], (4, size, size)))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("whose", ["ours", "torchsde"])
def test_brownian_step(benchmark: Any, whose: str, size: int) -> None:
    """The two increments of a step of DPM++ SDE."""
    shape = (4, size, size)
    if whose == "ours":
        motion: Any = BrownianTree(0.03, 14.6, 1, shape, TorchGenerator)
    else:
        torchsde = pytest.importorskip("torchsde")
        motion = torchsde.BrownianInterval(0.03, 14.6, shape, entropy=1, tol=1e-6, pool_size=24, halfway_tree=True)
    steps = itertools.pairwise(np.geomspace(14.6, 0.03, 101))

    def step() -> None:
        high, low = next(steps)
        motion(math.sqrt(low * high), high)
        motion(low, high)

    benchmark.pedantic(step, rounds=100)
