"""Schedulers against diffusers', step by step, given the same model outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdrt import schedulers
from sdrt.errors import BundleError, InputError
from sdrt.schedulers import lms, options, tables

# numpy's, about what diffusers does with torch's tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

SD1 = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True, "trained_betas": None,
}  # fmt: skip
KARRAS, EXPONENTIAL, BETA = ({f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta"))
ZERO_SNR = {"rescale_betas_zero_snr": True}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
NOISE = {"algorithm_type": "dpmsolver", **SIGMA_MIN}  # integrates ε
SIGMAS: list[dict[str, Any]] = [{}, KARRAS, EXPONENTIAL, BETA]
MULTISTEP: list[dict[str, Any]] = [
    *SIGMAS, FLOW, {"solver_order": 1}, {"solver_order": 3}, {**BETA, "solver_order": 3}, {**FLOW, "solver_order": 3},
    {"thresholding": True, "sample_max_value": 3.0}, {"use_flow_sigmas": True},
]  # fmt: skip
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [
        {}, {"clip_sample": True, "set_alpha_to_one": True}, {"steps_offset": 0}, {"thresholding": True, "sample_max_value": 2.0}, ZERO_SNR,
    ],
    "DEISMultistepScheduler": [*MULTISTEP, {"lower_order_final": False, "solver_order": 3}],
    "DPMSolverMultistepScheduler": [
        *MULTISTEP, {"use_lu_lambdas": True}, {"use_lu_lambdas": True, "solver_order": 3}, {"solver_type": "heun"}, {"euler_at_final": True, **SIGMA_MIN},
        SIGMA_MIN, {**KARRAS, **SIGMA_MIN}, {"lower_order_final": False, "solver_order": 3}, ZERO_SNR, {**ZERO_SNR, **KARRAS, "solver_order": 3},
        NOISE, {**NOISE, "solver_order": 3}, {**NOISE, "solver_type": "heun"}, {**NOISE, "thresholding": True, "sample_max_value": 3.0},
    ],
    "DPMSolverSinglestepScheduler": [
        *MULTISTEP, {"solver_type": "heun"}, {"solver_order": 3, "solver_type": "heun"}, {"lower_order_final": True, **SIGMA_MIN}, SIGMA_MIN,
        {"lower_order_final": True, "solver_order": 3}, NOISE, {**NOISE, "solver_order": 3}, {**NOISE, "solver_type": "heun", "solver_order": 3},
    ],
    "EulerDiscreteScheduler": [
        *SIGMAS, SIGMA_MIN, {"steps_offset": 0}, {"interpolation_type": "log_linear"}, {"interpolation_type": "log_linear", **KARRAS},
        {"timestep_type": "continuous"}, {**EXPONENTIAL, "sigma_min": 0.1, "sigma_max": 10.0}, ZERO_SNR, {**ZERO_SNR, **KARRAS},
    ],
    "FlowMatchEulerDiscreteScheduler": [{}, {"shift": 3.0}, {"shift": 3.0, **KARRAS}, {"shift": 3.0, **BETA}, {"shift_terminal": 0.1, **EXPONENTIAL}],
    "FlowMatchHeunDiscreteScheduler": [{}, {"shift": 3.0}],
    "HeunDiscreteScheduler": [*SIGMAS, {"clip_sample": True}, {"beta_schedule": "exp"}],
    "KDPM2DiscreteScheduler": SIGMAS,
    "LMSDiscreteScheduler": SIGMAS,
    "PNDMScheduler": [{}, {"set_alpha_to_one": True}, {"skip_prk_steps": False}],
    "UniPCMultistepScheduler": [
        *MULTISTEP, {"solver_type": "bh1", **SIGMA_MIN}, {"solver_type": "bh1", "solver_order": 3, **SIGMA_MIN}, {**KARRAS, **FLOW},
        {"predict_x0": False, **SIGMA_MIN}, {"predict_x0": False, "solver_order": 3, **SIGMA_MIN}, {"disable_corrector": [0, 2, 5]},
        {"lower_order_final": False, "solver_order": 3, **SIGMA_MIN}, ZERO_SNR, {**ZERO_SNR, **KARRAS, "solver_order": 3},
        {**KARRAS, "sigma_min": 0.1, "sigma_max": 8.0},
    ],
}  # fmt: skip
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
WALKS = [
    ("leading", "epsilon", 20, 0), ("linspace", "v_prediction", 50, 0), ("trailing", "epsilon", 5, 0), ("leading", "sample", 5, 0),
    ("trailing", "v_prediction", 20, 0), ("linspace", "epsilon", 1, 0), ("trailing", "v_prediction", 2, 0), ("leading", "v_prediction", 20, 8),
]  # fmt: skip
"""Spacing, prediction, steps, and how many steps image to image leaves out."""
NO_SAMPLE = ("KDPM2DiscreteScheduler", "PNDMScheduler")  # refuse prediction_type "sample"


def configured(name: str, options: dict[str, Any], spacing: str, prediction: str) -> dict[str, Any]:
    if name.startswith("FlowMatch"):
        return {**options, "_class_name": name}
    if prediction == "sample" and name in NO_SAMPLE:
        prediction = "epsilon"
    if prediction == "epsilon" and name == "DDIMScheduler" and "rescale_betas_zero_snr" in options:
        prediction = "v_prediction"  # it divides by 0 with epsilon, as in diffusers
    return {**SD1, "timestep_spacing": spacing, "prediction_type": prediction, **options, "_class_name": name}


def reference(config: dict[str, Any], steps: int | None, begin: int = 0, **given: Any) -> Any:
    made = getattr(diffusers, config["_class_name"]).from_config(config)
    if given:
        made.set_timesteps(**{key: np.array(values) for key, values in given.items()})
    else:
        made.set_timesteps(steps)
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(begin)
    return made


def relative(expected: np.ndarray, got: np.ndarray) -> float:
    # Nothing but zeros is where prediction_type "sample" ends with random predictions of 0; else the largest counts.
    return float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-30))


def walk(config: dict[str, Any], steps: int | None, left_out: int = 0, **given: Any) -> tuple[float, float]:
    """Relative errors of a whole generation: the largest of a step, re-synchronised, and the last left to itself."""
    ours, alone = (schedulers.make(config, steps, **given) for _ in range(2))
    begin = left_out * ours.order
    theirs = reference(config, steps, begin, **given)
    # 1e-4 of a training step: those of a sigma schedule are interpolated, in float32 there and in float64 here.
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy().astype(np.float32), rtol=0, atol=1e-4)
    assert ours.order == theirs.order
    assert ours.init_sigma == pytest.approx(float(getattr(theirs, "init_noise_sigma", 1.0)), rel=1e-6)
    generator = np.random.default_rng(steps)
    x, x0, noise = generator.standard_normal((3, 2, 4, 8, 8)).astype(np.float32)
    worst = 0.0
    if left_out:
        x = ours.add_noise(x0, noise, begin)
        worst = relative(noised(theirs, x0, noise, begin), x)
    else:
        x = x * np.float32(ours.init_sigma)
    synchronised, own = torch.from_numpy(x), x
    for i in range(begin, len(ours.timesteps)):
        timestep, pred = theirs.timesteps[i], generator.standard_normal(x.shape).astype(np.float32)
        if hasattr(theirs, "scale_model_input"):
            seen = theirs.scale_model_input(synchronised, timestep).numpy()
            worst = max(worst, relative(seen, ours.scale(synchronised.numpy(), i)))
        got, x0 = ours.step(synchronised.numpy(), pred, i, _no_noise)
        own, _ = alone.step(own, pred, i, _no_noise)
        said = theirs.step(torch.from_numpy(pred), timestep, synchronised)
        expected = x0_of(theirs, said)
        assert expected is None or relative(expected, x0) <= 2e-6, f"x0 of step {i}"
        synchronised = said.prev_sample
        assert got.dtype == x0.dtype == np.float32
        error = relative(synchronised.numpy(), got)
        assert np.isfinite(error)
        worst = max(worst, error)
    return worst, relative(synchronised.numpy(), own)


def noised(theirs: Any, x0: np.ndarray, noise: np.ndarray, begin: int) -> np.ndarray:
    at = theirs.timesteps[begin : begin + 1].repeat(2)
    if isinstance(theirs, diffusers.FlowMatchHeunDiscreteScheduler):
        # Its scale_noise begins to count steps, and is for a fresh scheduler only.
        return (
            theirs.sigmas[begin] * torch.from_numpy(noise) + (1 - theirs.sigmas[begin]) * torch.from_numpy(x0)
        ).numpy()
    if hasattr(theirs, "scale_noise"):
        return theirs.scale_noise(torch.from_numpy(x0), at, torch.from_numpy(noise)).numpy()
    return theirs.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), at).numpy()


def x0_of(theirs: Any, said: Any) -> np.ndarray | None:
    """diffusers' prediction of x0, where it shows one."""
    if getattr(said, "pred_original_sample", None) is not None:
        return said.pred_original_sample.numpy()
    shown = theirs.config.get("algorithm_type") == "dpmsolver++" or theirs.config.get("predict_x0")
    return theirs.model_outputs[-1].numpy() if shown else None


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize(("spacing", "prediction", "steps", "left_out"), WALKS)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_steps_equal_diffusers(
    name: str, options: dict[str, Any], spacing: str, prediction: str, steps: int, left_out: int
) -> None:
    """Re-synchronised at each step: 1e-6 relative; left to itself to the end: 1e-5."""
    if steps < 4 and ("shift_terminal" in options or "skip_prk_steps" in options):
        steps = 4  # fewer are refused
    step, end = walk(configured(name, options, spacing, prediction), steps, left_out)
    # ε from a prediction of x0, or v, at the end divides by s = 0.03, and UniPC's differences of it by r·h.
    ill = name == "UniPCMultistepScheduler" and options.get("predict_x0") is False
    assert step <= (3e-6 if ill else 1e-6)
    assert end <= 1e-5


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(
    ("name", "options"), [case for case in CASES if case[1] == {} or case[1].keys() == {"solver_order"}], ids=str
)
def test_steps_equal_diffusers_as_shipped(name: str, options: dict[str, Any], spacing: str, steps: int) -> None:
    """With torch's own functions: one last bit of a sigma is 1e-7 of a step, and more where a formula divides by h."""
    order = options.get("solver_order", 2)
    if name in ("DEISMultistepScheduler", "UniPCMultistepScheduler"):
        bars = {1: 1e-6, 2: 5e-6, 3: 2e-4}
    else:
        bars = (
            {1: 1e-6, 2: 2e-6, 3: 1e-5}
            if "solver_order" in schedulers.CLASSES[name].OPTIONS.__dataclass_fields__
            else {2: 1e-6}
        )
    step, end = walk(configured(name, options, spacing, "epsilon"), steps)
    assert step <= bars[order]
    assert end <= max(1e-5, 2 * bars[order])


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, {"timesteps": [999, 800.5, 600, 300, 10]}),
        ({"_class_name": "EulerDiscreteScheduler"}, {"sigmas": [14.0, 9.5, 4.0, 1.2, 0.3, 0.0]}),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction"},
            {"sigmas": [700.0, 20.0, 1.0, 0.0]},
        ),
        ({"_class_name": "HeunDiscreteScheduler"}, {"timesteps": [999, 800, 600, 300, 10]}),
        (
            {"_class_name": "DPMSolverMultistepScheduler"},
            {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]},
        ),
        ({"_class_name": "DPMSolverSinglestepScheduler"}, {"timesteps": [999, 800, 600, 300, 10]}),
        ({"_class_name": "UniPCMultistepScheduler", **FLOW}, {"sigmas": [1.0, 0.7, 0.5, 0.2]}),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}, {"sigmas": [1.0, 0.7, 0.5, 0.2]}),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}, {"timesteps": [1000.0, 600.0, 120.0]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("left_out", [0, 1])
def test_steps_set_by_hand_equal_diffusers(config: dict[str, Any], given: dict[str, Any], left_out: int) -> None:
    own = {} if config["_class_name"].startswith("Flow") else SD1
    step, end = walk({**own, **config}, None, left_out, **given)
    assert step <= 1e-6
    assert end <= 1e-5


def _no_noise() -> Any:
    raise AssertionError("a deterministic solver drew noise")


@pytest.mark.parametrize("shipped", [False, True])
def test_euler_at_zero_terminal_snr(shipped: bool, request: pytest.FixtureRequest) -> None:
    """σ = 4096 at the first step: x + d·Δσ cancels there, to a thousandth. Each step, and all together."""
    bar = 1e-6 * (request.getfixturevalue("last_bits") if shipped else 1)
    if not shipped:
        request.getfixturevalue("rounded")
    for spacing, first in (("trailing", 999), ("linspace", 999), ("leading", 951)):
        for prediction in ("v_prediction", "epsilon"):
            config = configured("EulerDiscreteScheduler", ZERO_SNR, spacing, prediction)
            made = schedulers.make(config, 20)
            assert made.timesteps[0] == first
            assert (made.init_sigma > 4000) == (first == 999)
            step, end = walk(config, 20)
            assert step <= bar
            assert end <= bar


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_tables_are_bit_equal(schedule: str) -> None:
    theirs = diffusers.DDIMScheduler(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012)
    options = tables.TrainingSchedule(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012)  # type: ignore[arg-type]
    np.testing.assert_array_equal(tables.betas(options), theirs.betas.numpy())
    np.testing.assert_array_equal(tables.alphas_cumprod(options), theirs.alphas_cumprod.numpy())


def test_zero_terminal_snr_ddim() -> None:
    """The table ends at 0; v-prediction steps stay within the bar (epsilon divides by 0 there, as in diffusers)."""
    config = {**SD1, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
              "prediction_type": "v_prediction"}  # fmt: skip
    theirs, ours = reference(config, 20), schedulers.make(config, 20)
    x, pred = np.random.default_rng(0).standard_normal((2, 1, 4, 8, 8)).astype(np.float32)
    for i, timestep in enumerate(theirs.timesteps):
        got, _ = ours.step(x, pred, i, _no_noise)
        x = theirs.step(torch.from_numpy(pred), timestep, torch.from_numpy(x)).prev_sample.numpy()
        assert relative(x, got) <= 1e-6


def test_trained_betas_and_lambda_clipping() -> None:
    cosine = {
        **SD1,
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": -5.1,
    }
    np.testing.assert_array_equal(schedulers.make(cosine, 10).timesteps, reference(cosine, 10).timesteps.numpy())
    given_betas = {**SD1, "_class_name": "DDIMScheduler", "trained_betas": np.linspace(0.001, 0.02, 1000).tolist()}
    x = np.ones((1, 4, 8, 8), np.float32)
    expected = reference(given_betas, 5).step(torch.from_numpy(x), 801, torch.from_numpy(x)).prev_sample.numpy()
    assert relative(expected, schedulers.make(given_betas, 5).step(x, x, 0, _no_noise)[0]) <= 1e-6


def test_names() -> None:
    assert schedulers.resolve("DPM++ 2M Karras", SD1)["use_karras_sigmas"] is True
    assert schedulers.resolve("dpm++  2m karras", SD1)["_class_name"] == "DPMSolverMultistepScheduler"
    assert schedulers.resolve("EulerDiscreteScheduler", SD1)["beta_start"] == 0.00085
    for name in schedulers.A1111:
        assert schedulers.label(schedulers.resolve(name, SD1)) == name
    own = {**SD1, "_class_name": "PNDMScheduler"}
    assert schedulers.resolve(None, own) == own
    # A name means what it says, whatever the model's own config was.
    karras = {**SD1, "_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    assert schedulers.resolve("DPM++ 2M", karras)["use_karras_sigmas"] is False
    assert schedulers.resolve("DPMSolverMultistepScheduler", karras)["use_karras_sigmas"] is True


def test_names_with_a_schedule() -> None:
    """A sampler's name with a schedule behind: where its class has it, and whatever the model's config says."""
    ours = {**SD1, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "ays", "use_beta_sigmas": False}
    assert "timestep_spacing" not in schedulers.resolve("Euler", ours)
    assert schedulers.label(schedulers.resolve("Euler Beta", ours)) == "Euler Beta"
    assert schedulers.label(ours) == "Euler AYS"
    assert schedulers.label({**ours, "timestep_spacing": "trailing"}) == "Euler"
    assert schedulers.label({"_class_name": "DPMSolverMultistepScheduler"}) == "DPM++ 2M"
    assert (
        schedulers.label({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"})
        == "DPMSolverMultistepScheduler"
    )
    assert (
        schedulers.label({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True})
        == "DPMSolverMultistepScheduler"
    )
    assert schedulers.label({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": None}) == "Euler"
    assert {"DPM++ 2M SGM Uniform", "Heun Exponential", "UniPC Karras", "DEIS AYS XL"} <= schedulers.A1111.keys()
    for name in ("PLMS Karras", "DDIM Beta", "Euler karras beta", "Karras"):
        with pytest.raises(InputError, match="no scheduler"):
            schedulers.resolve(name, SD1)


def test_linear_multistep_weights_are_the_integrals() -> None:
    """diffusers integrates by scipy's quadrature, to 1e-4; the polynomials' integrals are exact."""
    sigmas = np.array([14.6, 9.7, 5.1, 3.3, 1.9, 0.4, 0.0], np.float32)
    for i in range(6):
        for order in range(1, min(i + 1, 4) + 1):
            nodes = [float(sigmas[i - k]) for k in range(order)]
            for own, weight in zip(nodes, lms.weights(sigmas, i, order), strict=True):
                others = [node for node in nodes if node != own]
                wanted, _ = scipy.integrate.quad(
                    lambda t, own=own, others=others: np.prod([(t - c) / (own - c) for c in others]),
                    nodes[0],
                    sigmas[i + 1],
                )
                assert weight == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow"}, "prediction_type: expected 'epsilon'"),
        ({"_class_name": "DDIMScheduler", "beta_start": "low"}, "beta_start"),
        ({"_class_name": "DDIMScheduler", "beta_start": float("nan")}, "beta_start"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"_class_name": "DDIMScheduler", "colour": "red"}, "no option 'colour'"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1]}, "trained_betas has 1 values"),
        ({"_class_name": "DDIMScheduler", "steps_offset": 999}, "beyond the training schedule"),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True, "use_karras_sigmas": True},
            "only one of use_karras_sigmas, use_beta_sigmas",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "ays", "use_karras_sigmas": True},
            "only one of use_karras_sigmas, timestep_spacing 'ays'",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver", "solver_order": 3},
            "solver_order=3",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, "solver_order=4"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            "wants final_sigmas_type 'sigma_min'",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned"}, "variance_type=True"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "use_karras_sigmas": True},
            "only one of",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, "wants use_flow_sigmas"),
        (
            {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver"},
            "algorithm_type: expected",
        ),
        ({"_class_name": "DPMSolverSinglestepScheduler", "timestep_spacing": np.ones(2)}, "timestep_spacing: expected"),
        ({"_class_name": "DPMSolverSinglestepScheduler", **NOISE, "thresholding": True}, "is not for thresholding"),
        ({"_class_name": "DEISMultistepScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0=False wants final_sigmas_type"),
        ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False}, "lower_order_final=False wants"),
        (
            {"_class_name": "UniPCMultistepScheduler", "solver_p": {"_class_name": "DDIMScheduler"}},
            "solver_p: expected null",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "shift_terminal": 0.1}, "shift_terminal=0.1"),
        ({"_class_name": "HeunDiscreteScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ({"_class_name": "LMSDiscreteScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ({"_class_name": "KDPM2DiscreteScheduler", "prediction_type": "sample"}, "prediction_type='sample'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": "epsilon"}, "is for flows"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1, "steps": 1}, "shift_terminal wants"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False, "steps": 3}, "wants 4 steps or more"),
        ({"_class_name": "PNDMScheduler", "prediction_type": "sample"}, "prediction_type='sample'"),
        ({"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_said(config: dict[str, Any], message: str) -> None:
    steps = config.get("steps", 10)
    config = {key: value for key, value in config.items() if key != "steps"}
    with pytest.raises(InputError, match=message):
        schedulers.make(schedulers.resolve(config, {}), steps)


@pytest.mark.parametrize(
    "scheduler", ["Euler b", "", "Euler Karras Karras", {"_class_name": "VQDiffusionScheduler"}, {}, 3, {3: 1}]
)
def test_unknown_scheduler(scheduler: Any) -> None:
    with pytest.raises(InputError, match="scheduler"):
        schedulers.resolve(scheduler, SD1)


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_out_of_range(steps: int) -> None:
    for name in schedulers.CLASSES:
        with pytest.raises(InputError, match="num_inference_steps"):
            schedulers.make({**SD1, "_class_name": name}, steps)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists, max_leaves=4
)


@given(
    name=st.sampled_from(sorted(schedulers.CLASSES)),
    key=st.sampled_from(sorted(options.FOREIGN)),
    value=JSON,
)
def test_any_value_of_any_option(name: str, key: str, value: Any) -> None:
    """A scheduler_config.json is somebody's input: it is read or refused, never a crash."""
    try:
        with np.errstate(all="ignore"):
            schedulers.make({**SD1, "_class_name": name, key: value}, 5)
    except InputError:
        pass


@pytest.mark.parametrize("name", sorted(name for name in schedulers.CLASSES if hasattr(diffusers, name)))
def test_configs_as_diffusers_saves_them(name: str, tmp_path: Path) -> None:
    """But for the classes that are ours alone. DPMSolverMultistepScheduler's holds ``"lambda_min_clipped": -Infinity``, which is no JSON."""
    made = getattr(diffusers, name)(**{k: v for k, v in SD1.items() if k in getattr(diffusers, name)().config})
    made.save_pretrained(tmp_path)
    config = schedulers.read_config(tmp_path / "scheduler_config.json")
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    for scheduler in (None, *schedulers.A1111):
        schedulers.make(schedulers.resolve(scheduler, config), 10)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler", "beta_start": -Infinity}')
    with pytest.raises(BundleError, match="-Infinity is not a JSON number"):
        schedulers.read_config(tmp_path / "scheduler_config.json")


def test_what_is_told_of_other_schedulers_options(caplog: pytest.LogCaptureFixture) -> None:
    """A caller's own are; the model's, which come along with a resolved config, are not."""
    resolved = schedulers.resolve("PLMS", SD1)
    assert "clip_sample" in resolved
    schedulers.resolve(resolved, SD1)
    assert not caplog.records
    schedulers.resolve({**resolved, "clip_sample": True, "solver_order": 3}, SD1)
    assert "PNDMScheduler has no clip_sample, solver_order: passed over" in caplog.text
    schedulers.resolve({**SD1, "_class_name": "DPMSolverFastScheduler", "timestep_spacing": "trailing"}, SD1)
    assert "DPMSolverFastScheduler has no timestep_spacing: passed over" in caplog.text
    caplog.clear()
    schedulers.resolve(schedulers.resolve("DPM++ 2S Simple", SD1), SD1)
    assert not caplog.records
