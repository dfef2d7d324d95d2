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
"""σ where a round ends and begins, near enough."""


@dataclass(frozen=True)
class RestartOptions(levels.SigmaSchedule):
    """Options of RestartScheduler; named as those of diffusers' classes of k-diffusion's family."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # fewer than the base's


class Restart(levels.Exploding):
    """A class of ours in diffusers' manner: two network calls a step, but one where it ends without noise.

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
        # Each step's first call, and its second one where the step does not end at 0.
        self._calls = [
            (k, second) for k, to in enumerate(self._to) for second in ((False, True) if to > 0 else (False,))
        ]
        sigmas = np.array([(self._to if second else self._from)[k] for k, second in self._calls])
        self._sigmas = sigmas.astype(np.float32)
        self.timesteps = levels.sigma_to_t(sigmas, np.log(made.training)).astype(np.float32)
        self.init_sigma = levels.start_sigma(self._sigmas, o.timestep_spacing)
        self._kind = o.prediction_type
        self._begun: tuple[Array, Array] | None = None  # latents and slope where the step began

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        k, second = self._calls[i]
        length = float(self._to[k] - self._from[k])
        x0 = tables.denoised(pred, x, self._sigmas[i], self._kind)
        slope = (x - x0) / self._sigmas[i]
        moved = x  # image to image begins at a second call: it is there already
        if not second:
            self._begun = x, slope
            moved = x + length * slope
        elif self._begun is not None:
            start, first = self._begun
            moved = start + length * (first + slope) / 2
        ends = second or self._to[k] == 0
        if ends and k + 1 < len(self._from) and (low := float(self._to[k])) < (high := float(self._from[k + 1])):
            moved = moved + ((high - low) * (high + low)) ** 0.5 * noise()
        return moved, x0


def _steps(sigmas: levels.Floats) -> tuple[levels.Floats, levels.Floats]:
    """Where each step begins and ends, f64[steps] each; A1111's numbers of rounds and of their steps."""
    count = len(sigmas)
    if count < 20:
        return sigmas, np.append(sigmas[1:], 0.0)
    rounds, of_round = (2, count // 4) if count >= 36 else (1, 9)
    main = levels.karras(float(sigmas[-1]), float(sigmas[0]), count - rounds * of_round)
    main = np.append(main, 0.0)
    low, high = (int(np.abs(main - level).argmin()) for level in (LOW, HIGH))  # low is the end, 0, where that is nearer
    again = levels.karras(float(main[low]), float(main[high]), of_round + 1)
    begin = np.concatenate([main[:low], *[again[:-1]] * rounds, main[low:-1]])
    end = np.concatenate([main[1 : low + 1], *[again[1:]] * rounds, main[low + 1 :]])
    return begin, end
