"""Stochastic schedulers against diffusers', step by step, given the same model outputs and the same noise."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.integrate
import torch

from sdrt import Pipeline, demo, schedulers
from sdrt.brownian import BrownianTree
from sdrt.errors import InputError
from sdrt.metrics import psnr
from sdrt.noise import TorchGenerator
from sdrt.schedulers import sa

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
SDE, SDE_NOISE = (
    {"algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
)
ADAMS_NOISE = {"algorithm_type": "noise_prediction"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{"eta": 0.5}, {"eta": 1.0}, {"eta": 1.0, "set_alpha_to_one": True, **CLIPPED}, {"eta": 0.3, **ZERO_SNR}],
    "DDPMScheduler": [
        {}, {"variance_type": "fixed_small_log"}, {"variance_type": "fixed_large"}, CLIPPED, THRESHOLD, ZERO_SNR, {"steps_offset": 0},
    ],
    "DPMSolverMultistepScheduler": [
        *({**SDE, **sigmas} for sigmas in SIGMAS), *({**SDE, "solver_order": order} for order in (1, 3)), {**SDE, **FLOW}, {**SDE, **THRESHOLD},
        {**SDE, "solver_type": "heun"}, {**SDE, **KARRAS, "solver_order": 3}, {**SDE, "final_sigmas_type": "sigma_min"}, {**SDE, "euler_at_final": True},
        {**SDE, "solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, {**SDE, **ZERO_SNR}, {**SDE, "use_lu_lambdas": True},
        SDE_NOISE, {**SDE_NOISE, "solver_type": "heun"}, {**SDE_NOISE, "solver_order": 1}, {**SDE_NOISE, **KARRAS, **THRESHOLD},
    ],
    "DPMSolverSDEScheduler": SIGMAS,
    "DPMSolverSinglestepScheduler": [
        SDE, {**SDE, **KARRAS, "solver_order": 3}, {**SDE, "solver_order": 3, "solver_type": "heun"}, {**SDE, "solver_type": "heun"},
        {**SDE, "solver_order": 1, **BETA}, {**SDE, "final_sigmas_type": "sigma_min"}, {**SDE, **FLOW},
    ],
    "EDMDPMSolverMultistepScheduler": [
        SDE, {}, {**SDE, "solver_type": "heun"}, {"solver_order": 3, "sigma_schedule": "exponential"}, {**SDE, "solver_order": 1, **THRESHOLD},
        {"lower_order_final": False, "solver_order": 3, "sigma_min": 0.01, "rho": 5.0}, {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    ],
    "EDMEulerScheduler": [{}, {"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min", "sigma_data": 1.0, "rho": 5.0}],
    "EulerAncestralDiscreteScheduler": [*SIGMAS, {"steps_offset": 0}, ZERO_SNR],
    "FlowMatchEulerDiscreteScheduler": [{"stochastic_sampling": True, "shift": 3.0}],
    "KDPM2AncestralDiscreteScheduler": SIGMAS,
    "LCMScheduler": [{}, CLIPPED, THRESHOLD, {**ZERO_SNR, "prediction_type": "v_prediction"}, {"original_inference_steps": 100, "timestep_scaling": 3.0}],
    "SASolverScheduler": [
        *SIGMAS, FLOW, {"use_flow_sigmas": True}, THRESHOLD, *({"predictor_order": order, "corrector_order": order} for order in (1, 3, 4)),
        {"predictor_order": 1, "corrector_order": 2}, {"predictor_order": 1, "corrector_order": 4}, {"predictor_order": 3, "corrector_order": 1},
        {"lower_order_final": False}, {"lower_order_final": False, "predictor_order": 3, **KARRAS}, {**BETA, "predictor_order": 3, "corrector_order": 3},
        {"lambda_min_clipped": -2.0}, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, ADAMS_NOISE, {**ADAMS_NOISE, **KARRAS},
        {**ADAMS_NOISE, "predictor_order": 3, "corrector_order": 3}, {**ADAMS_NOISE, "predictor_order": 4, "corrector_order": 4},
    ],
    "TCDScheduler": [{}, {"eta": 0.0}, {"eta": 1.0}, {"eta": 0.7, "original_inference_steps": 100}, {**ZERO_SNR, "prediction_type": "v_prediction"}],
}  # fmt: skip
"""Config; "eta" is the caller's."""
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
WALKS = [
    ("leading", "epsilon", 20, 0), ("linspace", "v_prediction", 50, 0), ("trailing", "epsilon", 5, 0), ("leading", "sample", 5, 0),
    ("trailing", "v_prediction", 20, 0), ("linspace", "epsilon", 1, 0), ("trailing", "v_prediction", 2, 0), ("leading", "v_prediction", 20, 8),
]  # fmt: skip
"""Spacing, prediction, steps, and how many steps image to image leaves out."""
ONLY_EPSILON_OR_V = ("DPMSolverSDEScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")  # fmt: skip


class Recorded:
    """The same noise for several readers, each from the beginning; counts what it reads."""

    SEED = 3

    def __init__(self, shape: tuple[int, ...], kept: list[np.ndarray] | None = None) -> None:
        self.shape, self.drawn = shape, 0
        self.kept: list[np.ndarray] = [] if kept is None else kept

    def again(self) -> Recorded:
        return Recorded(self.shape, self.kept)

    def brownian(self, low: float, high: float) -> BrownianTree:
        return BrownianTree(low, high, self.SEED, self.shape, TorchGenerator)

    def __call__(self) -> np.ndarray:
        if self.drawn == len(self.kept):
            self.kept.append(np.random.default_rng([7, self.drawn]).standard_normal(self.shape, dtype=np.float32))
        self.drawn += 1
        return self.kept[self.drawn - 1].copy()


def configured(name: str, options: dict[str, Any], spacing: str, prediction: str) -> dict[str, Any]:
    if prediction == "sample" and name in ONLY_EPSILON_OR_V:
        prediction = "epsilon"
    if prediction == "epsilon" and "rescale_betas_zero_snr" in options and name != "EulerAncestralDiscreteScheduler":
        prediction = "v_prediction"  # they divide by 0 with epsilon, as in diffusers
    if name.startswith("Flow"):
        return {**options, "_class_name": name}
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
    told = {"eta": 0.0} if config["_class_name"] == "TCDScheduler" else {}  # diffusers' pipelines say so when not told
    config = {key: value for key, value in config.items() if key != "eta"}
    ours, alone = (schedulers.make(config, steps, **given, **eta) for _ in range(2))
    begin = left_out * ours.order
    theirs = getattr(diffusers, config["_class_name"]).from_config(config)
    theirs.set_timesteps(**given) if given else theirs.set_timesteps(steps)
    if config["_class_name"].startswith("EulerA") and any(key.startswith("use_") for key in config):
        # It has no sigma schedules there: those of the class that has.
        other = diffusers.EulerDiscreteScheduler.from_config(config)
        other.set_timesteps(steps)
        theirs.sigmas, theirs.timesteps = other.sigmas, other.timesteps
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(begin)
    # 2e-4 of a training step: those of a sigma schedule are interpolated, in float32 there and in float64 here.
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy().astype(np.float32), rtol=0, atol=2e-4)
    assert ours.order == theirs.order
    assert ours.init_sigma == pytest.approx(float(getattr(theirs, "init_noise_sigma", 1.0)), rel=1e-6)
    generator = np.random.default_rng(steps)
    x, x0, noise = generator.standard_normal((3, 2, 4, 8, 8)).astype(np.float32)
    drawn = Recorded(x.shape)
    of_ours, of_alone = drawn.again(), drawn.again()
    if hasattr(theirs, "noise_sampler"):
        theirs.noise_sampler_seed = Recorded.SEED
    else:
        module = sys.modules[type(theirs).__module__]
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(drawn()))
    worst = 0.0
    if left_out:
        x = ours.add_noise(x0, noise, begin)
        at = theirs.timesteps[begin : begin + 1].repeat(2)
        if hasattr(theirs, "scale_noise"):
            expected = theirs.scale_noise(torch.from_numpy(x0), at, torch.from_numpy(noise))
        else:
            expected = theirs.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), at)
        worst = relative(expected.numpy(), x)
    else:
        x = x * np.float32(ours.init_sigma)
    synchronised, own = torch.from_numpy(x), x
    for i in range(begin, len(ours.timesteps)):
        timestep, pred = theirs.timesteps[i], generator.standard_normal(x.shape).astype(np.float32)
        if hasattr(theirs, "scale_model_input"):
            seen = theirs.scale_model_input(synchronised, timestep).numpy()
            worst = max(worst, relative(seen, ours.scale(synchronised.numpy(), i)))
        got, x0 = ours.step(synchronised.numpy(), pred, i, of_ours)
        own, _ = alone.step(own, pred, i, of_alone)
        said = theirs.step(torch.from_numpy(pred), timestep, synchronised, **{**told, **eta})
        for shown in ("pred_original_sample", "denoised"):
            if hasattr(said, shown):
                assert relative(getattr(said, shown).numpy(), x0) <= 2e-6, f"x0 of step {i}"
        if getattr(theirs, "predict_x0", False):  # SA-Solver shows none, but keeps it
            assert relative(theirs.model_outputs[-1].numpy(), x0) <= 2e-6, f"x0 of step {i}"
        synchronised = said.prev_sample
        assert got.dtype == x0.dtype == np.float32
        assert of_ours.drawn == of_alone.drawn == drawn.drawn, f"noise of step {i}"
        error = relative(synchronised.numpy(), got)
        assert np.isfinite(error)
        worst = max(worst, error)
    return worst, relative(synchronised.numpy(), own)


@pytest.mark.usefixtures("rounded")
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


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_equal_diffusers_as_shipped(
    name: str, spacing: str, last_bits: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own functions, whose last bit is off now and then: 1e-7 of a step.

    A Brownian tree's points are rounded to 1e-6: a σ whose last bit is off may be the next point, of other noise.
    """
    config = configured(name, OPTIONS[name][0], spacing, "epsilon")
    bars = (1e-3, 1e-3) if name == "DPMSolverSDEScheduler" else (1.5e-6, 1e-5)
    for steps in (5, 20, 50):
        step, end = walk(monkeypatch, config, steps)
        assert step <= bars[0] * (last_bits if name == "SASolverScheduler" else 1)
        assert end <= bars[1]


@pytest.mark.parametrize("more", [{}, ADAMS_NOISE, KARRAS], ids=str)
@pytest.mark.parametrize(("order", "bar"), [(2, 1.5e-6), (3, 2e-5), (4, 1e-3)])
def test_orders_of_sa_solver_as_shipped(
    order: int, bar: float, more: dict[str, Any], last_bits: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are polynomials multiplied out: the last bit of a logarithm is more, the higher the order."""
    options = {**more, "predictor_order": order, "corrector_order": order}
    for spacing in ("leading", "linspace", "trailing"):
        for steps in (5, 20, 50):
            step, end = walk(monkeypatch, configured("SASolverScheduler", options, spacing, "epsilon"), steps)
            assert step <= bar * last_bits
            assert end <= max(1e-5, bar * last_bits)


@pytest.mark.usefixtures("rounded")
def test_where_sa_solver_draws_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """From timestep 200 to 800, both included; its noise counts in two steps, the corrector's being the same."""
    config = {**configured("SASolverScheduler", {"steps_offset": 0}, "leading", "epsilon")}
    assert schedulers.make(config, 4).timesteps.tolist() == [800, 600, 400, 200]
    step, end = walk(monkeypatch, config, 4)
    assert max(step, end) <= 1e-6
    config["timestep_spacing"] = "trailing"
    made, x = schedulers.make(config, 5), np.zeros((1, 4, 8, 8), np.float32)
    noisy = []
    for i in range(5):
        moved, _ = made.step(x, x, i, lambda: np.ones_like(x))
        noisy.append(float(np.abs(moved).max()) > 0)
    assert made.timesteps.tolist() == [999, 799, 599, 399, 199]
    assert noisy == [False, True, True, True, True]  # what the last step corrects had noise


def test_weights_of_sa_solver_are_the_integrals() -> None:
    """Of e^(rate·λ) times the polynomial that is 1 at one node and 0 at the others: the same by quadrature."""
    lam = np.array([-2.7, -1.9, -1.2, -0.4, 0.5, 1.6, 3.1], np.float32)
    for rate in (1, 2, -1):
        for i, order in itertools.product(range(3, 6), (1, 2, 3, 4)):
            for newest in (i, i + 1):
                nodes = [lam[newest - k] for k in range(order)]
                found = sa.weights(nodes, lam[i], lam[i + 1], np.float32(rate))
                for own, weight in zip(nodes, found, strict=True):
                    others = [float(node) for node in nodes if node != own]
                    wanted, _ = scipy.integrate.quad(
                        lambda t, own=own, others=others, rate=rate: (
                            math.exp(rate * t) * np.prod([(t - c) / (float(own) - c) for c in others])
                        ),
                        lam[i],
                        lam[i + 1],
                    )
                    assert weight == pytest.approx(wanted, rel=2e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {}), ("LCMScheduler", {}), ("TCDScheduler", {}), ("TCDScheduler", {"eta": 0.8}),
        ("DPMSolverMultistepScheduler", SDE), ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 3}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("left_out", [0, 2])
def test_timesteps_set_by_hand_equal_diffusers(
    name: str, options: dict[str, Any], left_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(name, options, "leading", "epsilon")
    step, end = walk(monkeypatch, config, None, left_out, timesteps=[999, 850, 700, 550, 300, 39])
    assert step <= 1e-6
    assert end <= 1e-5


class TwoS:
    """k-diffusion's ``sample_dpmpp_2s_ancestral`` as its formulas say, in float64, for a network that predicts ε or v.

    One call of the network at a time, so that it can be walked through beside ours.
    """

    def __init__(self, sigmas: list[float], eta: float, v: bool) -> None:
        self.sigmas, self.eta, self.v = [*sigmas, 0.0], eta, v

    def level(self, i: int) -> float:
        """σ that the network sees at call i."""
        sigma, down, _ = self.split(i)
        return sigma if i % 2 == 0 else math.exp(-(-math.log(sigma) + (-math.log(down) + math.log(sigma)) / 2))

    def split(self, i: int) -> tuple[float, float, float]:
        sigma, after = self.sigmas[i // 2], self.sigmas[i // 2 + 1]
        up = min(after, self.eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
        return sigma, math.sqrt(after**2 - up**2), up

    def step(self, x: np.ndarray, pred: np.ndarray, i: int, noise: Any) -> np.ndarray:
        sigma, down, up = self.split(i)
        seen = self.level(i)
        if self.v:
            denoised = x / (seen**2 + 1) - pred * seen / math.sqrt(seen**2 + 1)
        else:
            denoised = x - seen * pred
        if i % 2 == 0:
            self.start = x
        if down == 0:
            return x + (x - denoised) / sigma * (down - sigma)
        t, t_next = -math.log(sigma), -math.log(down)
        part = 0.5 if i % 2 == 0 else 1.0
        h = (t_next - t) * part
        moved = math.exp(-(t + h)) / math.exp(-t) * self.start - math.expm1(-h) * denoised
        return moved + noise() * up if i % 2 else moved


@pytest.mark.parametrize(("steps", "eta"), [(1, None), (5, 0.5), (20, None), (20, 0.0), (50, 1.0)])
@pytest.mark.parametrize("options", SIGMAS, ids=str)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "sgm_uniform"])
def test_dpmpp_2s_ancestral(spacing: str, options: dict[str, Any], steps: int, eta: float | None) -> None:
    """diffusers has no such class: against its formulas in float64, at the noise levels that Euler has."""
    if options and spacing == "sgm_uniform":
        spacing = "trailing"  # schedules exclude each other
    prediction = "v_prediction" if steps == 20 else "epsilon"
    base = {**SD1, **options, "timestep_spacing": spacing, "prediction_type": prediction}
    euler = schedulers.make({**base, "_class_name": "EulerDiscreteScheduler"}, steps)
    config = {**base, "_class_name": "DPMSolver2SAncestralScheduler"}
    ours, alone = (schedulers.make(config, steps, eta=eta) for _ in range(2))
    # What add_noise makes of no picture and noise of 1 is σ.
    one = np.ones((1, 1, 1, 1), np.float32)
    theirs = TwoS(
        [float(euler.add_noise(0 * one, one, i).item()) for i in range(steps)],
        1.0 if eta is None else eta, prediction == "v_prediction",
    )  # fmt: skip
    assert len(ours.timesteps) == 2 * steps - 1
    np.testing.assert_allclose(ours.timesteps[::2], euler.timesteps, rtol=0, atol=1e-4)
    generator = np.random.default_rng(steps)
    x = generator.standard_normal((2, 4, 8, 8)).astype(np.float32) * np.float32(ours.init_sigma)
    drawn = Recorded(x.shape)
    of_ours, of_alone = drawn.again(), drawn.again()
    synchronised, own = x.astype(np.float64), x
    for i in range(len(ours.timesteps)):
        pred = generator.standard_normal(x.shape).astype(np.float32)
        near = synchronised.astype(np.float32)
        assert relative(synchronised / math.sqrt(theirs.level(i) ** 2 + 1), ours.scale(near, i)) <= 1e-6
        got, _ = ours.step(near, pred, i, of_ours)
        own, _ = alone.step(own, pred, i, of_alone)
        synchronised = theirs.step(synchronised, pred, i, drawn)
        assert of_ours.drawn == of_alone.drawn == drawn.drawn == (i + 1) // 2
        assert got.dtype == np.float32
        assert relative(synchronised, got) <= 1e-6
    assert relative(synchronised, own) <= 1e-5


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, {}, "variance_type='learned_range' is not"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, {}, "variance_type='fixed_large_log' is"),
        ({"_class_name": "DDPMScheduler", "clip_sample_range": 0.0}, {}, "clip_sample_range is 0"),
        ({"_class_name": "DDPMScheduler", **ZERO_SNR, "timestep_spacing": "trailing"}, {}, "nothing but noise"),
        ({"_class_name": "DDPMScheduler"}, {"eta": 0.5}, "DDPMScheduler takes no eta"),
        ({"_class_name": "DDIMScheduler"}, {"eta": 1.5}, "eta is 1.5, expected a number from 0 to 1"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 5}, {}, "more than original_inference_steps, 5"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 1001}, {}, "original_inference_steps is 1001"),
        ({"_class_name": "LCMScheduler", "timestep_scaling": 0.0}, {}, "timestep_scaling is 0"),
        ({"_class_name": "LCMScheduler", **ZERO_SNR}, {}, "nothing but noise"),
        ({"_class_name": "SASolverScheduler", "tau_func": 1}, {}, "tau_func: expected null"),
        ({"_class_name": "SASolverScheduler", "predictor_order": 5}, {}, "predictor_order=5 is not supported"),
        ({"_class_name": "SASolverScheduler", "corrector_order": 0}, {}, "corrector_order=0 is not supported"),
        ({"_class_name": "SASolverScheduler", "variance_type": "learned"}, {}, "variance_type='learned' is not"),
        ({"_class_name": "SASolverScheduler", "flow_shift": 0}, {}, "flow_shift is 0"),
        ({"_class_name": "SASolverScheduler", **KARRAS, "use_flow_sigmas": True}, {}, "only one of"),
        ({"_class_name": "SASolverScheduler", **ADAMS_NOISE, "thresholding": True}, {}, "is not for thresholding"),
        ({"_class_name": "SASolverScheduler", **ADAMS_NOISE, **FLOW}, {}, "is not for prediction_type 'flow_prediction'"),
        ({"_class_name": "SASolverScheduler", **ZERO_SNR}, {}, "rescale_betas_zero_snr=True is not"),
        ({"_class_name": "SASolverScheduler"}, {"eta": 0.5}, "SASolverScheduler takes no eta"),
        ({"_class_name": "SASolverScheduler", "predictor_order": 4, **KARRAS, "steps": 900}, {}, "too near each other for order 4"),
        ({"_class_name": "TCDScheduler", "thresholding": True}, {}, "thresholding=True is not supported"),
        ({"_class_name": "TCDScheduler", "clip_sample": True}, {}, "clip_sample=True is not supported"),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "sample"}, {}, "prediction_type: expected"),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler", **ZERO_SNR}, {}, "rescale_betas_zero_snr=True is not"),
        ({"_class_name": "DPMSolverSDEScheduler", "noise_sampler_seed": 3}, {}, "noise_sampler_seed=3 is not supported"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", **SDE, "solver_order": 3}, {}, "solver_order=3 is not supported"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sample_max_value": 0.0}, {}, "sample_max_value is 0"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 90.0}, {}, "sigma_min is 90.0, more than sigma_max"),
        ({"_class_name": "DPMSolverSDEScheduler", "num_train_timesteps": 10, "trained_betas": [0.99] * 10}, {}, "times the picture's, at most 1e"),
        ({"_class_name": "EDMEulerScheduler", "rho": 0.0}, {}, "rho is 0.0"),
        ({"_class_name": "EDMEulerScheduler"}, {"sigmas": [5.0, 1.0]}, "EDMEulerScheduler takes no sigmas"),
        ({"_class_name": "DPMSolverSinglestepScheduler", **SDE, "thresholding": 3}, {}, "thresholding: expected true"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_said(config: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    steps = None if "sigmas" in arguments else config.get("steps", 10)
    config = {key: value for key, value in config.items() if key != "steps"}
    with pytest.raises(InputError, match=message):
        schedulers.make(schedulers.resolve(config, {}), steps, **arguments)


def test_a_models_own_sigma_schedule_is_passed_over_where_diffusers_passes_it_over() -> None:
    own = {**SD1, **KARRAS, "_class_name": "EulerAncestralDiscreteScheduler"}
    for chosen in (None, "EulerAncestralDiscreteScheduler", "Euler a"):
        config = schedulers.resolve(chosen, own)
        assert not config.get("use_karras_sigmas")
        theirs = diffusers.EulerAncestralDiscreteScheduler.from_config(own)
        theirs.set_timesteps(5)
        np.testing.assert_allclose(schedulers.make(config, 5).timesteps, theirs.timesteps.numpy())
    for chosen in ("Euler a Karras", own):
        assert schedulers.label(schedulers.resolve(chosen, own)) == "Euler a Karras"


def test_names() -> None:
    for name in ("Euler a", "DPM2 a Karras", "DPM++ 2S a Karras", "DPM++ SDE Karras", "DPM++ 2M SDE", "DPM++ 2M SDE Heun Exponential",
                 "DPM++ 3M SDE Karras", "DDPM", "LCM", "SA-Solver Karras", "TCD"):  # fmt: skip
        assert schedulers.label(schedulers.resolve(name, SD1)) == name


# -- whole pictures ------------------------------------------------------------------------------------------------------

PICTURES: dict[str, tuple[int, dict[str, Any]]] = {
    # Deterministic ones; more of them in test_demo.
    "DEIS": (8, {}), "DPM++ 2M": (8, {}), "DPM++ 2M Heun": (20, {}), "DPM++ 3M": (8, {}), "DPM++ 2S": (20, {}), "DPM2": (8, {}),
    "Euler": (8, {}), "Heun": (8, {}), "LMS": (20, {}), "PLMS": (8, {}), "UniPC": (20, {}), "UniPC Karras": (8, {}),
    # Stochastic ones.
    "DDIM": (20, {"eta": 0.7}), "DDPM": (20, {}), "DPM2 a": (8, {}), "DPM2 a Karras": (20, {}), "DPM++ 2M SDE": (20, {}),
    "DPM++ 2M SDE Karras": (8, {}), "DPM++ 2M SDE Heun": (8, {}), "DPM++ 3M SDE": (20, {}), "DPM++ 3M SDE Exponential": (8, {}),
    "DPM++ 2S a": (8, {}), "DPM++ 2S a Karras": (20, {"eta": 0.5}), "DPM++ SDE": (8, {}), "DPM++ SDE Karras": (20, {}),
    "EDMEulerScheduler": (8, {}), "EDMDPMSolverMultistepScheduler": (20, {}), "Euler a": (20, {}), "LCM": (8, {}), "SA-Solver": (20, {}),
    "SA-Solver Karras": (8, {}), "TCD": (8, {"eta": 0.3}),
}  # fmt: skip
"""Name: steps, and arguments of the generation. The demo model is none that LCM, TCD and EDM are for: the pictures are
not good, but the same."""


class TwoSForDiffusers(diffusers.SchedulerMixin, diffusers.ConfigMixin):  # type: ignore[misc]
    """The formulas above as a scheduler that diffusers' pipeline takes, with the timesteps and noise levels of ours."""

    order = 2

    @diffusers.configuration_utils.register_to_config
    def __init__(self, options: dict[str, Any], eta: float) -> None:
        self.options, self.eta = options, eta

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        made = schedulers.make(self.options, steps, eta=self.eta)
        one = np.ones((1, 1, 1, 1), np.float32)
        self.sigmas = [float(made.add_noise(0 * one, one, 2 * k).item()) for k in range(steps)]
        self.timesteps, self.init_noise_sigma, self.i = torch.from_numpy(made.timesteps), made.init_sigma, 0
        self.solver = TwoS(self.sigmas, self.eta, self.options["prediction_type"] == "v_prediction")

    def scale_model_input(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        return x / math.sqrt(self.solver.level(self.i) ** 2 + 1)

    def step(self, pred: torch.Tensor, t: Any, x: torch.Tensor, generator: Any = None, **_: Any) -> Any:
        def draw() -> np.ndarray:
            return torch.randn(x.shape, generator=generator[0]).numpy()

        moved = self.solver.step(x.double().numpy(), pred.double().numpy(), self.i, draw)
        self.i += 1
        return (torch.from_numpy(moved).float(),)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_equal_diffusers(demo_pipe: Pipeline, demo_diffusers: Any, name: str) -> None:
    """Trained weights rounded to float16, computed in float32, the same seed. The bar is 80 dB."""
    steps, arguments = PICTURES[name]
    config = schedulers.resolve(name, demo_pipe.scheduler_config)
    if config["_class_name"] == "DPMSolver2SAncestralScheduler":
        demo_diffusers.scheduler = TwoSForDiffusers(config, arguments.get("eta", 1.0))
    else:
        own = {"noise_sampler_seed": 5} if config["_class_name"] == "DPMSolverSDEScheduler" else {}
        demo_diffusers.scheduler = getattr(diffusers, config["_class_name"]).from_config({**config, **own})
    common = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "np"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = demo_diffusers(
            demo.PROMPTS[2], negative_prompt="red", generator=[torch.Generator().manual_seed(5)], **common, **arguments
        ).images
    got = demo_pipe(demo.PROMPTS[2], negative_prompt="red", seed=5, scheduler=name, **common, **arguments).images
    assert psnr(expected, got, 1.0) >= 80
