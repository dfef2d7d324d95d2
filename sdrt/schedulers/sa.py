"""SA-Solver: Xue et al., "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", arXiv 2309.05019.

Algorithm 1: linear multistep methods for the variance-controlled SDE, a predictor (Adams–Bashforth) and a corrector
(Adams–Moulton). τ says how much noise: 0 is the ODE, 1 the diffusion SDE. As in UniPC the corrector costs no call: it
makes the last step again, with the same noise, once the network has seen where that led.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, multistep, options, tables
from sdrt.schedulers.multistep import Scalar, exp
from sdrt.schedulers.tables import Array, Noise, Plan

ONE = np.float32(1)


@dataclass(frozen=True)
class SAOptions(multistep.ClippedOptions):
    """Options of SASolverScheduler; names and defaults are diffusers'."""

    predictor_order: int = 2
    corrector_order: int = 2
    tau_func: None = None  # in diffusers a function of the timestep, which no config can hold
    algorithm_type: Literal["data_prediction", "noise_prediction"] = "data_prediction"

    ALWAYS_ENDS_AT_SIGMA_MIN: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("predictor_order", "corrector_order"):
            if (order := getattr(self, option)) not in (1, 2, 3, 4):
                raise InputError(f"{option}={order} is not supported; supported: 1, 2, 3, 4")


class SASolver(multistep.Preserving):
    """diffusers' SASolverScheduler."""

    ABOUT = tables.About(
        "SASolverScheduler", "multistep with fresh noise in the middle, and a corrector that costs no call",
        "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", "2309.05019",
    )  # fmt: skip
    OPTIONS = SAOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = multistep.read(self.OPTIONS, config, name)
        learned = o.variance_type in ("learned", "learned_range")
        options.unsupported(
            name,
            variance_type=(o.variance_type if learned else None, None),
            rescale_betas_zero_snr=(o.rescale_betas_zero_snr, False),
        )
        self._of_x0 = o.algorithm_type == "data_prediction"
        if not self._of_x0 and (o.thresholding or o.prediction_type == "flow_prediction"):
            asked = "thresholding" if o.thresholding else "prediction_type 'flow_prediction'"
            raise InputError(f"{name}: algorithm_type 'noise_prediction' is not for {asked}")
        levels.check_one(o)
        made = levels.preserving(o, plan, name, lambda_min=o.lambda_min_clipped, flow_shift=o.flow_shift)
        self.timesteps = made.timesteps.astype(np.float32)
        self._levels = multistep.Noise32(made.sigmas, multistep.last_sigma(o, made), bool(o.use_flow_sigmas))
        _check_weights(self._levels.lam, max(o.predictor_order, o.corrector_order), name)
        self._alpha_bar = tables.alphas_cumprod(o)[made.timesteps.astype(int)]
        self._options = o
        self._history: list[Array] = []  # x0, or ε; newest first
        self._last: tuple[Array, Array, int] | None = None  # what the last step began from, its noise, order corrected

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        """By the whole timestep, as in diffusers: not quite the level that the steps of a sigma schedule have there."""
        return tables.diffused(x0, noise, self._alpha_bar[i])

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        o = self._options
        x0, model = self._levels.converted(o, pred, x, i, of_x0=self._of_x0)
        if self._last is not None:
            start, fresh, order = self._last
            x = self._adams(start, i - 1, i, [model, *self._history][:order], fresh)
        self._history = [model, *self._history][: max(o.predictor_order, o.corrector_order - 1)]
        known, left = len(self._history), len(self.timesteps) - i if o.lower_order_final else 4
        fresh = noise()  # drawn where τ is 0 too
        self._last = x, fresh, min(o.corrector_order, known + 1, left + 1)
        return self._adams(x, i, i, self._history[: min(o.predictor_order, known, left)], fresh), x0

    def _adams(self, x: Array, i: int, newest: int, models: list[Array], fresh: Array) -> Array:
        """From level i to i + 1, given the models of levels newest, newest - 1, …

        newest is i to predict (Adams–Bashforth), i + 1 to correct (Adams–Moulton).
        """
        level = self._levels
        tau = 1 if 200 <= self.timesteps[i] <= 800 else 0  # diffusers' default, however many training steps; τ² = τ
        nodes = [level.lam[newest - k] for k in range(len(models))]
        start, end, s, alpha = level.lam[i], level.lam[i + 1], level.s[i + 1], level.alpha[i + 1]
        h, rate = end - start, np.float32(1 + tau)
        if self._of_x0:
            found = weights(nodes, start, end, rate)
            if len(models) == 2:
                bent = _bent(nodes, start, end, rate, corrects=newest > i)
                found = [found[0] + bent, found[1] - bent]
            gain = rate * s * exp(-tau * end)
            moved: Array = (exp(-tau * h) * (s / level.s[i])) * x
            spread = s * np.sqrt(ONE - exp(-2 * tau * h))
        else:
            found = weights(nodes, start, end, -ONE)
            gain = -rate * alpha
            moved = (alpha / level.alpha[i]) * x
            spread = tau * s * np.sqrt(exp(2 * h) - ONE)
        gradient = (gain * found[0]) * models[0]
        for weight, model in zip(found[1:], models[1:], strict=True):
            gradient += (gain * weight) * model
        moved += gradient
        moved += spread * fresh
        return moved


def weights(nodes: list[Scalar], start: Scalar, end: Scalar, rate: Scalar) -> list[Scalar]:
    """For each node λ: the integral from start to end of e^(rate·λ) times the Lagrange polynomial that is 1 there.

    Of polynomials multiplied out, in float32 and in diffusers' order of operations: what of the digits is lost, 1e-4 of
    a weight of third order at 50 steps and 2e-3 of fourth, is part of diffusers' picture.
    """
    u, v = _powers(rate * start), _powers(rate * end)
    top, fall = exp(v[1]), exp(u[1] - v[1])
    moments = [
        top * (_antiderivative(v, k) - _antiderivative(u, k) * fall) / rate ** (k + 1) for k in range(len(nodes))
    ]
    found = []
    for k, own in enumerate(nodes):
        others = nodes[:k] + nodes[k + 1 :]
        below = math.prod((own - other for other in others), start=ONE)
        total = np.float32(0)
        for j, moment in enumerate(reversed(moments)):  # from the highest power
            symmetric = sum(map(math.prod, itertools.combinations(others, j)), start=np.float32(0))
            total += (-symmetric if j % 2 else symmetric) / below * moment
        found.append(total)
    return found


def _check_weights(lam: Array, order: int, name: str) -> None:
    """InputError where rounding makes ``weights`` as wrong as they are large: of fourth order at hundreds of steps.

    Their error is about that of the highest moment, Σ k!/j!·|λ|^j, over the smallest product of differences of nodes.
    """
    order = min(order, len(lam) - 1)
    nodes = np.lib.stride_tricks.sliding_window_view(lam[:-1].astype(np.float64), order)
    with np.errstate(divide="ignore", invalid="ignore"):
        below = np.abs(np.prod(nodes[:, :, None] - nodes[:, None, :] + np.eye(order), axis=2)).min(axis=1)
        k, size = order - 1, np.abs(nodes).max(axis=1)
        moment = sum(math.factorial(k) / math.factorial(j) * size**j for j in range(order))
        wrong = np.max(2.0**-24 * moment / below)
    if not (np.isfinite(lam).all() and wrong < 0.5):
        raise InputError(
            f"{name}: {len(lam) - 1} steps are too near each other for order {order} in float32",
            "take fewer steps, or a lower predictor_order and corrector_order",
        )


def _powers(x: Scalar) -> list[Scalar]:
    return [ONE, x, x * x, x * x * x]


def _antiderivative(powers: list[Scalar], k: int) -> Scalar:
    """Of e^x·x^k, divided by e^x: x^k - k·x^(k-1) + k·(k-1)·x^(k-2) - …"""
    total, factor = powers[k], 1
    for j in reversed(range(k)):
        factor *= -(j + 1)
        total = total + factor * powers[j]
    return total


def _bent(nodes: list[Scalar], start: Scalar, end: Scalar, rate: Scalar, *, corrects: bool) -> Scalar:
    """What the second order takes from the older model and gives to the newer: O(h³), diffusers' for few steps.

    With it e^(rate·λ) counts in the polynomial's slope as it is at the end; the same in UniPC is B(h) = h.
    """
    h = end - start
    slope = (h * rate - ONE + exp(rate * -h)) / (rate * rate)
    if corrects:
        return exp(rate * end) * (h / 2 - slope / h)
    return exp(rate * end) * (h * h / 2 - slope) / (nodes[0] - nodes[1])
