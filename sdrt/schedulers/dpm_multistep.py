"""DPM-Solver++ multistep: Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling", arXiv 2211.01095, algorithm 2.

And DPM-Solver, which integrates ε in place of x0: arXiv 2206.00927. Orders 1 to 3; stochastic ones in ``dpm_sde``.
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
class DPMSolverOptions(multistep.MultistepOptions, multistep.ClippedOptions):
    """Options of DPMSolverMultistepScheduler; names and defaults are diffusers'."""

    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    euler_at_final: bool = False
    use_lu_lambdas: bool | None = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class DPMSolverMultistep(multistep.Preserving):
    """diffusers' DPMSolverMultistepScheduler."""

    ABOUT = tables.About(
        "DPMSolverMultistepScheduler", "multistep, second order by default; good pictures in 20 steps",
        "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", "2211.01095",
        frozenset({"timesteps"}),
    )  # fmt: skip
    OPTIONS = DPMSolverOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = multistep.read(self.OPTIONS, config, name)
        multistep.check(o, plan, name)
        algorithm = "dpmsolver++" if o.algorithm_type == "deis" else o.algorithm_type  # as diffusers takes it
        options.unsupported(name, variance_type=(o.variance_type in ("learned", "learned_range"), False))
        if algorithm == "sde-dpmsolver" and o.solver_order == 3:  # diffusers has no formula for it
            raise InputError(f"{name}: solver_order=3 is not supported with algorithm_type 'sde-dpmsolver'")
        self._of_x0 = algorithm.endswith("++")
        self._stochastic = algorithm.startswith("sde-")
        if not self._of_x0 and o.final_sigmas_type == "zero":
            raise InputError(f"{name}: algorithm_type {algorithm!r} wants final_sigmas_type 'sigma_min'")
        if not self._of_x0 and o.prediction_type == "flow_prediction":
            raise InputError(f"{name}: algorithm_type {algorithm!r} is not for prediction_type 'flow_prediction'")
        levels.check_one(o)
        made = levels.preserving(
            o, plan, name, lambda_min=o.lambda_min_clipped, flow_shift=o.flow_shift,
            karras_rounded=o.beta_schedule != "squaredcos_cap_v2",
        )  # fmt: skip
        self.timesteps = made.timesteps.astype(np.float32)
        last = float(made.training[0]) if o.final_sigmas_type == "sigma_min" else 0.0
        self._levels = multistep.Noise32(made.sigmas, last, bool(o.use_flow_sigmas))
        self._midpoint = o.solver_type != "heun"  # other solvers' types are taken for it, as in diffusers
        self._options = o
        self._history: list[Array] = []  # x0, or ε; newest first

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        level = self._levels
        x0, model = self._converted(x, pred, i)
        self._history = [model, *self._history[: self._options.solver_order - 1]]
        h = level.lam[i + 1] - level.lam[i]
        d = self._differences(i, h)
        if self._stochastic:
            fresh = noise()  # drawn at the last step too, where its weight may be 0
            moved = dpm_sde.stepped(
                level, x, i, i + 1, d, fresh, of_x0=self._of_x0, midpoint=self._midpoint and len(d) == 2
            )
        elif self._of_x0:
            moved = multistep.integrated(
                x, level.s[i + 1] / level.s[i], level.alpha[i + 1], -h, d, midpoint=self._midpoint and len(d) == 2
            )
        else:
            moved = multistep.integrated(
                x, level.alpha[i + 1] / level.alpha[i], level.s[i + 1], h, d, midpoint=self._midpoint and len(d) == 2
            )
        return moved, x0

    def _converted(self, x: Array, pred: Array, i: int) -> tuple[Array, Array]:
        """x0, and what is integrated: x0, or ε."""
        return self._levels.converted(self._options, pred, x, i, of_x0=self._of_x0)

    def _order(self, i: int) -> int:
        """How many differences step i has: as many as its history, fewer at the end."""
        o, steps = self._options, len(self.timesteps)
        few = o.lower_order_final and steps < 15
        if i == steps - 1 and (o.euler_at_final or few or o.final_sigmas_type == "zero"):
            return 1
        return min(len(self._history), 2 if few and i == steps - 2 else 3)

    def _differences(self, i: int, h: np.float32) -> tuple[Array, ...]:
        """D0, D1, D2 of the history: the divided differences of the paper's algorithm, appendix B."""
        order, m, lam = self._order(i), self._history, self._levels.lam
        if order == 1 or h == 0:  # no step at all: its end is where it begins
            return (m[0],)
        one = np.float32(1)
        r0 = (lam[i] - lam[i - 1]) / h
        d1 = (one / r0) * (m[0] - m[1])
        if order == 2:
            return m[0], d1
        r1 = (lam[i - 1] - lam[i - 2]) / h
        bent = d1 - (one / r1) * (m[1] - m[2])
        return m[0], d1 + (r0 / (r0 + r1)) * bent, (one / (r0 + r1)) * bent
