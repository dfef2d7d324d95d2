"""What the variance-preserving solvers share: options, α and s of a noise level, and the exponential integrator's step.

Latents are x = α·x0 + s·ε, with σ = s/α and λ = log(α/s) = -log σ. Scalars are float32 and in diffusers' order of
operations: third-order weights such as ((e^h - 1 - h) / h² - 1/2) lose half of float32's digits, so that exact ones
would be another picture than diffusers'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import AnyPrediction, Array, Plan

Scalar = np.float32


@dataclass(frozen=True)
class PreservingOptions(levels.SigmaSchedule, tables.Thresholding):
    """Options that all of these solvers share; names and defaults are diffusers'."""

    prediction_type: AnyPrediction = "epsilon"  # type: ignore[assignment] # more than the base's
    lower_order_final: bool = True
    use_flow_sigmas: bool | None = False
    flow_shift: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flow_shift is not None and not 1e-3 <= self.flow_shift <= 1e3:
            raise InputError(f"flow_shift is {self.flow_shift}, expected 0.001 to 1000")
        if self.prediction_type == "flow_prediction" and not self.use_flow_sigmas:
            raise InputError("prediction_type 'flow_prediction' wants use_flow_sigmas")


@dataclass(frozen=True)
class MultistepOptions(PreservingOptions):
    """Options that DPM-Solver, UniPC and DEIS share."""

    solver_order: int = 2
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential"] = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_order not in (1, 2, 3):
            raise InputError(f"solver_order={self.solver_order} is not supported; supported: 1, 2, 3")


@dataclass(frozen=True)
class ClippedOptions(PreservingOptions):
    """Options that the DPM-Solvers and SA-Solver share."""

    lambda_min_clipped: float = -math.inf
    variance_type: Literal["learned", "learned_range", "fixed_small", "fixed_large", "fixed_small_log"] | None = None


def read(kind: type[options.O], config: Mapping[str, Any], name: str) -> options.O:
    """Options with -∞ for lambda_min_clipped, the default, as diffusers' own config object holds it."""
    lowest = config.get("lambda_min_clipped")
    if type(lowest) is float and lowest == -math.inf:
        config = {key: value for key, value in config.items() if key != "lambda_min_clipped"}
    return options.read(kind, config, name)


def last_sigma(o: PreservingOptions, made: levels.Levels) -> float:
    """Where the last step ends, for classes that end above 0.

    With diffusers' own sigma schedules it leads nowhere, as there: its end is its beginning.
    """
    nowhere = any(option.startswith("use_") for option in levels.schedules(o))
    return float(made.sigmas[-1]) if nowhere else min(float(made.training[0]), float(made.sigmas[-1]))


def check(o: MultistepOptions, plan: Plan, name: str) -> None:
    """InputError for what none of these solvers does."""
    options.unsupported(name, use_dynamic_shifting=(o.use_dynamic_shifting, False))
    if plan.timesteps is not None and o.use_flow_sigmas:
        raise InputError(f"{name}: timesteps are given, and use_flow_sigmas sets them too", "give up one")


class Noise32:
    """α, s and λ in float32 of each noise level of a generation: σ f64[steps], and the last one."""

    def __init__(self, sigmas: levels.Floats, last: float, flow: bool) -> None:
        self.sigma = np.append(sigmas, last).astype(np.float32)
        one = np.float32(1)
        if flow and not self.sigma.max() < 1:
            raise InputError(f"a flow's noise level is {self.sigma.max():g}, expected less than 1", "use other betas")
        self.alpha = one - self.sigma if flow else one / np.sqrt(self.sigma**2 + one)
        self.s = self.sigma if flow else self.sigma * self.alpha
        self.lam = np.array([log(a) - log(s) for a, s in zip(self.alpha, self.s, strict=True)], np.float32)

    def noisy(self, x0: Array, noise: Array, i: int) -> Array:
        """x0 with the noise of level i."""
        noisy: Array = self.alpha[i] * x0 + self.s[i] * noise
        return noisy

    def epsilon(self, pred: Array, x: Array, i: int, kind: str) -> Array:
        """ε of level i from the network's output."""
        epsilon = pred
        if kind == "v_prediction":
            epsilon = self.alpha[i] * pred + self.s[i] * x
        elif kind == "sample":
            epsilon = (x - self.alpha[i] * pred) / self.s[i]
        return epsilon

    def x0(self, epsilon: Array, x: Array, i: int) -> Array:
        """x0 of level i, given ε."""
        x0: Array = (x - self.s[i] * epsilon) / self.alpha[i]
        return x0

    def converted(self, o: PreservingOptions, pred: Array, x: Array, i: int, *, of_x0: bool) -> tuple[Array, Array]:
        """x0, and what is integrated: x0, or ε; from the network's output at level i."""
        if of_x0:
            x0 = o.limited(tables.x0_from(pred, x, self.alpha[i], self.s[i], o.prediction_type))
            return x0, x0
        epsilon = self.epsilon(pred, x, i, o.prediction_type)
        x0 = self.x0(epsilon, x, i)
        if o.thresholding:
            x0 = o.limited(x0)
            epsilon = (x - self.alpha[i] * x0) / self.s[i]
        return x0, epsilon


class Preserving:
    """What these solvers share. ``_levels``: those of the calls, and where the last one's step ends."""

    init_sigma = 1.0
    order = 1
    _levels: Noise32

    @property
    def sigmas(self) -> Array:
        return self._levels.sigma[:-1]

    def scale(self, x: Array, i: int) -> Array:
        return x

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        return self._levels.noisy(x0, noise, i)


def log(value: Any) -> Scalar:
    """log in float32, correctly rounded; -∞ for 0."""
    return np.float32(math.log(value) if value > 0 else -math.inf)


def exp(value: Any) -> Scalar:
    """e^value in float32, correctly rounded."""
    return np.float32(math.exp(value))


def expm1(value: Any) -> Scalar:
    """e^value - 1 in float32, correctly rounded."""
    return np.float32(math.expm1(value))


def integrated(
    x: Array, scale: Scalar, gain: Scalar, h: Scalar, d: tuple[Array, ...], *, midpoint: bool = False
) -> Array:
    """The exponential integrator's step: scale·x - gain·(φ1·D0 + φ2·D1 + φ3·D2), with as many D as are given.

    For x0 (DPM-Solver++, arXiv 2211.01095): scale = s_t/s_s, gain = α_t and h is minus the step of λ; for ε
    (DPM-Solver, arXiv 2206.00927): scale = α_t/α_s, gain = s_t, and h is the step. φ1 = e^h - 1; φ2 = φ1/h - 1, or
    φ1/2 for ``midpoint``; φ3 = (φ1 - h)/h² - 1/2.
    """
    phi1 = exp(h) - np.float32(1)
    moved: Array = scale * x
    moved -= (gain * phi1) * d[0]
    if len(d) > 1:
        weight = np.float32(0.5) * (gain * phi1) if midpoint else gain * (phi1 / h - np.float32(1))
        moved -= weight * d[1]
    if len(d) > 2:
        moved -= (gain * ((phi1 - h) / h**2 - np.float32(0.5))) * d[2]
    return moved
