"""Euler: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364.

Algorithm 2 without churn and without its second-order correction.
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
class EulerOptions(levels.SigmaSchedule):
    """Options of EulerDiscreteScheduler; names and defaults are diffusers'."""

    interpolation_type: Literal["linear", "log_linear"] = "linear"
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        levels.check_range(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if self.interpolation_type == "log_linear" and self.timestep_spacing in levels.OURS:
            raise InputError(
                f"interpolation_type='log_linear' and timestep_spacing {self.timestep_spacing!r} exclude each other"
            )


class Euler(levels.Exploding):
    """diffusers' EulerDiscreteScheduler. Latents are x = x0 + σ·ε; the network sees x / sqrt(σ² + 1)."""

    ABOUT = tables.About(
        "EulerDiscreteScheduler", "first order, deterministic; plain, and hard to beat in few steps",
        "Elucidating the Design Space of Diffusion-Based Generative Models", "2206.00364",
        frozenset({"timesteps", "sigmas"}),
    )  # fmt: skip
    OPTIONS = EulerOptions
    order = 1

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        o = options.read(self.OPTIONS, config, self.ABOUT.diffusers)
        continuous = o.timestep_type == "continuous" and o.prediction_type == "v_prediction"
        if plan.sigmas is not None:
            timesteps, sigmas = self._given(o, plan.sigmas)
        else:
            timesteps, sigmas = self._spaced(o, plan, continuous)
        self._sigmas = sigmas.astype(np.float32)
        # All but the end, also where "log_linear" has one more than there are steps.
        logs = np.log(self._sigmas[:-1])
        self.timesteps = np.float32(0.25) * logs if continuous else timesteps.astype(np.float32)
        self.init_sigma = levels.start_sigma(self._sigmas, o.timestep_spacing)
        self._kind = o.prediction_type

    def _given(self, o: EulerOptions, sigmas: levels.Floats) -> tuple[levels.Floats, levels.Floats]:
        """Sigmas that a caller set, the last one included: steps + 1 of them."""
        if sigmas[-1] != 0 or len(sigmas) < 2:
            raise InputError(f"sigmas end at {sigmas[-1]:g}", "append 0, where the last step ends")
        if chosen := levels.schedules(o):
            raise InputError(f"{self.ABOUT.diffusers}: sigmas are given, and {chosen[0]} sets them too", "give up one")
        levels.check_steps(len(sigmas) - 1, o)
        logs = np.log(tables.training_sigmas(tables.alphas_cumprod(o)))
        return levels.sigma_to_t(sigmas[:-1].astype(np.float32).astype(np.float64), logs), sigmas

    def _spaced(self, o: EulerOptions, plan: Plan, continuous: bool) -> tuple[levels.Floats, levels.Floats]:
        name = self.ABOUT.diffusers
        if plan.timesteps is not None and continuous:
            raise InputError(
                f"{name}: timesteps are given, and timestep_type 'continuous' sets them too", "give up one"
            )
        low, high = o.sigma_min, o.sigma_max
        log_linear = o.interpolation_type == "log_linear"
        if log_linear:  # σ over the whole training schedule, whatever the spacing
            ends = tables.training_sigmas(tables.alphas_cumprod(o))[[0, -1]]
            low, high = float(ends[0]) if low is None else low, float(ends[1]) if high is None else high
        made = levels.exploding(o, plan, name, low=low, high=high)
        sigmas = made.sigmas
        if log_linear and not levels.schedules(o):
            # One more than there are steps: the last step ends there, not at the final sigma. So it is in diffusers.
            logs = np.log(made.training)
            sigmas = np.exp(tables.linspace(logs[-1], logs[0], plan.steps + 1).astype(np.float64))
        last = float(made.training[0]) if o.final_sigmas_type == "sigma_min" else 0.0
        return made.timesteps, np.append(sigmas, last)

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        # float32 scalars in diffusers' order of operations: where σ is 4096 (zero terminal SNR), x + d·Δσ cancels, and
        # any other rounding would be another picture.
        sigma, sigma_next = self._sigmas[i], self._sigmas[i + 1]
        x0 = tables.denoised(pred, x, sigma, self._kind)
        d = (x - x0) / sigma
        return x + d * (sigma_next - sigma), x0
