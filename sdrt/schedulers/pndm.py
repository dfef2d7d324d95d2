"""PLMS: Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", arXiv 2202.09778.

Stable Diffusion 1.x checkpoints leave out the Runge-Kutta warm-up: the second network call repeats the second timestep
then, so that n steps take n + 1 calls. With it the first three steps take four calls each, n + 9 in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan

WARM_UP = 3
"""Runge-Kutta steps, until the multistep formula has its history."""


@dataclass(frozen=True)
class PNDMOptions(tables.TrainingSchedule):
    """Options of PNDMScheduler; names and defaults are diffusers'."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False


class PNDM(levels.Tabled):
    """diffusers' PNDMScheduler."""

    ABOUT = tables.About(
        "PNDMScheduler", "linear multistep, fourth order; n + 1 network calls for n steps",
        "Pseudo Numerical Methods for Diffusion Models on Manifolds", "2202.09778",
    )  # fmt: skip
    OPTIONS = PNDMOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        o = options.read(self.OPTIONS, config, "PNDMScheduler")
        levels.check_steps(plan.steps, o)
        options.unsupported(
            "PNDMScheduler",
            prediction_type=(o.prediction_type, o.prediction_type if o.prediction_type != "sample" else "epsilon"),
            rescale_betas_zero_snr=(o.rescale_betas_zero_snr, False),
        )
        n, steps = o.num_train_timesteps, plan.steps
        rising = levels.spaced(o.timestep_spacing, steps, n, o.steps_offset).round()[::-1]
        if o.skip_prk_steps:
            timesteps = np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])[::-1]
        elif steps < WARM_UP + 1:
            raise InputError(
                f"PNDMScheduler: skip_prk_steps=False wants {WARM_UP + 1} steps or more", "take more steps"
            )
        else:
            half = n // steps // 2
            first = np.repeat(rising[-WARM_UP - 1 :], 2) + np.tile([0, half], WARM_UP + 1)
            timesteps = np.concatenate([np.repeat(first[:-1], 2)[1:-1][::-1], rising[:-WARM_UP][::-1]])
        self.timesteps = levels.check_timesteps(timesteps, o)
        self._warm_up = 0 if o.skip_prk_steps else 4 * WARM_UP
        self._stride = n // steps
        self._alpha_bar = tables.alphas_cumprod(o)
        self._final = np.float32(1) if o.set_alpha_to_one else self._alpha_bar[0]
        self._kind = o.prediction_type
        self._calls = 0
        self._history: list[Array] = []  # newest first
        self._first: Array | None = None
        self._slope: Any = 0  # summed over the calls of a Runge-Kutta step

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        t = int(self.timesteps[i])
        if self._calls < self._warm_up:
            return self._runge_kutta(x, pred, t)
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

    def _runge_kutta(self, x: Array, pred: Array, t: int) -> tuple[Array, Array]:
        """Algorithm 1's four calls, each from where the first began. Counted from the generation's own first call.

        That is how diffusers counts, and so does image to image, which begins in the middle of the warm-up.
        """
        part = self._calls % 4
        before = t - (0 if part % 2 else self._stride // 2)
        start = int(self.timesteps[self._calls - part])
        if part == 0:
            self._history = [pred, *self._history[:3]]
            self._first = x
        slope = pred
        if part < 3:
            self._slope = self._slope + (1 / 6 if part == 0 else 1 / 3) * pred
        else:
            slope, self._slope = self._slope + 1 / 6 * pred, 0
        self._calls += 1
        assert self._first is not None
        return self._transfer(self._first, slope, start, before)

    def _transfer(self, x: Array, slope: Array, t: int, before: int) -> tuple[Array, Array]:
        """Equation 9: from ᾱ_t to ᾱ_before along the slope."""
        one = np.float32(1)  # float32 scalars in diffusers' order: the first step of v-prediction divides by 0.07
        bar = self._alpha_bar[t]
        bar_before = self._alpha_bar[before] if before >= 0 else self._final
        alpha, s = np.sqrt(bar), np.sqrt(one - bar)
        epsilon = alpha * slope + s * x if self._kind == "v_prediction" else slope
        denominator = bar * np.sqrt(one - bar_before) + np.sqrt(bar * (one - bar) * bar_before)
        moved = np.sqrt(bar_before / bar) * x - ((bar_before - bar) * epsilon) / denominator
        return moved, (x - s * epsilon) / alpha
