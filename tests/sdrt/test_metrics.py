"""Metrics by hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdrt.metrics import max_abs, psnr


def test_known_values() -> None:
    a = np.array([0.0, 1.0, -2.0, 0.5])
    assert max_abs(a, a + 0.25) == 0.25
    assert psnr(a, a + 0.2) == pytest.approx(20.0)  # peak 2, rms 0.2
    assert psnr(a, a + 0.1, peak=1.0) == pytest.approx(20.0)
    assert psnr(a, a) == math.inf
    assert psnr(np.zeros(3), np.ones(3)) == -math.inf
    assert math.isnan(psnr(a, a * np.nan))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        psnr(np.zeros(3), np.zeros((3, 1)))
