"""TCD: Zheng et al., "Trajectory Consistency Distillation", arXiv 2402.19159, algorithm 4.

Strategic stochastic sampling: each step goes down to a level below the next, s = (1 - η)·t', and is noised up to it.
The paper calls η γ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.lcm import ConsistencyOptions, alpha_bars, distilled
from sdrt.schedulers.tables import Array, Noise, Plan

ETA = 0.0
"""What diffusers' pipelines pass on unless they are told; its class's own default, and the authors' advice, is 0.3."""


class TCD(levels.Tabled):
    """diffusers' TCDScheduler."""

    ABOUT = tables.About(
        "TCDScheduler", "for networks distilled as TCD or Hyper-SD: 1 to 8 steps, eta tells how much noise",
        "Trajectory Consistency Distillation", "2402.19159", frozenset({"timesteps", "eta"}),
    )  # fmt: skip
    OPTIONS = ConsistencyOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(self.OPTIONS, config, name)
        # diffusers' class has these options and does nothing with them.
        options.unsupported(name, thresholding=(o.thresholding, False), clip_sample=(o.clip_sample, False))
        self._t = distilled(o, plan, name)
        self.timesteps = np.array(self._t, np.float32)
        self._alpha_bar = alpha_bars(o, self._t, name)
        self._eta = ETA if plan.eta is None else plan.eta
        self._kind = o.prediction_type

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        one, last = np.float32(1), i + 1 == len(self._t)
        t_next = 0 if last else self._t[i + 1]
        bar, bar_next = self._alpha_bar[self._t[i]], self._alpha_bar[t_next]
        bar_s = self._alpha_bar[math.floor(np.float32(1 - self._eta) * np.float32(t_next))]
        alpha, s = np.sqrt(bar), np.sqrt(one - bar)
        x0 = tables.x0_from(pred, x, alpha, s, self._kind)
        epsilon = pred
        if self._kind == "v_prediction":
            epsilon = alpha * pred + s * x
        elif self._kind == "sample":
            epsilon = (x - alpha * x0) / s
        moved = tables.diffused(x0, epsilon, bar_s)
        if self._eta > 0 and not last:
            left = bar_next / bar_s
            moved = np.sqrt(left) * moved + np.sqrt(one - left) * noise()
        return moved, x0
