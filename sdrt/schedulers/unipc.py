"""UniPC: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models".

arXiv 2302.04867, algorithms 5 and 6 (x0), 7 and 8 (ε). The corrector needs no call of its own: it corrects the latents
that the last step gave, once the network has seen them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, multistep, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class UniPCOptions(multistep.MultistepOptions):
    """Options of UniPCMultistepScheduler; names and defaults are diffusers', which takes other types for bh2."""

    predict_x0: bool = True
    solver_type: Literal["bh1", "bh2", "midpoint", "heun", "logrho"] = "bh2"
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        levels.check_range(sigma_min=self.sigma_min, sigma_max=self.sigma_max)


class UniPC(multistep.Preserving):
    """diffusers' UniPCMultistepScheduler."""

    ABOUT = tables.About(
        "UniPCMultistepScheduler", "multistep with a corrector that costs no call; good pictures in 10 steps",
        "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models", "2302.04867",
        frozenset({"sigmas"}),
    )  # fmt: skip
    OPTIONS = UniPCOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(self.OPTIONS, config, name)
        multistep.check(o, plan, name)
        options.unsupported(name, shift_terminal=(o.shift_terminal, None))
        if not o.predict_x0 and (o.thresholding or o.prediction_type == "flow_prediction"):
            asked = "thresholding" if o.thresholding else "prediction_type 'flow_prediction'"
            raise InputError(f"{name}: predict_x0=False is not for {asked}")
        if o.final_sigmas_type == "zero" and not (o.predict_x0 and (o.lower_order_final or o.solver_order == 1)):
            asked = "lower_order_final=False" if o.predict_x0 else "predict_x0=False"
            raise InputError(f"{name}: {asked} wants final_sigmas_type 'sigma_min'")
        timesteps, sigmas, last = self._spaced(o, plan)
        self.timesteps = np.trunc(timesteps).astype(np.float32)
        self._levels = multistep.Noise32(sigmas, last, bool(o.use_flow_sigmas))
        self._options = o
        self._history: list[Array] = []  # x0, or ε; newest first
        self._last: Array | None = None  # the latents, corrected, that the last step began from
        self._last_order = 0

    def _spaced(self, o: UniPCOptions, plan: Plan) -> tuple[levels.Floats, levels.Floats, float]:
        name, n = self.ABOUT.diffusers, o.num_train_timesteps
        if plan.sigmas is not None and levels.schedules(o) != ["use_flow_sigmas"]:
            raise InputError(f"{name} takes sigmas with use_flow_sigmas only", "leave them out")
        made = levels.preserving(o, Plan(plan.steps), name, low=o.sigma_min, high=o.sigma_max)
        timesteps, sigmas = made.timesteps, made.sigmas
        if o.use_flow_sigmas and o.use_karras_sigmas:
            sigmas = sigmas / (sigmas + 1)
            timesteps = sigmas * n
        elif o.use_flow_sigmas:
            sigmas = np.linspace(1, 1 / n, plan.steps + 1)[:-1] if plan.sigmas is None else plan.sigmas.copy()
            if not 0 < sigmas[-1] <= sigmas[0] <= 1:
                raise InputError(f"{name}: sigmas lie above 0, and not above 1", "leave out the last, 0")
            sigmas = levels.shifted(sigmas, 1.0 if o.flow_shift is None else o.flow_shift)
            if abs(sigmas[0] - 1) < 1e-6:  # α would be 0; as in diffusers
                sigmas[0] -= 1e-6
            timesteps = sigmas * n
            levels.check_falling(sigmas, name, n)
        if o.final_sigmas_type == "zero":
            return timesteps, sigmas, 0.0
        scheduled = [option for option in levels.schedules(o) if option.startswith("use_")]
        return timesteps, sigmas, float(sigmas[-1]) if scheduled else float(made.training[0])

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        o = self._options
        x0, model = self._levels.converted(o, pred, x, i, of_x0=o.predict_x0)
        if self._last is not None and i - 1 not in o.disable_corrector:
            x = self._corrected(self._last, model, i)
        self._history = [model, *self._history[: o.solver_order - 1]]
        order = min(len(self._history), len(self.timesteps) - i if o.lower_order_final else 3)
        self._last, self._last_order = x, order
        return self._predicted(x, i, order), x0

    def _predicted(self, x: Array, i: int, order: int) -> Array:
        """UniP: from level i to i + 1."""
        base, gain, h = self._base(x, i)
        if order == 1 or h == 0:
            return base
        ratios, b, big_b = self._system(i, order, h)
        rhos = [np.float32(0.5)] if order == 2 else _solved(ratios[:-1], b[:-1])
        return self._added(base, gain * big_b, ratios, rhos)

    def _corrected(self, x: Array, model: Array, i: int) -> Array:
        """UniC: from level i - 1, where the last step began, to i again, with what the network said there."""
        order = self._last_order
        base, gain, h = self._base(x, i - 1)
        if h == 0:
            return base
        ratios, b, big_b = self._system(i - 1, order, h)
        rhos = [np.float32(0.5)] if order == 1 else _solved(ratios, b)
        return self._added(base, gain * big_b, ratios, rhos, rhos[-1] * (model - self._history[0]))

    def _base(self, x: Array, i: int) -> tuple[Array, np.float32, np.float32]:
        """The first-order step from level i; what its terms of higher order are multiplied by; and ±h."""
        level, m0 = self._levels, self._history[0]
        h = level.lam[i + 1] - level.lam[i]
        if self._options.predict_x0:
            scale, gain, h = level.s[i + 1] / level.s[i], level.alpha[i + 1], -h
        else:
            scale, gain = level.alpha[i + 1] / level.alpha[i], level.s[i + 1]
        base: Array = scale * x
        base -= (gain * multistep.expm1(h)) * m0
        return base, gain, h

    def _system(self, i: int, order: int, h: np.float32) -> tuple[list[np.float32], list[np.float32], np.float32]:
        """Of a step from level i: the points r (in units of the step; 1 is its end), the right side b, and B(h)."""
        lam, one = self._levels.lam, np.float32(1)
        step = -h if self._options.predict_x0 else h
        ratios = [(lam[i - k] - lam[i]) / step for k in range(1, order)] + [one]
        phi = multistep.expm1(h)
        big_b = h if self._options.solver_type == "bh1" else phi
        b = []
        rest, factorial = phi / h - one, 1
        for k in range(1, order + 1):
            b.append(rest * np.float32(factorial) / big_b)
            factorial *= k + 1
            rest = rest / h - np.float32(1 / factorial)
        return ratios, b, big_b

    def _added(
        self, base: Array, gain: np.float32, ratios: list[np.float32], rhos: list[np.float32], more: Array | None = None
    ) -> Array:
        """base - gain·(Σ ρ_k·D_k + more), D_k the difference quotients of the history."""
        m = self._history
        terms = []
        for k, (ratio, rho) in enumerate(zip(ratios[:-1], rhos, strict=False), 1):
            quotient = m[k] - m[0]
            quotient /= ratio
            quotient *= rho
            terms.append(quotient)
        total = functools.reduce(np.add, terms if more is None else [*terms, more])
        base -= gain * total
        return base


def _solved(ratios: list[np.float32], b: list[np.float32]) -> list[np.float32]:
    """ρ with Σ_k ρ_k · r_k^(j-1) = b_j; in float32, as diffusers solves it."""
    matrix = np.array([[r**j for r in ratios] for j in range(len(ratios))], np.float32)
    return list(np.linalg.solve(matrix, np.array(b, np.float32)))
