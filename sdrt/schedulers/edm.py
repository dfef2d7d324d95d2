"""Euler for networks trained as Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models".

arXiv 2206.00364, algorithm 2 without churn and without its second-order correction, with the preconditioning of
table 1: the network is given c_in·x and c_noise = log(σ)/4, and x0 = c_skip·x + c_out·output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class EDMOptions(tables.Options):
    """Options that EDM's classes share; names and defaults are diffusers'. No betas: σ is all that there is."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rho: float = 7.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        levels.check_range(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        levels.check_range(sigma_data=self.sigma_data)
        if not self.sigma_min < self.sigma_max:
            raise InputError(f"sigma_min is {self.sigma_min}, expected less than sigma_max, {self.sigma_max}")
        if not 0.1 <= self.rho <= 100:
            raise InputError(f"rho is {self.rho}, expected 0.1 to 100")


class Preconditioned:
    """What EDM's classes share: levels of noise, and what the network is given and means."""

    order = 1

    def __init__(self, o: EDMOptions, sigmas: Array, last: float) -> None:
        levels.check_falling(sigmas.astype(np.float64), type(self).__name__, o.num_train_timesteps)
        self._sigmas = np.append(sigmas, last).astype(np.float32)
        self.timesteps = np.float32(0.25) * np.log(sigmas)
        self.init_sigma = math.sqrt(o.sigma_max**2 + 1)
        self._data = np.float32(o.sigma_data)
        self._sign = np.float32(1 if o.prediction_type == "epsilon" else -1)

    @property
    def sigmas(self) -> Array:
        return self._sigmas[:-1]

    def scale(self, x: Array, i: int) -> Array:
        sigma = self._sigmas[i]
        scaled: Array = x * (np.float32(1) / np.sqrt(sigma * sigma + self._data * self._data))
        return scaled

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        noisy: Array = x0 + noise * self._sigmas[i]
        return noisy

    def _denoised(self, x: Array, pred: Array, i: int) -> Array:
        """x0 = c_skip·x + c_out·output."""
        sigma, data = self._sigmas[i], self._data
        whole = sigma * sigma + data * data
        x0: Array = (data * data / whole) * x + (self._sign * sigma * data / np.sqrt(whole)) * pred
        return x0


class EDMEuler(Preconditioned):
    """diffusers' EDMEulerScheduler. What it calls custom sigmas are places in the schedule, from 0 to 1: not taken."""

    ABOUT = tables.About(
        "EDMEulerScheduler", "Euler for networks trained as EDM (Playground v2.5, CosXL)",
        "Elucidating the Design Space of Diffusion-Based Generative Models", "2206.00364",
    )  # fmt: skip
    OPTIONS = EDMOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        o = options.read(self.OPTIONS, config, self.ABOUT.diffusers)
        levels.check_steps(plan.steps, o)
        if o.sigma_schedule == "karras":
            sigmas = karras(o, np.linspace(0, 1, plan.steps)).astype(np.float32)
        else:
            sigmas = exponential(o, plan.steps)
        super().__init__(o, sigmas, float(sigmas[-1]) if o.final_sigmas_type == "sigma_min" else 0.0)

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        sigma = self._sigmas[i]
        x0 = self._denoised(x, pred, i)
        return x + (x - x0) / sigma * (self._sigmas[i + 1] - sigma), x0


def karras(o: EDMOptions, ramp: Array) -> Array:
    """σ at places 0 to 1 of the schedule, of ramp's dtype: equation 5."""
    low, high = o.sigma_min ** (1 / o.rho), o.sigma_max ** (1 / o.rho)
    base = ramp.dtype.type(high) + ramp * ramp.dtype.type(low - high)
    sigmas: Array = (base.astype(np.float64) ** o.rho).astype(ramp.dtype)
    return sigmas


def exponential(o: EDMOptions, steps: int) -> Array:
    """f32[steps], falling in equal steps of log σ."""
    logs = tables.linspace(math.log(o.sigma_min), math.log(o.sigma_max), steps)
    sigmas: Array = np.exp(logs.astype(np.float64)).astype(np.float32)[::-1]
    return sigmas
