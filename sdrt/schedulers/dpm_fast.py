"""DPM-Solver-fast: Lu et al., "DPM-Solver", arXiv 2206.00927, section 3.4; k-diffusion's ``sample_dpm_fast``.

As many network calls as there are steps, spent on solver steps of order 3 (algorithm 2; two at the end are of lower
order), of equal length in λ = -log σ. Each goes to less noise than its end has, and fresh noise up to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.dpmpp_2s_ancestral import down_and_up
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class DPMSolverFastOptions(tables.TrainingSchedule):
    """Options of DPMSolverFastScheduler. It has one spacing: another that a model's config names is passed over."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # fewer than the base's


class DPMSolverFast(levels.Exploding):
    """A class of ours in diffusers' manner: from the training schedule's largest σ to its smallest, where it ends."""

    ABOUT = tables.About(
        "DPMSolverFastScheduler", "third order in equal steps of log σ, with fresh noise (not in diffusers)",
        "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps", "2206.00927",
        frozenset({"eta"}), unused=frozenset({"timestep_spacing", "steps_offset"}),
    )  # fmt: skip
    OPTIONS = DPMSolverFastOptions
    order = 1

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        o = options.read(self.OPTIONS, config, self.ABOUT.diffusers)
        levels.check_steps(plan.steps, o)
        training = tables.training_sigmas(tables.alphas_cumprod(o))
        orders = _orders(plan.steps)
        ends = np.geomspace(float(training[-1]), float(training[0]), len(orders) + 1)
        levels.check_falling(ends, self.ABOUT.diffusers, o.num_train_timesteps)
        down, _ = down_and_up(ends[:-1], ends[1:], 1.0 if plan.eta is None else plan.eta)
        down = np.maximum(down, ends[-1])
        up = np.sqrt(np.maximum(ends[1:] ** 2 - down**2, 0))
        self._calls = [
            _call(float(ends[k]), float(down[k]), float(up[k]), order, j)
            for k, order in enumerate(orders)
            for j in range(order)
        ]
        sigmas = np.array([call.sigma for call in self._calls])
        self._sigmas = sigmas.astype(np.float32)
        self.timesteps = levels.sigma_to_t(sigmas, np.log(training)).astype(np.float32)
        self.init_sigma = float(training[-1])
        self._kind = o.prediction_type
        self._begun: tuple[Array, Array] | None = None  # x0 and the noise in the latents where the solver's step began

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        call = self._calls[i]
        x0 = tables.denoised(pred, x, self._sigmas[i], self._kind)
        noised = x - x0
        if call.bend is None:
            self._begun = x0, noised
        if call.bend is None or self._begun is None:  # or image to image begins within a solver's step: Euler's
            moved: Array = x0 + call.to / call.sigma * noised
        else:
            first, whole = self._begun
            moved = first + call.to / call.start * whole
            moved -= call.to * call.bend * (noised / call.sigma - whole / call.start)
        if call.up is not None:
            self._begun = None
            moved += call.up * noise()  # drawn where up is 0 too, as in k-diffusion
        return moved, x0


@dataclass(frozen=True)
class _Call:
    """One network call of a solver's step."""

    sigma: float
    """Where the network is asked."""
    start: float
    """σ where the solver's step begins."""
    to: float
    """σ that the latents after this call have, but for fresh noise."""
    bend: float | None
    """Weight of the difference to the first ε; None at the first call."""
    up: float | None
    """Fresh noise, at the last call."""


def _orders(calls: int) -> list[int]:
    """The order of each solver's step, which is its network calls: they add up to ``calls``."""
    if calls % 3:
        return [3] * (calls // 3) + [calls % 3]
    return [3] * (calls // 3 - 1) + [2, 1]


def _call(start: float, down: float, up: float, order: int, j: int) -> _Call:
    """Call ``j`` of a step of this order from ``start`` to ``down``: nodes at thirds, or the half, of its h.

    With r·h the way to where it goes, e^(r·h) - 1 = start/to - 1: the paper's algorithms 1 and 2 for α = 1.
    """
    h = math.log(start / down)
    last = j == order - 1
    to = down if last else start * math.exp(-h * (j + 1) / order)
    part = h * (j + 1) / order
    bend = None
    if j:
        grown = math.expm1(part)
        bend = grown if order == 2 else (1.5 if last else 2.0) * (grown / part - 1)
    return _Call(start * math.exp(-h * j / order), start, to, bend, up if last else None)
