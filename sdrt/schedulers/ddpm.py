"""DDPM: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239, algorithm 2.

With fewer steps than the training schedule has, each step spans several of its steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan

LEAST_VARIANCE = np.float32(1e-20)
"""diffusers' floor: even the last step, whose variance is 0, adds noise of 1e-10."""


@dataclass(frozen=True)
class DDPMOptions(tables.Thresholding):
    """Options of DDPMScheduler; names and defaults are diffusers'."""

    variance_type: (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"] | None
    ) = "fixed_small"
    """None, other classes' default, is fixed_small."""
    clip_sample: bool = True
    clip_sample_range: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        tables.check_clip_range(self.clip_sample_range)


class DDPM(levels.Tabled):
    """diffusers' DDPMScheduler."""

    ABOUT = tables.About(
        "DDPMScheduler", "first order, stochastic; how the networks were trained, for many steps",
        "Denoising Diffusion Probabilistic Models", "2006.11239", frozenset({"timesteps"}),
    )  # fmt: skip
    OPTIONS = DDPMOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        name = self.ABOUT.diffusers
        o = options.read(self.OPTIONS, config, name)
        if o.variance_type not in (None, "fixed_small", "fixed_small_log", "fixed_large"):
            # A learned variance is a second output of the network; fixed_large_log is the root of a negative number
            # in diffusers.
            raise InputError(
                f"{name}: variance_type={o.variance_type!r} is not supported; supported: 'fixed_small',"
                " 'fixed_small_log', 'fixed_large'",
                "choose another scheduler, or change scheduler_config.json",
            )
        levels.check_steps(plan.steps, o)
        if plan.timesteps is not None:
            timesteps = levels.whole(plan.timesteps)
        else:
            timesteps = levels.spaced(o.timestep_spacing, plan.steps, o.num_train_timesteps, o.steps_offset).round()
        self.timesteps = levels.check_timesteps(timesteps, o)
        self._t = [int(t) for t in timesteps] + [-1]
        self._alpha_bar = tables.alphas_cumprod(o)
        if o.prediction_type == "epsilon" and not self._alpha_bar[self._t[:-1]].all():
            raise InputError(
                f"{name}: with rescale_betas_zero_snr the first step sees nothing but noise, and a network that"
                " predicts the noise (prediction_type 'epsilon') tells nothing there",
                "timestep_spacing 'leading' starts after it",
            )
        self._options = o

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        o, one = self._options, np.float32(1)
        bar, before = self._bar(i), self._bar(i + 1)
        alpha = bar / before  # of all the training steps that this one spans
        x0 = tables.x0_from(pred, x, np.sqrt(bar), np.sqrt(one - bar), o.prediction_type)
        if o.thresholding:
            x0 = o.limited(x0)
        elif o.clip_sample:
            x0 = np.clip(x0, -o.clip_sample_range, o.clip_sample_range)
        # Equation 7: the mean of x_(t-1), given x_t and x0.
        of_x0 = np.sqrt(before) * (one - alpha) / (one - bar)
        of_x = np.sqrt(alpha) * (one - before) / (one - bar)
        moved: Array = of_x0 * x0 + of_x * x
        if self._t[i] > 0:
            moved += self._deviation(bar, before, alpha) * noise()
        return moved, x0

    def _bar(self, i: int) -> np.float32:
        """ᾱ at step i; after the last, 1."""
        bar: np.float32 = self._alpha_bar[self._t[i]] if self._t[i] >= 0 else np.float32(1)
        return bar

    def _deviation(self, bar: np.float32, before: np.float32, alpha: np.float32) -> np.float32:
        """Standard deviation of the fresh noise: of β̃ (equation 7), or, larger, of β itself."""
        one = np.float32(1)
        if self._options.variance_type == "fixed_large":
            return np.sqrt(one - alpha)  # type: ignore[no-any-return]
        return np.sqrt(np.maximum((one - before) / (one - bar) * (one - alpha), LEAST_VARIANCE))  # type: ignore[no-any-return]
