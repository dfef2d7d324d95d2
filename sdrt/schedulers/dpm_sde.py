"""DPM-Solver++ for the diffusion SDE: Lu et al., arXiv 2211.01095, appendix A ("sde-dpmsolver++", "sde-dpmsolver").

A step of the ODE's formulas over twice the length of λ, and fresh noise for what that takes away too much. The formulas
are diffusers'; its third order has the sign of φ3's 1/2 the other way round than k-diffusion's ``sample_dpmpp_3m_sde``:
it is diffusers that pictures of order 3 ("DPM++ 3M SDE") are equal to.
"""

from __future__ import annotations

import numpy as np

from sdrt.schedulers.multistep import Noise32, exp, integrated
from sdrt.schedulers.tables import Array

TWO = np.float32(2)


def stepped(
    level: Noise32, x: Array, start: int, end: int, d: tuple[Array, ...], fresh: Array, *, of_x0: bool, midpoint: bool
) -> Array:
    """The latents of level ``end`` from those of ``start``: f32[B,…]; ``d``: D0, D1, D2, as many as are given.

    of_x0: the differences are of x0 ("++"), else of ε. fresh: standard normal noise.
    """
    one = np.float32(1)
    h = level.lam[end] - level.lam[start]
    if not of_x0:
        moved = integrated(x, level.alpha[end] / level.alpha[start], TWO * level.s[end], h, d[:2], midpoint=midpoint)
        moved += (level.s[end] * np.sqrt(np.maximum(exp(TWO * h) - one, np.float32(0)))) * fresh
        return moved
    double = -TWO * h
    phi1 = exp(double) - one
    scale = level.s[end] / level.s[start] * exp(-h)
    moved = integrated(x, scale, level.alpha[end], double, d[:2], midpoint=midpoint)
    if len(d) > 2:
        moved -= (level.alpha[end] * ((phi1 - double) / double**2 + np.float32(0.5))) * d[2]
    moved += (level.s[end] * np.sqrt(np.maximum(-phi1, np.float32(0)))) * fresh
    return moved
