"""LCM: Luo et al., "Latent Consistency Models", arXiv 2310.04378, algorithm 3: x0 in one go, noised anew each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sdrt.errors import InputError
from sdrt.schedulers import levels, options, tables
from sdrt.schedulers.tables import Array, Noise, Plan

SIGMA_DATA = np.float32(0.5)


@dataclass(frozen=True)
class ConsistencyOptions(tables.Thresholding):
    """Options of LCMScheduler and TCDScheduler; names and defaults are diffusers'.

    Steps lie on the schedule of the distillation: timestep_spacing and steps_offset say nothing, as in diffusers; and
    set_alpha_to_one is for a step before the first, which there is none of.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    original_inference_steps: int = 50
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        tables.check_clip_range(self.clip_sample_range)
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            raise InputError(
                f"original_inference_steps is {self.original_inference_steps}, expected 1 to {self.num_train_timesteps}"
            )
        if not 0 < self.timestep_scaling <= tables.MAX_SIGMA:
            raise InputError(f"timestep_scaling is {self.timestep_scaling}, expected more than 0")


def distilled(o: ConsistencyOptions, plan: Plan, name: str) -> list[int]:
    """The timesteps: of those that the network was distilled at, evenly taken ones from the noisiest down."""
    levels.check_steps(plan.steps, o)
    if plan.timesteps is not None:
        timesteps = levels.whole(plan.timesteps)
        levels.check_timesteps(timesteps, o)
        return [int(t) for t in timesteps]
    original = o.original_inference_steps
    if plan.steps > original:
        raise InputError(
            f"{name}: num_inference_steps is {plan.steps}, more than original_inference_steps, {original}",
            "take fewer steps; such networks need 1 to 8",
        )
    falling = [k * (o.num_train_timesteps // original) - 1 for k in range(original, 0, -1)]
    return [falling[int(place)] for place in np.linspace(0, original, plan.steps, endpoint=False)]


def alpha_bars(o: ConsistencyOptions, timesteps: list[int], name: str) -> Array:
    """ᾱ of the training schedule, if the network can tell something at each step."""
    bars = tables.alphas_cumprod(o)
    if o.prediction_type == "epsilon" and not bars[timesteps].all():
        raise InputError(
            f"{name}: with rescale_betas_zero_snr the first step sees nothing but noise, and a network that predicts"
            " the noise (prediction_type 'epsilon') tells nothing there",
            "choose a network of prediction_type 'v_prediction'",
        )
    return bars


class LCM(levels.Tabled):
    """diffusers' LCMScheduler."""

    ABOUT = tables.About(
        "LCMScheduler", "for networks distilled as LCM (LCM-LoRA too): 1 to 8 steps, guidance 1 to 2",
        "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference", "2310.04378",
        frozenset({"timesteps"}),
    )  # fmt: skip
    OPTIONS = ConsistencyOptions

    def __init__(self, config: Mapping[str, Any], plan: Plan) -> None:
        o = options.read(self.OPTIONS, config, self.ABOUT.diffusers)
        self._t = distilled(o, plan, self.ABOUT.diffusers)
        self.timesteps = np.array(self._t, np.float32)
        self._alpha_bar = alpha_bars(o, self._t, self.ABOUT.diffusers)
        self._options = o

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        o, one = self._options, np.float32(1)
        bar = self._alpha_bar[self._t[i]]
        x0 = tables.x0_from(pred, x, np.sqrt(bar), np.sqrt(one - bar), o.prediction_type)
        if o.thresholding:
            x0 = o.limited(x0)
        elif o.clip_sample:
            x0 = np.clip(x0, -o.clip_sample_range, o.clip_sample_range)
        # Appendix C: at t = 0 the network's input itself, far from it the network's x0.
        scaled = np.float32(self._t[i] * o.timestep_scaling)
        square = scaled * scaled + SIGMA_DATA * SIGMA_DATA
        x0 = (scaled / np.sqrt(square)) * x0 + (SIGMA_DATA * SIGMA_DATA / square) * x
        if i + 1 == len(self._t):  # nothing is drawn at the last step
            return x0.copy(), x0
        return tables.diffused(x0, noise(), self._alpha_bar[self._t[i + 1]]), x0
