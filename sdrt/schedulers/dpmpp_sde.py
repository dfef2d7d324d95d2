"""DPM++ SDE: k-diffusion's ``sample_dpmpp_sde``.

DPM-Solver++ (Lu et al., arXiv 2211.01095) for the diffusion SDE, single step with r = 1/2: a half step to the middle in
log σ, and the whole step with the x0 that the network sees there. Both add noise, which the two halves have in common:
increments of one Brownian motion W that runs along σ, from the smallest to the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.brownian import Increments
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.euler_ancestral import ending, split
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class DPMSolverSDEOptions(levels.SigmaSchedule):
    """Options of DPMSolverSDEScheduler; names and defaults are diffusers'."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # fewer than the base's
    noise_sampler_seed: int | None = None


class DPMSolverSDE(levels.Halved):
    """diffusers' DPMSolverSDEScheduler: two network calls a step, but one at the last."""

    ABOUT = tables.About(
        "DPMSolverSDEScheduler", "second order, stochastic; fine detail, two network calls a step",
        "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", "2211.01095",
    )  # fmt: skip
    OPTIONS = DPMSolverSDEOptions
    order = 2

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(self.OPTIONS, config, name)
        options.unsupported(
            name,
            rescale_betas_zero_snr=(o.rescale_betas_zero_snr, False),
            noise_sampler_seed=(o.noise_sampler_seed, None),  # each picture's own seed is
        )
        made = levels.exploding(o, plan, name, exact=True)
        logs = np.log(made.training)
        between = levels.sigma_to_t(np.sqrt(made.sigmas[:-1] * made.sigmas[1:]), logs)
        self.timesteps = levels.interleaved(made.timesteps, between)
        self._sigmas = ending(made.sigmas, name)
        # t = -log σ, and σ again from it: diffusers' steps go by these, whose rounding is not σ's own.
        self._t = -rounded(np.log, self._sigmas[:-1])
        self._middles = rounded(np.exp, -(self._t[:-1] + (self._t[1:] - self._t[:-1]) * np.float32(0.5)))
        self._again = rounded(np.exp, -self._t)
        self.init_sigma = levels.start_sigma(self._sigmas, o.timestep_spacing)
        self._kind = o.prediction_type
        self._start: Array | None = None
        self._motion: Increments | None = None

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        k = i // 2
        x0 = tables.denoised(pred, x, self._level(i), self._kind)
        if k == len(self._middles):  # the last step: Euler's, to no noise
            sigma = self._sigmas[k]
            return x + (x - x0) / sigma * -sigma, x0
        if i % 2 == 0:
            self._start, to = x, self._middles[k]
        else:
            to = self._again[k + 1]
        assert self._start is not None
        self._motion = self._motion or noise.brownian(float(self._sigmas[-2]), float(self._sigmas.max()))
        down, up = split(self._again[k], to)
        ancestral = -rounded(np.log, down)
        ratio = rounded(np.exp, -ancestral) / self._again[k]
        moved: Array = ratio * self._start - rounded(np.expm1, self._t[k] - ancestral) * x0
        # Downwards, hence the sign.
        moved -= self._motion(float(to), float(self._again[k])) / np.sqrt(self._again[k] - to) * up
        return moved, x0


def rounded(function: np.ufunc, value: Any) -> Any:
    """log, exp or expm1 in float32, correctly rounded, as numpy's own are not. log(0) is -∞: no noise is left."""
    with np.errstate(divide="ignore"):
        return np.float32(function(np.float64(value)))
