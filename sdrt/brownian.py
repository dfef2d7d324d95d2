"""Brownian motion whose increments depend on a seed alone, not on where and in which order they are asked for.

torchsde's ``BrownianInterval`` as k-diffusion, A1111 and diffusers set it up for their SDE samplers: a binary tree over
the interval, halved down to six decimals. An interval's increment W and a draw of its own give the increments of its
halves, by the Brownian bridge: mean W · (left / whole), variance left · right / whole.
Source: Li et al., Scalable Gradients for Stochastic Differential Equations, arXiv 2001.01328, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sdrt.noise import Generator

Increments = Callable[[float, float], NDArray[np.float32]]
"""W(high) - W(low), of variance high - low, for low < high in the motion's interval."""

DECIMALS = 6
"""Of the points that intervals meet at; torchsde's tolerance of 1e-6."""
POOL = 24
"""Words of entropy in numpy's ``SeedSequence``."""


class BrownianTree:
    """One picture's motion over [low, high].

    What lies above the last increment is forgotten, as samplers go from noise to picture: some 50 intervals are held.
    """

    def __init__(
        self, low: float, high: float, seed: int, shape: Sequence[int], generator: Callable[[int], Generator]
    ) -> None:
        def draw(*key: int) -> NDArray[np.float32]:
            words = np.random.SeedSequence(seed, spawn_key=key, pool_size=POOL).generate_state(1)
            return generator(int(words[0])).randn(shape)

        whole = draw() * np.float32(math.sqrt(high - low))
        self._root = _Interval(low, high, whole, (0, 0), draw)

    def __call__(self, low: float, high: float) -> NDArray[np.float32]:
        """W(high) - W(low), f32[shape]; points outside the interval are its ends."""
        root = self._root
        low, high = (min(max(round(point, DECIMALS), root.low), root.high) for point in (low, high))
        return root.increment(low, high) if low < high else np.zeros_like(root.w)


class _Interval:
    def __init__(
        self, low: float, high: float, w: NDArray[np.float32], key: tuple[int, int], draw: Callable[..., Any]
    ) -> None:
        self.low, self.high = round(low, DECIMALS), round(high, DECIMALS)
        self.w = w
        self._key, self._draw = key, draw  # key: which of the 2^depth intervals of its depth, and the depth
        self._halves: tuple[_Interval, _Interval | None] | None = None

    def increment(self, low: float, high: float) -> NDArray[np.float32]:
        if (low, high) == (self.low, self.high):
            return self.w
        left, right = self._halves or self._split()
        if high <= left.high:
            self._halves = left, None  # nothing above is asked for again
            return left.increment(low, high)
        if right is None:
            left, right = self._split()
        if low >= right.low:
            return right.increment(low, high)
        return left.increment(low, left.high) + right.increment(right.low, high)

    def _split(self) -> tuple[_Interval, _Interval]:
        middle = 0.5 * (self.high + self.low)
        meeting = round(middle, DECIMALS)
        below, above, whole = meeting - self.low, self.high - meeting, 1 / (self.high - self.low)
        bridge = self._draw(*self._key) * np.float32(math.sqrt(below * above * whole))
        lower = np.float32(below) * self.w * np.float32(whole) + bridge
        index, depth = self._key
        left = _Interval(self.low, middle, lower, (2 * index, depth + 1), self._draw)
        right = _Interval(middle, self.high, self.w - lower, (2 * index + 1, depth + 1), self._draw)
        self._halves = left, right
        return left, right
