"""How far two arrays are apart."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def max_abs(reference: ArrayLike, got: ArrayLike) -> float:
    """Largest absolute difference, in the arrays' unit; NaN when either holds one."""
    a, b = _pair(reference, got)
    return float(np.max(np.abs(a - b))) if a.size else 0.0


def psnr(reference: ArrayLike, got: ArrayLike, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB: 20 log10(peak / rms difference).

    ``peak`` is the signal's range (1.0 for pictures in [0, 1]); without one it is the reference's largest magnitude.
    Infinite for identical arrays, NaN when either holds one.
    """
    a, b = _pair(reference, got)
    rms = math.sqrt(float(np.mean(np.square(a - b)))) if a.size else 0.0
    if peak is None:
        peak = float(np.max(np.abs(a))) if a.size else 0.0
    if rms == 0.0:
        return math.inf
    return 20.0 * math.log10(peak / rms) if peak > 0.0 else -math.inf


def _pair(reference: ArrayLike, got: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(reference, np.float64), np.asarray(got, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    return a, b
