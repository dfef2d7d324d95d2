"""Rectified flow by Euler's method: Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206.

Latents are x = (1 - σ)·x0 + σ·ε with 0 ≤ σ ≤ 1; the network says v = ε - x0 = dx/dσ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError, quoted
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class FlowOptions(tables.Options):
    """Options of FlowMatchEulerDiscreteScheduler; names and defaults are diffusers'."""

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-3 <= self.shift <= 1e3:
            raise InputError(f"shift is {self.shift}, expected 0.001 to 1000")
        if self.shift_terminal is not None and not 0 <= self.shift_terminal < 1:
            raise InputError(f"shift_terminal is {self.shift_terminal}, expected 0 to less than 1")
        flags = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        if len(chosen := [flag for flag in flags if getattr(self, flag)]) > 1:
            raise InputError(f"only one of {', '.join(chosen)} can be used", "set the others to false")


class Mixed:
    """What solvers of flows share: latents σ·ε + (1 - σ)·x0. ``_sigmas``: f32[calls + 1], where each call is."""

    init_sigma = 1.0
    _sigmas: Array

    @property
    def sigmas(self) -> Array:
        return self._sigmas[:-1]

    def scale(self, x: Array, i: int) -> Array:
        return x

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        noisy: Array = self._sigmas[i] * noise + (np.float32(1) - self._sigmas[i]) * x0
        return noisy


class FlowMatchEuler(Mixed):
    """diffusers' FlowMatchEulerDiscreteScheduler."""

    ABOUT = tables.About(
        "FlowMatchEulerDiscreteScheduler", "first order, for models that learned a flow",
        "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", "2403.03206",
        frozenset({"timesteps", "sigmas"}),
    )  # fmt: skip
    OPTIONS = FlowOptions
    order = 1

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(self.OPTIONS, config, name)
        options.unsupported(
            name,
            use_dynamic_shifting=(o.use_dynamic_shifting, False),
            invert_sigmas=(o.invert_sigmas, False),
        )
        check_prediction(config, name)
        levels.check_steps(plan.steps, o)
        sigmas = self._sigmas_of(o, plan)
        self._sigmas = np.append(sigmas, 0.0).astype(np.float32)
        self._stochastic = o.stochastic_sampling
        levels.check_falling(self._sigmas.astype(np.float64), name, o.num_train_timesteps)
        self.timesteps = self._sigmas[:-1] * np.float32(o.num_train_timesteps)
        if plan.timesteps is not None:
            self.timesteps = plan.timesteps.astype(np.float32)

    def _sigmas_of(self, o: FlowOptions, plan: Plan) -> levels.Floats:
        n = o.num_train_timesteps
        if plan.sigmas is not None:
            sigmas = plan.sigmas.astype(np.float32).astype(np.float64)
        elif plan.timesteps is not None:
            sigmas = plan.timesteps.astype(np.float32).astype(np.float64) / n
        else:
            sigmas = unshifted(o.shift, plan.steps, n)
        if not 0 < sigmas[-1] <= sigmas[0] <= 1:
            raise InputError(
                f"{self.ABOUT.diffusers}: sigmas lie above 0, and not above 1",
                "leave out the last, 0, which is where the last step ends",
            )
        sigmas = levels.shifted(sigmas, o.shift)
        if o.shift_terminal:
            if sigmas[-1] == 1:
                raise InputError(f"{self.ABOUT.diffusers}: shift_terminal wants sigmas below 1", "take more steps")
            sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - o.shift_terminal))
        return levels.named(o, float(sigmas[-1]), float(sigmas[0]), plan.steps, sigmas)

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        sigma, after = self._sigmas[i], self._sigmas[i + 1]
        x0 = x - sigma * pred
        if self._stochastic:  # x0 noised anew
            return (np.float32(1) - after) * x0 + after * noise(), x0
        return x + (after - sigma) * pred, x0


def check_prediction(config: Mapping[str, Any], name: str) -> None:
    """InputError for a model whose config says that it predicts something else than a flow."""
    kind = config.get("prediction_type", "flow_prediction")
    if kind != "flow_prediction":
        raise InputError(
            f"{name}: the model's prediction_type is {quoted(kind)}, and this is for flows", "choose another scheduler"
        )


def unshifted(shift: float, steps: int, n: int) -> levels.Floats:
    """f64[steps], falling: equal steps between the ends of the training schedule.

    Those are shifted already, and what lies between is shifted once more afterwards: as in diffusers.
    """
    ends = np.array([n, 1], np.float32) / np.float32(n)
    ends = np.float32(shift) * ends / (np.float32(1) + np.float32(shift - 1) * ends)
    return np.linspace(float(ends[0]) * n, float(ends[1]) * n, steps) / n
