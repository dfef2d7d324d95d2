"""DPM-Solver++ singlestep: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling", arXiv 2211.01095, algorithm 1.

And DPM-Solver, which integrates ε in place of x0: arXiv 2206.00927. A step of order k begins anew from the latents
k - 1 calls ago; calls are flattened, each gives the latents that the next one sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import dpm_sde, levels, multistep, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class SinglestepOptions(multistep.MultistepOptions, multistep.ClippedOptions):
    """Options of DPMSolverSinglestepScheduler; names and defaults are diffusers'.

    It has one spacing, diffusers' "linspace": another that a model's config names is passed over, as in diffusers.
    """

    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class DPMSolverSinglestep(multistep.Preserving):
    """diffusers' DPMSolverSinglestepScheduler."""

    ABOUT = tables.About(
        "DPMSolverSinglestepScheduler", "orders 1 to 3 by turns, each from fresh; for strong guidance",
        "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", "2211.01095",
        frozenset({"timesteps"}), unused=frozenset({"timestep_spacing", "steps_offset"}),
    )  # fmt: skip
    OPTIONS = SinglestepOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        spacing = config.get("timestep_spacing", "")
        theirs = isinstance(spacing, str) and spacing not in levels.OURS
        passed = self.ABOUT.unused if theirs else ()
        o = multistep.read(self.OPTIONS, {k: v for k, v in config.items() if k not in passed}, name)
        multistep.check(o, plan, name)
        algorithm = "dpmsolver++" if o.algorithm_type == "deis" else o.algorithm_type  # as diffusers takes it
        options.unsupported(
            name,
            variance_type=(o.variance_type in ("learned", "learned_range"), False),
            rescale_betas_zero_snr=(o.rescale_betas_zero_snr, False),
        )
        self._of_x0 = algorithm.endswith("++")
        self._stochastic = algorithm.startswith("sde-")
        if not self._of_x0 and o.final_sigmas_type == "zero":
            raise InputError(f"{name}: algorithm_type {algorithm!r} wants final_sigmas_type 'sigma_min'")
        if not self._of_x0 and (o.thresholding or o.prediction_type == "flow_prediction"):
            asked = "thresholding" if o.thresholding else "prediction_type 'flow_prediction'"
            raise InputError(f"{name}: algorithm_type {algorithm!r} is not for {asked}")
        levels.check_one(o)
        made = levels.preserving(o, plan, name, lambda_min=o.lambda_min_clipped, flow_shift=o.flow_shift)
        self.timesteps = made.timesteps.astype(np.float32)
        last = float(made.training[0]) if o.final_sigmas_type == "sigma_min" else 0.0
        self._levels = multistep.Noise32(made.sigmas, last, bool(o.use_flow_sigmas))
        self._midpoint = o.solver_type != "heun"  # other solvers' types are taken for it, as in diffusers
        self._options = o
        self._orders = _orders(o, len(self.timesteps))
        self._history: list[Array] = []  # x0, or ε; newest first
        self._from: Array | None = None

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        o, level = self._options, self._levels
        x0, model = level.converted(o, pred, x, i, of_x0=self._of_x0)
        self._history = [model, *self._history[: o.solver_order - 1]]
        order = min(self._orders[i], len(self._history))
        if order == 1 or self._from is None:
            self._from = x
        start = i - order + 1
        h = level.lam[i + 1] - level.lam[start]
        d = self._differences(i, order, h)
        midpoint = self._midpoint and order == 2
        if self._stochastic:
            fresh = noise()
            return dpm_sde.stepped(level, self._from, start, i + 1, d, fresh, of_x0=True, midpoint=midpoint), x0
        if self._of_x0:
            scale, gain, h = level.s[i + 1] / level.s[start], level.alpha[i + 1], -h
        else:
            scale, gain = level.alpha[i + 1] / level.alpha[start], level.s[i + 1]
        return multistep.integrated(self._from, scale, gain, h, d, midpoint=midpoint), x0

    def _differences(self, i: int, order: int, h: np.float32) -> tuple[Array, ...]:
        """D0, D1, D2 about the first of the ``order`` latest calls."""
        m, lam = self._history, self._levels.lam
        if order == 1:
            return (m[0],)
        one = np.float32(1)
        start = i - order + 1
        r0 = (lam[i] - lam[start]) / h
        if order == 2:
            return m[1], (one / r0) * (m[0] - m[1])
        r1 = (lam[i - 1] - lam[start]) / h
        near, far = (one / r1) * (m[1] - m[2]), (one / r0) * (m[0] - m[2])
        if self._midpoint:
            return m[2], far
        return m[2], (r0 * near - r1 * far) / (r0 - r1), (np.float32(2) * (far - near)) / (r0 - r1)


def _orders(o: SinglestepOptions, steps: int) -> list[int]:
    """The order of each call: 1, 2, … up to the solver's by turns, and lower ones at the end."""
    top = o.solver_order
    turn = list(range(1, top + 1))
    if not (o.lower_order_final or steps % top or o.final_sigmas_type == "zero"):
        return turn * (steps // top)
    if top == 1:
        orders = [1] * steps
    elif steps % top:
        orders = turn * (steps // top) + turn[: steps % top]
    else:
        orders = turn * (steps // top - 1) + ([1, 1] if top == 2 else [1, 2, 1])
    if o.final_sigmas_type == "zero":
        orders[-1] = 1
    return orders
