"""DPM2 ancestral: k-diffusion's ``sample_dpm_2_ancestral``.

Algorithm 2 of Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364,
with the slope taken at the geometric middle (DPM-Solver-2, arXiv 2206.00927) of each ancestral step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.euler_ancestral import ending, split
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class KDPM2AncestralOptions(levels.SigmaSchedule):
    """Options of KDPM2AncestralDiscreteScheduler; names and defaults are diffusers'."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # fewer than the base's


class KDPM2Ancestral(levels.Halved):
    """diffusers' KDPM2AncestralDiscreteScheduler: two network calls a step, but one at the last."""

    ABOUT = tables.About(
        "KDPM2AncestralDiscreteScheduler", "second order with fresh noise; two network calls a step",
        "Elucidating the Design Space of Diffusion-Based Generative Models", "2206.00364",
    )  # fmt: skip
    OPTIONS = KDPM2AncestralOptions
    order = 2

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(self.OPTIONS, config, name)
        options.unsupported(name, rescale_betas_zero_snr=(o.rescale_betas_zero_snr, False))
        made = levels.exploding(o, plan, name, karras_rounded=True)
        self._sigmas = ending(made.sigmas, name)
        # A middle between each σ and where its step goes down to; of the last step, which goes to 0, none.
        self._middles = np.array(
            [middle(s, split(s, after)[0]) for s, after in zip(self._sigmas[:-2], self._sigmas[1:-1], strict=True)],
            np.float32,
        )
        if not (self._middles > 0).all():
            raise InputError(
                f"{name}: {plan.steps} steps of this schedule are so long that float32 leaves none of a step's noise",
                "take more steps, or another scheduler",
            )
        between = levels.sigma_to_t(self._middles.astype(np.float64), np.log(made.training))
        self.timesteps = levels.interleaved(made.timesteps, between)
        self.init_sigma = levels.start_sigma(self._sigmas, o.timestep_spacing)
        self._kind = o.prediction_type
        self._start: Array | None = None
        """Latents at the beginning of the step, during its second half."""

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        k, level = i // 2, self._level(i)
        x0 = tables.denoised(pred, x, level, self._kind)
        slope = (x - x0) / level
        sigma = self._sigmas[k]
        if i % 2 == 0:
            self._start = x
            to = self._middles[k] if k < len(self._middles) else np.float32(0)
            return x + slope * (to - sigma), x0
        assert self._start is not None
        down, up = split(sigma, self._sigmas[k + 1])
        moved: Array = self._start + slope * (down - sigma)
        moved += noise() * up
        return moved, x0


def middle(sigma: np.float32, down: np.float32) -> np.float32:
    """The middle of two noise levels in log σ."""
    if down == 0:
        return np.float32(0)
    high, low = np.float32(math.log(sigma)), np.float32(math.log(down))
    return np.float32(math.exp(low - np.float32(0.5) * (low - high)))
