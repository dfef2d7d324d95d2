"""DPM++ 2S ancestral: k-diffusion's ``sample_dpmpp_2s_ancestral``, which diffusers does not have.

DPM-Solver++(2S) of Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling", arXiv 2211.01095, algorithm 1 with
r = 1/2, to the lower level of an ancestral step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.euler_ancestral import ending
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class DPMSolver2SAncestralOptions(levels.SigmaSchedule):
    """Options of DPMSolver2SAncestralScheduler; named as those of diffusers' classes of k-diffusion's family."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # fewer than the base's


class DPMSolver2SAncestral(levels.Halved):
    """A class of ours in diffusers' manner: two network calls a step, but one at the last."""

    ABOUT = tables.About(
        "DPMSolver2SAncestralScheduler", "DPM-Solver++ with fresh noise; two network calls a step (not in diffusers)",
        "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", "2211.01095",
        frozenset({"timesteps", "eta"}),
    )  # fmt: skip
    OPTIONS = DPMSolver2SAncestralOptions
    order = 2

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        o = options.read(self.OPTIONS, config, self.ABOUT.diffusers)
        made = levels.exploding(o, plan, self.ABOUT.diffusers)
        self._sigmas = ending(made.sigmas, self.ABOUT.diffusers)
        sigma, after = self._sigmas[:-2].astype(np.float64), self._sigmas[1:-1].astype(np.float64)
        self._down, self._up = down_and_up(sigma, after, 1.0 if plan.eta is None else plan.eta)
        self._middles = np.sqrt(sigma * self._down)
        between = levels.sigma_to_t(self._middles, np.log(made.training))
        self.timesteps = levels.interleaved(made.timesteps, between)
        self.init_sigma = levels.start_sigma(self._sigmas, o.timestep_spacing)
        self._kind = o.prediction_type
        self._start: Array | None = None

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        """With t = -log σ, e^(-h) is the ratio of the two noise levels: (σ'/σ)·x + (1 - σ'/σ)·x0."""
        k = i // 2
        sigma = self._sigmas[k]
        x0 = tables.denoised(pred, x, self._level(i), self._kind)
        if i % 2 == 0:
            self._start = x
            if k == len(self._middles):  # the last step: Euler's, to no noise
                return x0.copy(), x0
            ratio = float(self._middles[k] / sigma)
            return ratio * x + (1 - ratio) * x0, x0
        assert self._start is not None
        ratio = float(self._down[k] / sigma)
        moved: Array = ratio * self._start + (1 - ratio) * x0
        moved += float(self._up[k]) * noise()  # as k-diffusion draws: whatever eta is
        return moved, x0


def down_and_up(sigma: levels.Floats, after: levels.Floats, eta: float) -> tuple[levels.Floats, levels.Floats]:
    """(down, up) of each step, down² + up² = after²; without the difference of squares that k-diffusion takes."""
    left = (after / sigma) ** 2
    down: levels.Floats = after * np.sqrt((1 - eta**2) + eta**2 * left)
    up: levels.Floats = eta * after * np.sqrt(np.maximum(1 - left, 0))
    return down, up
