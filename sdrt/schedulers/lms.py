"""LMS: the linear multistep method of k-diffusion: Adams–Bashforth of order 4 in σ, whose steps are not equal.

The probability flow ODE dx/dσ = (x - x0)/σ is Karras et al.'s, arXiv 2206.00364, equation 1 with s = 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan

ORDER = 4


@dataclass(frozen=True)
class LMSOptions(levels.SigmaSchedule):
    """Options of LMSDiscreteScheduler; names and defaults are diffusers'."""


class LMS(levels.Exploding):
    """diffusers' LMSDiscreteScheduler. Latents are x = x0 + σ·ε; the network sees x / sqrt(σ² + 1)."""

    ABOUT = tables.About(
        "LMSDiscreteScheduler", "linear multistep, fourth order; one network call a step",
        "Elucidating the Design Space of Diffusion-Based Generative Models", "2206.00364",
    )  # fmt: skip
    OPTIONS = LMSOptions
    order = 1

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(self.OPTIONS, config, name)
        options.unsupported(name, rescale_betas_zero_snr=(o.rescale_betas_zero_snr, False))
        made = levels.exploding(o, plan, name)
        levels.check_falling(made.sigmas, name, o.num_train_timesteps)
        self.timesteps = made.timesteps.astype(np.float32)
        self._sigmas = np.append(made.sigmas, 0.0).astype(np.float32)
        self.init_sigma = levels.start_sigma(self._sigmas, o.timestep_spacing)
        self._kind = o.prediction_type
        self._slopes: list[Array] = []  # newest first

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        sigma = self._sigmas[i]
        x0 = tables.denoised(pred, x, sigma, self._kind)
        slope = (x - x0) / sigma
        self._slopes = [slope, *self._slopes[: ORDER - 1]]
        # The order counts from the schedule's beginning, as in diffusers: where image to image begins in the middle,
        # the first steps lack slopes that the weights are for.
        order = min(i + 1, ORDER)
        total: Array | None = None
        for weight, past in zip(weights(self._sigmas, i, order), self._slopes, strict=False):
            total = weight * past if total is None else total + weight * past
        assert total is not None
        return x + total, x0


def weights(sigmas: Array, i: int, order: int) -> list[np.float32]:
    """For each of the ``order`` latest σ, newest first: the integral of its Lagrange polynomial over step i.

    Exact: Gauss' rule of two points integrates polynomials to degree 3.
    """
    nodes = [float(sigmas[i - k]) for k in range(order)]
    start, end = nodes[0], float(sigmas[i + 1])
    half, centre = (end - start) / 2, (end + start) / 2
    points = (centre - half / math.sqrt(3), centre + half / math.sqrt(3))
    return [
        np.float32(half * sum(math.prod((p - c) / (own - c) for c in nodes if c != own) for p in points))
        for own in nodes
    ]
