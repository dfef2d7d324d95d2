"""Heun: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364.

Algorithm 2 without churn: an Euler step, the slope at its end, and the step again with the mean of both slopes. Two
network calls a step, but for the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class HeunOptions(levels.SigmaSchedule):
    """Options of HeunDiscreteScheduler; names and defaults are diffusers'."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp"] = "linear"  # type: ignore[assignment] # more than the base's
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        tables.check_clip_range(self.clip_sample_range)


class Heun(levels.Exploding):
    """diffusers' HeunDiscreteScheduler. Latents are x = x0 + σ·ε; the network sees x / sqrt(σ² + 1)."""

    ABOUT = tables.About(
        "HeunDiscreteScheduler", "second order, deterministic; two network calls a step",
        "Elucidating the Design Space of Diffusion-Based Generative Models", "2206.00364", frozenset({"timesteps"}),
    )  # fmt: skip
    OPTIONS = HeunOptions
    order = 2

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(self.OPTIONS, config, name)
        options.unsupported(name, rescale_betas_zero_snr=(o.rescale_betas_zero_snr, False))
        made = levels.exploding(o, plan, name)
        sigmas = made.sigmas.astype(np.float32)
        # Call 0 is the first step's; calls 2k - 1 and 2k are at the end of step k, and at the beginning of the next.
        self.timesteps = np.repeat(made.timesteps.astype(np.float32), 2)[1:]
        self._sigmas = np.append(np.repeat(sigmas, 2)[1:], np.float32(0))
        self.init_sigma = levels.start_sigma(sigmas, o.timestep_spacing)
        self._options = o
        self._begun: tuple[Array, Array] | None = None  # latents and slope where the step began

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        o, sigma = self._options, self._sigmas[i]
        x0 = tables.denoised(pred, x, sigma, o.prediction_type)
        if o.clip_sample:
            x0 = np.clip(x0, -o.clip_sample_range, o.clip_sample_range)
        slope = (x - x0) / sigma
        if self._begun is None:
            self._begun = x, slope
            return x + slope * (self._sigmas[i + 1] - sigma), x0
        (start, first), self._begun = self._begun, None
        return start + ((first + slope) / 2) * (sigma - self._sigmas[i - 1]), x0
