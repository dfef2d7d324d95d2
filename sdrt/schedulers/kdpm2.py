"""DPM2: the midpoint method of k-diffusion, inspired by DPM-Solver-2 (Lu et al., arXiv 2206.00927, algorithm 1).

With Karras et al.'s algorithm 2 (arXiv 2206.00364) around it. Two network calls a step, but for the last: the second at
the geometric mean of the step's sigmas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class KDPM2Options(levels.SigmaSchedule):
    """Options of KDPM2DiscreteScheduler; names and defaults are diffusers'."""

    beta_start: float = 0.00085
    beta_end: float = 0.012


class KDPM2(levels.Exploding):
    """diffusers' KDPM2DiscreteScheduler. Latents are x = x0 + σ·ε; the network sees x / sqrt(σ² + 1)."""

    ABOUT = tables.About(
        "KDPM2DiscreteScheduler", "second order, deterministic: a midpoint; two network calls a step",
        "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps", "2206.00927",
    )  # fmt: skip
    OPTIONS = KDPM2Options
    order = 2

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(self.OPTIONS, config, name)
        options.unsupported(
            name,
            rescale_betas_zero_snr=(o.rescale_betas_zero_snr, False),
            prediction_type=(o.prediction_type, o.prediction_type if o.prediction_type != "sample" else "epsilon"),
        )
        made = levels.exploding(o, plan, name, karras_rounded=True)
        sigmas = made.sigmas.astype(np.float32)
        logs = np.log(sigmas)
        between = np.exp(logs[:-1] - (logs[:-1] - logs[1:]) * np.float32(0.5))
        # Call 2k begins step k, call 2k + 1 is at its middle; the last step has none.
        self._sigmas = np.append(levels.interleaved(sigmas, between), np.float32(0))
        middle = levels.sigma_to_t(between.astype(np.float64), np.log(made.training))
        self.timesteps = levels.interleaved(made.timesteps, middle)
        self.init_sigma = levels.start_sigma(sigmas, o.timestep_spacing)
        self._kind = o.prediction_type
        self._start: Array | None = None

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        sigma, following = self._sigmas[i], self._sigmas[i + 1]
        x0 = tables.denoised(pred, x, sigma, self._kind)
        slope = (x - x0) / sigma
        if self._start is None:
            self._start = x
            return x + slope * (following - sigma), x0
        start, self._start = self._start, None
        return start + slope * (following - self._sigmas[i - 1]), x0
