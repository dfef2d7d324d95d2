"""DPM-Solver++ multistep (Lu et al., arXiv 2211.01095) for networks trained as EDM (Karras et al., 2206.00364)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import edm, levels, multistep, options, tables
from sdrt.schedulers.dpm_multistep import DPMSolverMultistep
from sdrt.schedulers.tables import Array, Plan


@dataclass(frozen=True)
class EDMDPMOptions(edm.EDMOptions):
    """Options of EDMDPMSolverMultistepScheduler; names and defaults are diffusers'."""

    solver_order: int = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # The same checks as those of the classes that have betas.
        tables.Thresholding(
            dynamic_thresholding_ratio=self.dynamic_thresholding_ratio, sample_max_value=self.sample_max_value
        )
        if self.solver_order not in (1, 2, 3):
            raise InputError(f"solver_order={self.solver_order} is not supported; supported: 1, 2, 3")


class Exploding(multistep.Noise32):
    """Levels with α = 1: x = x0 + σ·ε."""

    def __init__(self, sigmas: Array) -> None:
        self.sigma = self.s = sigmas
        self.alpha = np.ones_like(sigmas)
        self.lam = np.array([-multistep.log(sigma) for sigma in sigmas], np.float32)


class EDMDPMSolverMultistep(edm.Preconditioned, DPMSolverMultistep):
    """diffusers' EDMDPMSolverMultistepScheduler: DPMSolverMultistep's steps, EDM's levels and network."""

    ABOUT = tables.About(
        "EDMDPMSolverMultistepScheduler", "DPM-Solver++ for networks trained as EDM (Playground v2.5, CosXL)",
        "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", "2211.01095",
    )  # fmt: skip
    OPTIONS = EDMDPMOptions  # type: ignore[assignment] # other levels, other options

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(EDMDPMOptions, config, name)
        if o.algorithm_type == "sde-dpmsolver++" and o.solver_order == 3:  # diffusers has no formula for it
            raise InputError(f"{name}: solver_order=3 is not supported with algorithm_type 'sde-dpmsolver++'")
        levels.check_steps(plan.steps, o)
        if o.sigma_schedule == "karras":
            sigmas = edm.karras(o, tables.linspace(0, 1, plan.steps))
        else:
            sigmas = edm.exponential(o, plan.steps)
        super().__init__(o, sigmas, o.sigma_min if o.final_sigmas_type == "sigma_min" else 0.0)
        self._levels = Exploding(self._sigmas)
        self._of_x0 = True
        self._stochastic = o.algorithm_type == "sde-dpmsolver++"
        self._midpoint = o.solver_type != "heun"  # other solvers' types are taken for it, as in diffusers
        self._options = o  # type: ignore[assignment] # has what is asked for
        self._history = []

    def _converted(self, x: Array, pred: Array, i: int) -> tuple[Array, Array]:
        o = self._options
        x0 = self._denoised(x, pred, i)
        if o.thresholding:
            x0 = tables.thresholded(x0, o.dynamic_thresholding_ratio, o.sample_max_value)
        return x0, x0
