"""PLMS: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", arXiv 2202.09778.

Without the Runge-Kutta warm-up: the default of Stable Diffusion 1.x checkpoints. The second network call repeats the
second timestep, so that n steps take n + 1 calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class PNDMOptions(tables.TrainingSchedule):
    """Options of PNDMScheduler; names and defaults are diffusers'."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False


class PNDM:
    """diffusers' PNDMScheduler with ``skip_prk_steps``."""

    ABOUT = tables.About(
        "PNDMScheduler", "linear multistep, fourth order; n + 1 network calls for n steps",
        "Pseudo Numerical Methods for Diffusion Models on Manifolds", "2202.09778",
    )  # fmt: skip
    OPTIONS = PNDMOptions
    init_sigma = 1.0
    order = 1

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        o = options.read(self.OPTIONS, config, "PNDMScheduler")
        levels.check_steps(plan.steps, o)
        options.unsupported(
            "PNDMScheduler",
            skip_prk_steps=(o.skip_prk_steps, True),
            prediction_type=(o.prediction_type, o.prediction_type if o.prediction_type != "sample" else "epsilon"),
            rescale_betas_zero_snr=(o.rescale_betas_zero_snr, False),
        )
        n, steps = o.num_train_timesteps, plan.steps
        rising = levels.spaced(o.timestep_spacing, steps, n, o.steps_offset).round()[::-1]
        self.timesteps = levels.check_timesteps(np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])[::-1], o)
        self._stride = n // steps
        self._alpha_bar = tables.alphas_cumprod(o)
        self._final = 1.0 if o.set_alpha_to_one else float(self._alpha_bar[0])
        self._kind = o.prediction_type
        self._calls = 0
        self._history: list[Array] = []  # newest first
        self._first: Array | None = None

    def scale(self, x: Array, i: int) -> Array:
        return x

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        return tables.diffused(x0, noise, self._alpha_bar[int(self.timesteps[i])])

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        t = int(self.timesteps[i])
        before = t - self._stride
        e = self._history
        self._calls += 1
        if self._calls == 2:  # the repeated call: the first step again, with the mean of both ends' slopes
            assert self._first is not None
            t, before, x = t + self._stride, t, self._first
            slope = (pred + e[0]) / 2
        else:
            e = self._history = [pred, *e[:3]]
            self._first = x if self._calls == 1 else None
            if len(e) == 1:
                slope = pred
            elif len(e) == 2:
                slope = (3 * e[0] - e[1]) / 2
            elif len(e) == 3:
                slope = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
            else:
                slope = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        return self._transfer(x, slope, t, before)

    def _transfer(self, x: Array, slope: Array, t: int, before: int) -> tuple[Array, Array]:
        """Equation 9: from ᾱ_t to ᾱ_before along the slope."""
        bar = float(self._alpha_bar[t])
        bar_before = float(self._alpha_bar[before]) if before >= 0 else self._final
        alpha, s = math.sqrt(bar), math.sqrt(1 - bar)
        epsilon = alpha * slope + s * x if self._kind == "v_prediction" else slope
        denominator = bar * math.sqrt(1 - bar_before) + math.sqrt(bar * (1 - bar) * bar_before)
        moved = math.sqrt(bar_before / bar) * x - ((bar_before - bar) / denominator) * epsilon
        return moved, (x - s * epsilon) / alpha
