"""Rectified flow by Heun's method: Karras et al., arXiv 2206.00364, algorithm 1, on the flow of arXiv 2403.03206.

An Euler step, the slope at its end, and the step again with the mean of both. Two network calls a step, but the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import flow_match, levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class FlowHeunOptions(tables.Options):
    """Options of FlowMatchHeunDiscreteScheduler; names and defaults are diffusers'."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-3 <= self.shift <= 1e3:
            raise InputError(f"shift is {self.shift}, expected 0.001 to 1000")


class FlowMatchHeun(flow_match.Mixed):
    """diffusers' FlowMatchHeunDiscreteScheduler."""

    ABOUT = tables.About(
        "FlowMatchHeunDiscreteScheduler", "second order, for models that learned a flow; two network calls a step",
        "Elucidating the Design Space of Diffusion-Based Generative Models", "2206.00364",
    )  # fmt: skip
    OPTIONS = FlowHeunOptions
    order = 2

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        flow_match.check_prediction(config, name)
        o = options.read(self.OPTIONS, config, name)
        levels.check_steps(plan.steps, o)
        sigmas = levels.shifted(flow_match.unshifted(o.shift, plan.steps, o.num_train_timesteps), o.shift)
        levels.check_falling(sigmas, name, o.num_train_timesteps)
        # Call 0 is the first step's; calls 2k - 1 and 2k are at the end of step k, and at the beginning of the next.
        own = np.repeat(sigmas.astype(np.float32), 2)[1:]
        self._sigmas = np.append(own, np.float32(0))
        self.timesteps = own * np.float32(o.num_train_timesteps)
        self._begun: tuple[Array, Array] | None = None  # latents and slope where the step began

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        sigma = self._sigmas[i]
        x0 = x - pred * sigma
        slope = (x - x0) / sigma  # the network's output again, but for diffusers' rounding
        if self._begun is None:
            self._begun = x, slope
            return x + slope * (self._sigmas[i + 1] - sigma), x0
        (start, first), self._begun = self._begun, None
        return start + (np.float32(0.5) * (first + slope)) * (sigma - self._sigmas[i - 1]), x0
