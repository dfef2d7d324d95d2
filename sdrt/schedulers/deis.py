"""DEIS: Zhang, Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", arXiv 2204.13902.

The ρ-space Adams–Bashforth variant (DEIS-tAB with ε as a polynomial in log ρ, ρ = s/α), orders 1 to 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from sdrt.schedulers import levels, multistep, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class DEISOptions(multistep.MultistepOptions):
    """Options of DEISMultistepScheduler; names and defaults are diffusers', which takes other types for its own."""

    algorithm_type: Literal["deis", "dpmsolver", "dpmsolver++"] = "deis"
    solver_type: Literal["logrho", "midpoint", "heun", "bh1", "bh2"] = "logrho"

    ALWAYS_ENDS_AT_SIGMA_MIN: ClassVar[bool] = True


class DEISMultistep(multistep.Preserving):
    """diffusers' DEISMultistepScheduler."""

    ABOUT = tables.About(
        "DEISMultistepScheduler", "multistep, second order by default; integrates the noise exactly in log ρ",
        "Fast Sampling of Diffusion Models with Exponential Integrator", "2204.13902",
    )  # fmt: skip
    OPTIONS = DEISOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(self.OPTIONS, config, name)
        multistep.check(o, plan, name)
        options.unsupported(name, rescale_betas_zero_snr=(o.rescale_betas_zero_snr, False))
        levels.check_one(o)
        made = levels.preserving(o, plan, name, flow_shift=o.flow_shift)
        self.timesteps = made.timesteps.astype(np.float32)
        self._levels = multistep.Noise32(made.sigmas, multistep.last_sigma(o, made), bool(o.use_flow_sigmas))
        self._options = o
        self._history: list[Array] = []  # ε, newest first

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        o, level, steps = self._options, self._levels, len(self.timesteps)
        x0 = o.limited(tables.x0_from(pred, x, level.alpha[i], level.s[i], o.prediction_type))
        epsilon = (x - level.alpha[i] * x0) / level.s[i]
        self._history = [epsilon, *self._history[: o.solver_order - 1]]
        lower = steps - i if o.lower_order_final and steps < 15 else 3
        order = min(len(self._history), lower)
        if order == 1:
            h = level.lam[i + 1] - level.lam[i]
            return multistep.integrated(x, level.alpha[i + 1] / level.alpha[i], level.s[i + 1], h, (epsilon,)), x0
        rho = level.s / level.alpha
        moved = x / level.alpha[i]
        for weight, e in zip(weights(rho[i + 1], [rho[i - k] for k in range(order)]), self._history, strict=False):
            moved += weight * e
        moved *= level.alpha[i + 1]
        return moved, x0


def weights(end: np.float32, rho: list[np.float32]) -> list[np.float32]:
    """For each of the latest ρ, newest first: the integral from ρ[0] to ``end`` of its Lagrange polynomial in log ρ."""
    logs = [np.log(r) for r in rho]  # numpy's, as in diffusers: not always the correctly rounded one
    found = []
    for k, own in enumerate(logs):
        # In diffusers' cyclic order, which float32 can tell.
        others = [logs[(k + 1 + j) % len(logs)] for j in range(len(logs) - 1)]
        found.append(_antiderivative(end, own, others) - _antiderivative(rho[0], own, others))
    return found


def _antiderivative(t: np.float32, own: np.float32, others: list[np.float32]) -> np.float32:
    """Of Π (log t - c) / (own - c) over the others c."""
    u = np.log(t)
    if len(others) == 1:
        (c,) = others
        return np.float32(t * (-c + u - 1) / (own - c))
    c, d = others
    return np.float32(t * (c * (d - u + 1) - d * u + d + u**2 - 2 * u + 2) / ((own - c) * (own - d)))
