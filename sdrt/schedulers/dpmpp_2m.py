"""DPM-Solver++(2M): Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling", arXiv 2211.01095, algorithm 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class DPMSolverOptions(levels.SigmaSchedule, tables.Thresholding):
    """Options of DPMSolverMultistepScheduler; names and defaults are diffusers'."""

    solver_order: int = 2
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_lu_lambdas: bool | None = False
    use_flow_sigmas: bool | None = False
    flow_shift: float | None = 1.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: Literal["learned", "learned_range", "fixed_small", "fixed_large", "fixed_small_log"] | None = None
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential"] = "exponential"


class DPMSolverPP2M:
    """diffusers' DPMSolverMultistepScheduler, orders 1 and 2. Latents are variance preserving.

    With σ = s/α (k-diffusion's sigma) the paper's λ = log(α/s) is -log σ, so that e^(-h) is just σ_t / σ_s.
    """

    ABOUT = tables.About(
        "DPMSolverMultistepScheduler", "multistep, second order by default; good pictures in 20 steps",
        "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", "2211.01095",
        frozenset({"timesteps"}),
    )  # fmt: skip
    OPTIONS = DPMSolverOptions
    init_sigma = 1.0
    order = 1

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        lowest = config.get("lambda_min_clipped")
        if type(lowest) is float and lowest == -math.inf:  # the default, as diffusers' own config object holds it
            config = {key: value for key, value in config.items() if key != "lambda_min_clipped"}
        o = options.read(self.OPTIONS, config, name)
        options.unsupported(
            name,
            algorithm_type=(o.algorithm_type, "dpmsolver++"),
            use_flow_sigmas=(bool(o.use_flow_sigmas), False),
            variance_type=(o.variance_type in ("learned", "learned_range"), False),
            use_dynamic_shifting=(o.use_dynamic_shifting, False),
        )
        if o.solver_order not in (1, 2):
            raise InputError(f"{name}: solver_order={o.solver_order} is not supported; supported: 1, 2")
        made = levels.preserving(
            o, plan, name, lambda_min=o.lambda_min_clipped, karras_rounded=o.beta_schedule != "squaredcos_cap_v2"
        )
        end = float(made.training[0]) if o.final_sigmas_type == "sigma_min" else 0.0
        self.timesteps = made.timesteps.astype(np.float32)
        self._sigmas = [float(sigma) for sigma in np.append(made.sigmas, end).astype(np.float32)]
        self._options = o
        self._previous: Array | None = None

    def scale(self, x: Array, i: int) -> Array:
        return x

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        sigma = self._sigmas[i]
        alpha = 1 / math.sqrt(sigma**2 + 1)
        return alpha * x0 + (sigma * alpha) * noise

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        o, steps = self._options, len(self.timesteps)
        sigma_s, sigma_t = self._sigmas[i], self._sigmas[i + 1]
        alpha_s, alpha_t = 1 / math.sqrt(sigma_s**2 + 1), 1 / math.sqrt(sigma_t**2 + 1)
        x0 = o.limited(tables.x0_from(pred, x, alpha_s, sigma_s * alpha_s, o.prediction_type))
        first_order = i == steps - 1 and (
            o.euler_at_final or (o.lower_order_final and steps < 15) or o.final_sigmas_type == "zero"
        )
        ratio = sigma_t / sigma_s  # e^(-h)
        shrink = (sigma_t * alpha_t) / (sigma_s * alpha_s)
        target = x0
        if o.solver_order == 2 and self._previous is not None and not first_order:
            h, h_before = math.log(sigma_s / sigma_t), math.log(self._sigmas[i - 1] / sigma_s)
            d1 = (h / h_before) * (x0 - self._previous)
            if o.solver_type == "heun":
                target = x0 - ((ratio - 1.0) / h + 1.0) / (ratio - 1.0) * d1
            else:
                target = x0 + 0.5 * d1
        self._previous = x0
        return shrink * x - (alpha_t * (ratio - 1.0)) * target, x0
