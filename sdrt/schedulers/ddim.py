"""DDIM: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502, equation 12.

η, the caller's, is 0 (nothing is drawn) unless given; with 1 it is DDPM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan


@dataclass(frozen=True)
class DDIMOptions(tables.Thresholding):
    """Options of DDIMScheduler; names and defaults are diffusers'."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        tables.check_clip_range(self.clip_sample_range)


class DDIM(levels.Tabled):
    """diffusers' DDIMScheduler."""

    ABOUT = tables.About(
        "DDIMScheduler",
        "first order, deterministic; the first fast sampler",
        "Denoising Diffusion Implicit Models",
        "2010.02502",
        frozenset({"eta"}),
    )
    OPTIONS = DDIMOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        o = options.read(self.OPTIONS, config, "DDIMScheduler")
        levels.check_steps(plan.steps, o)
        n, steps = o.num_train_timesteps, plan.steps
        timesteps = levels.spaced(o.timestep_spacing, steps, n, o.steps_offset).round()
        self.timesteps = levels.check_timesteps(timesteps, o)
        self._stride = n // steps
        self._alpha_bar = tables.alphas_cumprod(o)
        if o.prediction_type == "epsilon" and not self._alpha_bar[self.timesteps.astype(int)].all():
            raise InputError(
                "DDIMScheduler: with rescale_betas_zero_snr the first step sees nothing but noise, and a network that"
                " predicts the noise (prediction_type 'epsilon') tells nothing there",
                "timestep_spacing 'leading' starts after it",
            )
        self._final = 1.0 if o.set_alpha_to_one else float(self._alpha_bar[0])
        self._options = o
        self._eta = 0.0 if plan.eta is None else plan.eta

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        t = int(self.timesteps[i])
        bar, before = float(self._alpha_bar[t]), self._before(t - self._stride)
        alpha, s = math.sqrt(bar), math.sqrt(1 - bar)
        kind = self._options.prediction_type
        x0 = tables.x0_from(pred, x, alpha, s, kind)
        if kind == "epsilon":
            epsilon = pred
        elif kind == "v_prediction":
            epsilon = alpha * pred + s * x
        else:
            epsilon = (x - alpha * x0) / s
        if self._options.thresholding:
            x0 = self._options.limited(x0)
        elif self._options.clip_sample:
            x0 = np.clip(x0, -self._options.clip_sample_range, self._options.clip_sample_range)
        if not self._eta:
            return math.sqrt(before) * x0 + math.sqrt(1 - before) * epsilon, x0
        # Equation 16: the part η of the noise that is not the network's, but fresh. In float32, as in diffusers: ᾱ of
        # neighbouring steps are nearly equal, and 1 - their ratio is what rounding makes of it.
        one, now, then = np.float32(1), np.float32(bar), np.float32(before)
        fresh = np.float32(self._eta) * np.sqrt((one - then) / (one - now) * (one - now / then))
        kept = np.sqrt(np.maximum(one - then - fresh * fresh, np.float32(0)))
        return np.sqrt(then) * x0 + kept * epsilon + fresh * noise(), x0

    def _before(self, t: int) -> float:
        return float(self._alpha_bar[t]) if t >= 0 else self._final
