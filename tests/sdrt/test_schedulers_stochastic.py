"""Stochastic schedulers against diffusers', step by step, given the same model outputs and the same noise."""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdrt import schedulers
from sdrt.errors import InputError

# numpy's, about what diffusers does with torch's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

SD1 = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True, "trained_betas": None,
}  # fmt: skip
KARRAS, EXPONENTIAL, BETA = ({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta"))
SIGMAS: list[dict[str, Any]] = [{}, KARRAS, EXPONENTIAL, BETA]
ZERO_SNR = {"rescale_betas_zero_snr": True}
CLIPPED = {"clip_sample": True, "clip_sample_range": 1.5}
THRESHOLD = {"thresholding": True, "sample_max_value": 3.0}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{"eta": 0.5}, {"eta": 1.0}, {"eta": 1.0, "set_alpha_to_one": True, **CLIPPED}, {"eta": 0.3, **ZERO_SNR}],
    "DDPMScheduler": [
        {}, {"variance_type": "fixed_small_log"}, {"variance_type": "fixed_large"}, CLIPPED, THRESHOLD, ZERO_SNR, {"steps_offset": 0},
    ],
    "DPMSolverSDEScheduler": SIGMAS,
    "EDMEulerScheduler": [{}, {"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min", "sigma_data": 1.0, "rho": 5.0}],
    "EulerAncestralDiscreteScheduler": [{}, {"steps_offset": 0}, ZERO_SNR],
    "KDPM2AncestralDiscreteScheduler": SIGMAS,
    "LCMScheduler": [{}, CLIPPED, THRESHOLD, {**ZERO_SNR, "prediction_type": "v_prediction"}, {"original_inference_steps": 100, "timestep_scaling": 3.0}],
    "TCDScheduler": [{}, {"eta": 0.0}, {"eta": 1.0}, {"eta": 0.7, "original_inference_steps": 100}, {**ZERO_SNR, "prediction_type": "v_prediction"}],
}  # fmt: skip
"""Config; "eta" is the caller's."""
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
WALKS = [
    ("leading", "epsilon", 20, 0), ("linspace", "v_prediction", 50, 0), ("trailing", "epsilon", 5, 0), ("leading", "sample", 5, 0),
    ("trailing", "v_prediction", 20, 0), ("linspace", "epsilon", 1, 0), ("trailing", "v_prediction", 2, 0), ("leading", "v_prediction", 20, 8),
]  # fmt: skip
"""Spacing, prediction, steps, and how many steps image to image leaves out."""
ONLY_EPSILON_OR_V = ("DPMSolverSDEScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")  # fmt: skip


def diffusers_class(name: str) -> Any:
    if name != "DPMSolverSDEScheduler":
        return getattr(diffusers, name)
    # It imports torchsde for its Brownian tree, which is not needed: the tests bring the Brownian motion.
    missing = "torchsde" not in sys.modules
    if missing:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    finally:
        if missing:
            del sys.modules["torchsde"]


class Recorded:
    """The same noise for several readers, each from the beginning; counts what it reads."""

    def __init__(self, shape: tuple[int, ...], kept: list[np.ndarray] | None = None) -> None:
        self.shape, self.drawn = shape, 0
        self.kept: list[np.ndarray] = [] if kept is None else kept

    def again(self) -> Recorded:
        return Recorded(self.shape, self.kept)

    def __call__(self) -> np.ndarray:
        if self.drawn == len(self.kept):
            self.kept.append(np.random.default_rng([7, self.drawn]).standard_normal(self.shape, dtype=np.float32))
        self.drawn += 1
        return self.kept[self.drawn - 1].copy()


class Brownian:
    """What diffusers' DPMSolverSDEScheduler takes for a noise sampler: W along σ, an increment a new point."""

    def __init__(self, noise: Recorded) -> None:
        self.noise, self.w = noise, {}  # type: dict[float, Any]

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        top, low = float(sigma), float(sigma_next)
        self.w.setdefault(top, 0.0)
        if low not in self.w:
            above = min(point for point in self.w if point > low)
            self.w[low] = self.w[above] + math.sqrt(above - low) * self.noise().astype(np.float64)
        return torch.from_numpy(((self.w[low] - self.w[top]) / math.sqrt(top - low)).astype(np.float32))


def configured(name: str, options: dict[str, Any], spacing: str, prediction: str) -> dict[str, Any]:
    if prediction == "sample" and name in ONLY_EPSILON_OR_V:
        prediction = "epsilon"
    if prediction == "epsilon" and "rescale_betas_zero_snr" in options and name != "EulerAncestralDiscreteScheduler":
        prediction = "v_prediction"  # they divide by 0 with epsilon, as in diffusers
    if name.startswith("EDM"):
        return {"prediction_type": prediction, **options, "_class_name": name}
    return {**SD1, "timestep_spacing": spacing, "prediction_type": prediction, **options, "_class_name": name}


def relative(expected: np.ndarray, got: np.ndarray) -> float:
    return float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-30))


def walk(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], steps: int | None, left_out: int = 0, **given: Any
) -> tuple[float, float]:
    """Relative errors of a whole generation: the largest of a step, re-synchronised, and the last left to itself.

    As often as diffusers draws noise, at the same steps, so do we.
    """
    eta = {"eta": config["eta"]} if "eta" in config else {}
    config = {key: value for key, value in config.items() if key != "eta"}
    ours, alone = (schedulers.make(config, steps, **given, **eta) for _ in range(2))
    begin = left_out * ours.order
    theirs = diffusers_class(config["_class_name"]).from_config(config)
    theirs.set_timesteps(**given) if given else theirs.set_timesteps(steps)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(begin)
    # 2e-4 of a training step: those of a sigma schedule are interpolated, in float32 there and in float64 here.
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy().astype(np.float32), rtol=0, atol=2e-4)
    assert ours.order == theirs.order
    assert ours.init_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    generator = np.random.default_rng(steps)
    x, x0, noise = generator.standard_normal((3, 2, 4, 8, 8)).astype(np.float32)
    drawn = Recorded(x.shape)
    of_ours, of_alone = drawn.again(), drawn.again()
    if hasattr(theirs, "noise_sampler"):
        theirs.noise_sampler = Brownian(drawn)
    else:
        module = sys.modules[type(theirs).__module__]
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(drawn()))
    worst = 0.0
    if left_out:
        x = ours.add_noise(x0, noise, begin)
        at = theirs.timesteps[begin : begin + 1].repeat(2)
        worst = relative(theirs.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), at).numpy(), x)
    else:
        x = x * np.float32(ours.init_sigma)
    synchronised, own = torch.from_numpy(x), x
    for i in range(begin, len(ours.timesteps)):
        timestep, pred = theirs.timesteps[i], generator.standard_normal(x.shape).astype(np.float32)
        seen = theirs.scale_model_input(synchronised, timestep).numpy()
        worst = max(worst, relative(seen, ours.scale(synchronised.numpy(), i)))
        got, x0 = ours.step(synchronised.numpy(), pred, i, of_ours)
        own, _ = alone.step(own, pred, i, of_alone)
        said = theirs.step(torch.from_numpy(pred), timestep, synchronised, **eta)
        for shown in ("pred_original_sample", "denoised"):
            if hasattr(said, shown):
                assert relative(getattr(said, shown).numpy(), x0) <= 2e-6, f"x0 of step {i}"
        synchronised = said.prev_sample
        assert got.dtype == x0.dtype == np.float32
        assert of_ours.drawn == of_alone.drawn == drawn.drawn, f"noise of step {i}"
        error = relative(synchronised.numpy(), got)
        assert np.isfinite(error)
        worst = max(worst, error)
    return worst, relative(synchronised.numpy(), own)


@pytest.mark.parametrize(("spacing", "prediction", "steps", "left_out"), WALKS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_steps_equal_diffusers(
    name: str, options: dict[str, Any], spacing: str, prediction: str, steps: int, left_out: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Re-synchronised at each step: 1e-6 relative; left to itself to the end: 1e-5."""
    step, end = walk(monkeypatch, configured(name, options, spacing, prediction), steps, left_out)
    assert step <= 1e-6
    assert end <= 1e-5
