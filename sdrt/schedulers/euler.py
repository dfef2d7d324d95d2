"""Euler: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364.

Algorithm 2 without churn and without its second-order correction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import tables
from sdrt.schedulers.tables import Array, Noise


@dataclass(frozen=True)
class EulerOptions(tables.TrainingSchedule):
    """Options of EulerDiscreteScheduler; names and defaults are diffusers'."""

    timestep_spacing: Literal["leading", "linspace", "trailing"] = "linspace"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, sigma in (("sigma_min", self.sigma_min), ("sigma_max", self.sigma_max)):
            if sigma is not None and not 1e-9 <= sigma <= 1e9:
                raise InputError(f"{name} is {sigma}, expected 1e-9 to 1e9")
        if self.sigma_min is not None and self.sigma_max is not None and self.sigma_min > self.sigma_max:
            raise InputError(f"sigma_min is {self.sigma_min}, more than sigma_max, {self.sigma_max}")


class Euler:
    """diffusers' EulerDiscreteScheduler. Latents are x = x0 + σ·ε; the network sees x / sqrt(σ² + 1)."""

    OPTIONS = EulerOptions

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        name = "EulerDiscreteScheduler"
        o = tables.read_options(self.OPTIONS, config, name)
        tables.check_steps(steps, o)
        tables.unsupported(
            name,
            use_exponential_sigmas=(bool(o.use_exponential_sigmas), False),
            use_beta_sigmas=(bool(o.use_beta_sigmas), False),
            timestep_type=(o.timestep_type, "discrete"),
        )
        n = o.num_train_timesteps
        if o.timestep_spacing == "linspace":
            timesteps = np.linspace(0, n - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
        elif o.timestep_spacing == "leading":
            timesteps = (np.arange(steps) * (n // steps))[::-1].astype(np.float64) + o.steps_offset
        else:
            timesteps = np.arange(n, 0, -n / steps).round() - 1
        tables.check_timesteps(timesteps.astype(np.float32), o)
        training = tables.training_sigmas(tables.alphas_cumprod(o))
        sigmas = np.interp(timesteps, np.arange(n), training)
        if o.interpolation_type == "log_linear":
            if o.use_karras_sigmas is not True:
                raise InputError(
                    f"{name}: interpolation_type='log_linear' gives {steps + 1} sigmas for {steps} steps and is"
                    " supported with use_karras_sigmas only"
                )
            sigmas = training[[-1, 0]].astype(np.float64)
        if o.use_karras_sigmas:
            low = o.sigma_min if o.sigma_min is not None else float(sigmas[-1])
            high = o.sigma_max if o.sigma_max is not None else float(sigmas[0])
            sigmas = tables.karras(low, high, steps)
            timesteps = tables.sigma_to_t(sigmas, np.log(training))
        last = float(training[0]) if o.final_sigmas_type == "sigma_min" else 0.0
        self.timesteps = timesteps.astype(np.float32)
        self._sigmas = np.append(sigmas, last).astype(np.float32)
        top = float(self._sigmas.max())
        self.init_sigma = top if o.timestep_spacing in ("linspace", "trailing") else math.sqrt(top**2 + 1)
        self._kind = o.prediction_type

    def scale(self, x: Array, i: int) -> Array:
        scaled: Array = x / np.sqrt(self._sigmas[i] ** 2 + 1)
        return scaled

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        noisy: Array = x0 + noise * self._sigmas[i]
        return noisy

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        # float32 scalars in diffusers' order of operations: where σ is 4096 (zero terminal SNR), x + d·Δσ cancels, and
        # any other rounding would be another picture.
        sigma, sigma_next = self._sigmas[i], self._sigmas[i + 1]
        if self._kind == "epsilon":
            x0 = x - sigma * pred
        elif self._kind == "v_prediction":
            x0 = pred * (-sigma / np.sqrt(sigma**2 + 1)) + x / (sigma**2 + 1)
        else:
            x0 = pred
        d = (x - x0) / sigma
        return x + d * (sigma_next - sigma), x0
