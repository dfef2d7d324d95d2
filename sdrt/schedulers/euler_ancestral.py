"""Euler ancestral: one Euler step to less noise than the next level has, and fresh noise up to it.

k-diffusion's ``sample_euler_ancestral``, the ancestral sampling of Song et al., "Score-Based Generative Modeling
through Stochastic Differential Equations", arXiv 2011.13456, appendix F, written for latents x = x0 + σ·ε.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class EulerAncestralOptions(levels.SigmaSchedule):
    """Options of EulerAncestralDiscreteScheduler; names and defaults are diffusers', but for the sigma schedules.

    diffusers' class has none; A1111 has them for this sampler too.
    """

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # fewer than the base's


ZERO = np.float32(0)


def split(sigma: np.float32, sigma_next: np.float32) -> tuple[np.float32, np.float32]:
    """(down, up): the noise that the step goes down to, and the fresh noise that brings it up to ``sigma_next``.

    down² + up² = sigma_next². All in float32 and in diffusers' order of operations: where sigma_next is much less than
    sigma, down is the small difference of two equal squares, and its rounding is part of the picture.
    """
    square, square_next = sigma * sigma, sigma_next * sigma_next
    up = np.minimum(sigma_next, np.sqrt(square_next * np.maximum(square - square_next, ZERO) / square))
    return np.sqrt(np.maximum(square_next - up * up, ZERO)), up


def ending(sigmas: levels.Floats, name: str) -> Array:
    """f32[steps + 1]: σ of the steps, and 0 at the end. InputError where float32 does not hold its fourth power."""
    if sigmas.max() > tables.MAX_SIGMA:
        raise InputError(
            f"{name}: the first step's noise is {sigmas.max():g} times the picture's, at most {tables.MAX_SIGMA:g}",
            "the betas are too large",
        )
    return np.append(sigmas, 0.0).astype(np.float32)


class EulerAncestral(levels.Exploding):
    """diffusers' EulerAncestralDiscreteScheduler."""

    ABOUT = tables.About(
        "EulerAncestralDiscreteScheduler", "first order, fresh noise at each step; varied pictures, never settles",
        "Score-Based Generative Modeling through Stochastic Differential Equations", "2011.13456",
        extra=frozenset({"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}),
    )  # fmt: skip
    OPTIONS = EulerAncestralOptions
    order = 1

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        o = options.read(self.OPTIONS, config, self.ABOUT.diffusers)
        made = levels.exploding(o, plan, self.ABOUT.diffusers)
        self.timesteps = made.timesteps.astype(np.float32)
        self._sigmas = ending(made.sigmas, self.ABOUT.diffusers)
        self.init_sigma = levels.start_sigma(self._sigmas, o.timestep_spacing)
        self._kind = o.prediction_type

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        sigma = self._sigmas[i]
        down, up = split(sigma, self._sigmas[i + 1])
        x0 = tables.denoised(pred, x, sigma, self._kind)
        moved = x + (x - x0) / sigma * (down - sigma)
        moved += noise() * up  # drawn at the last step too, where up is 0: as in diffusers
        return moved, x0
