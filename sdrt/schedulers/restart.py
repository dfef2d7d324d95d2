"""Restart: Xu et al., "Restart Sampling for Improving Generative Processes", arXiv 2306.14878, algorithm 2.

Heun's method down to little noise, then fresh noise back up to a middle level, and down again: what the steps got wrong
shrinks with each round. How often and where is A1111's choice (``restart_sampler``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan

LOW, HIGH = 0.1, 2.0
"""σ where a round ends and begins: the levels nearest to these. Above 0, where A1111 turns back at 0 if that is nearer:
in 20 to 24 steps of a schedule whose last level is above 0.2."""


@dataclass(frozen=True)
class RestartOptions(levels.SigmaSchedule):
    """Options of RestartScheduler; named as those of diffusers' classes of k-diffusion's family."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # fewer than the base's


class Restart(levels.Exploding):
    """A class of ours in diffusers' manner: two network calls a step, but one at the last.

    From 20 steps on, Karras sigmas between the ends of the schedule that the options name; below there is no restart.
    """

    ABOUT = tables.About(
        "RestartScheduler", "Heun's method, and from 20 steps on back to more noise and down again (not in diffusers)",
        "Restart Sampling for Improving Generative Processes", "2306.14878",
    )  # fmt: skip
    OPTIONS = RestartOptions
    order = 2

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        o = options.read(self.OPTIONS, config, self.ABOUT.diffusers)
        made = levels.exploding(o, plan, self.ABOUT.diffusers)
        self._from, self._to = _steps(made.sigmas)
        calls = np.stack([self._from, self._to], axis=1).ravel()[:-1]
        self._sigmas = calls.astype(np.float32)
        self.timesteps = levels.sigma_to_t(calls, np.log(made.training)).astype(np.float32)
        self.init_sigma = levels.start_sigma(self._sigmas, o.timestep_spacing)
        self._kind = o.prediction_type
        self._begun: tuple[Array, Array] | None = None  # latents and slope where the step began

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        k = i // 2
        length = float(self._to[k] - self._from[k])
        x0 = tables.denoised(pred, x, self._sigmas[i], self._kind)
        slope = (x - x0) / self._sigmas[i]
        if i % 2 == 0:
            self._begun = x, slope
            return x + length * slope, x0
        assert self._begun is not None
        start, first = self._begun
        moved: Array = start + length * (first + slope) / 2
        low, high = float(self._to[k]), float(self._from[k + 1])
        if high > low:
            moved += ((high - low) * (high + low)) ** 0.5 * noise()
        return moved, x0


def _steps(sigmas: levels.Floats) -> tuple[levels.Floats, levels.Floats]:
    """Where each step begins and ends, f64[steps] each; A1111's numbers of rounds and of their steps."""
    count = len(sigmas)
    if count < 20:
        return sigmas, np.append(sigmas[1:], 0.0)
    rounds, of_round = (2, count // 4) if count >= 36 else (1, 9)
    main = levels.karras(float(sigmas[-1]), float(sigmas[0]), count - rounds * of_round)
    low, high = (int(np.abs(main - level).argmin()) for level in (LOW, HIGH))
    again = levels.karras(float(main[low]), float(main[high]), of_round + 1)
    rounds = rounds if high < low else 0
    begin = np.concatenate([main[:low], *[again[:-1]] * rounds, main[low:]])
    end = np.concatenate([main[1 : low + 1], *[again[1:]] * rounds, main[low + 1 :], [0.0]])
    return begin, end
