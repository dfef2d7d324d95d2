"""Spacings, sigma schedules, thresholding and what a caller sets by hand."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch

from sdrt import schedulers
from sdrt.errors import InputError, quoted
from sdrt.schedulers import levels, options, tables

SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50, 1000])
@pytest.mark.parametrize("shape", [0.6, 0.3, 0.95])
def test_beta_quantiles(shape: float, steps: int) -> None:
    p = 1 - np.linspace(0, 1, steps)
    got = levels.symmetric_beta_quantile(p, shape)
    np.testing.assert_allclose(got, scipy.stats.beta.ppf(p, shape, shape), rtol=0, atol=1e-12)


def test_beta_quantiles_as_recorded() -> None:
    """scipy.stats.beta.ppf(p, 0.6, 0.6) of SciPy 1.17."""
    recorded = {
        1e-06: 1.8558824624053043e-10,
        0.001: 1.855873851745199e-05,
        0.1: 0.03958440558878085,
        0.25: 0.17568037865269498,
        0.4: 0.3627009907532143,
        0.5: 0.5000000000000001,
        0.75: 0.824319621347305,
        0.9: 0.9604155944112192,
        0.999: 0.9999814412614826,
    }
    for p, x in recorded.items():
        assert levels.symmetric_beta_quantile(np.array([p]), 0.6)[0] == pytest.approx(x, rel=1e-9)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("largest", [1.0, 2.5, 100.0, 0.5])
def test_thresholding_equals_diffusers(ratio: float, largest: float) -> None:
    theirs = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=largest)
    x0 = np.random.default_rng(0).standard_normal((3, 4, 9, 7)).astype(np.float32) * np.float32(
        [[[[1]]], [[[4]]], [[[0.1]]]]
    )
    expected = theirs._threshold_sample(torch.from_numpy(x0)).numpy()
    np.testing.assert_allclose(tables.thresholded(x0, ratio, largest), expected, rtol=1e-6)


@pytest.mark.parametrize("spacing", ["ays", "ays_xl", "ays_svd"])
def test_align_your_steps(spacing: str) -> None:
    """10 steps are the authors' table, which diffusers has; others lie between, in log σ."""
    kind = {"ays": "StableDiffusion", "ays_xl": "StableDiffusionXL", "ays_svd": "StableDiffusionVideo"}[spacing]
    published = diffusers.schedulers.scheduling_utils.AysSchedules[f"{kind}Sigmas"]
    training = np.ones(1000, np.float32)
    np.testing.assert_allclose(levels.own_sigmas(spacing, 10, training), published[:-1], rtol=1e-12)
    twenty = levels.own_sigmas(spacing, 20, training)
    assert twenty is not None
    np.testing.assert_allclose(twenty[::2], published[:-1], rtol=1e-12)
    np.testing.assert_allclose(twenty[1:-1:2] ** 2, twenty[0:-2:2] * twenty[2::2], rtol=1e-12)


def test_align_your_steps_as_diffusers_runs_it() -> None:
    config = schedulers.resolve("Euler AYS", SD1)
    theirs = diffusers.EulerDiscreteScheduler(**SD1)
    theirs.set_timesteps(sigmas=diffusers.schedulers.scheduling_utils.AysSchedules["StableDiffusionSigmas"])
    np.testing.assert_allclose(schedulers.make(config, 10).timesteps, theirs.timesteps.numpy(), atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 7, 11, 20])
@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "Heun"])
def test_schedules_of_a1111(sampler: str, steps: int) -> None:
    """Each as its own formula says it, over the training schedule's σ."""
    bar = diffusers.EulerDiscreteScheduler(**SD1).alphas_cumprod.double()
    training = ((1 - bar) / bar) ** 0.5
    places = torch.linspace(999, 0, steps, dtype=torch.float64)
    low, high, weight = places.floor().long(), places.ceil().long(), places.frac()
    table = list(levels.AYS["ays"])
    at = np.linspace(0, 1, len(table))
    expected = {
        "Uniform": ((1 - weight) * training[low].log() + weight * training[high].log()).exp().numpy(),
        "Simple": np.array([training[-(1 + int(i * (1000 / steps)))] for i in range(steps)]),
        "Align Your Steps": np.exp(np.interp(np.linspace(0, 1, steps), at[::1], np.log(table))),
    }
    expected["Normal"] = expected["Uniform"]
    calls = slice(None, None, 2) if sampler == "Heun" else slice(None)
    for schedule, sigmas in expected.items():
        made = schedulers.make(schedulers.resolve(f"{sampler} {schedule}", SD1), steps)
        np.testing.assert_allclose(made.sigmas[calls], sigmas, rtol=2e-6, err_msg=schedule)
    same = schedulers.resolve(f"{sampler} polyexponential", SD1)
    assert same == schedulers.resolve(f"{sampler} Exponential", SD1)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "UniPC"])
def test_kl_optimal(sampler: str, steps: int) -> None:
    """A1111's: arctan σ falls evenly from the training schedule's largest to its smallest, where the last step ends."""
    bar = diffusers.EulerDiscreteScheduler(**SD1).alphas_cumprod.double()
    ends = (((1 - bar) / bar) ** 0.5)[[-1, 0]].arctan()
    part = torch.arange(steps, dtype=torch.float64) / steps
    made = schedulers.make(schedulers.resolve(f"{sampler} KL Optimal", SD1), steps)
    np.testing.assert_allclose(made.sigmas, (ends[0] * (1 - part) + ends[1] * part).tan(), rtol=2e-6)
    if sampler == "Euler":  # to the smallest σ: x + d·Δσ, d = ε
        x, pred = np.zeros((1, 1, 1, 1), np.float32), np.ones((1, 1, 1, 1), np.float32)
        moved, _ = made.step(x, pred, steps - 1, torch.randn)  # type: ignore[arg-type] # it draws none
        assert moved.item() == pytest.approx(float(ends[1].tan()) - made.sigmas[-1], rel=1e-5)


@pytest.mark.parametrize("name", ["Euler", "Heun", "LMS", "Euler a", "DPM++ 2M", "UniPC", "Restart"])
def test_kl_optimal_does_not_end_at_0(name: str) -> None:
    """Another schedule than its paper's then, which no name asks for."""
    with pytest.raises(InputError, match="'kl_optimal' ends at the smallest sigma, and these options at 0"):
        schedulers.make({**schedulers.resolve(name, SD1), "timestep_spacing": "kl_optimal"}, 8)
    for always in ("DEIS", "SA-Solver"):
        assert f"{always} KL Optimal" in schedulers.A1111
        made = schedulers.make(schedulers.resolve(f"{always} KL Optimal", SD1), 8)
        levels_of: Any = made
        assert levels_of._levels.sigma[-1] == pytest.approx(0.029167, rel=1e-4)


def test_what_lambda_min_clipped_leaves() -> None:
    """Spacings of ours begin where diffusers' do."""
    config = {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": -5.1,
    }
    wanted = schedulers.make({**config, "timestep_spacing": "linspace"}, 20).sigmas[0]
    for spacing in ("sgm_uniform", "uniform", "simple"):
        assert schedulers.make({**config, "timestep_spacing": spacing}, 20).sigmas[0] == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(InputError, match="'ays' begins above what lambda_min_clipped leaves"):
        schedulers.make({**config, "timestep_spacing": "ays", "lambda_min_clipped": -1.0}, 20)


def test_levels_of_a_flow_below_1() -> None:
    config = {
        "_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 100, "trained_betas": [0.6] + [0.1] * 99,
        "use_flow_sigmas": True, "final_sigmas_type": "sigma_min", "prediction_type": "flow_prediction",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"a flow's noise level is 1\.2"):
        schedulers.make(config, 5)


@pytest.mark.parametrize("steps", [1, 4, 5, 20, 50, 111])
@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M", "Heun"])
def test_strides_of_ddim(sampler: str, steps: int) -> None:
    """A1111's DDIM schedule: σ of timesteps 1, 1 + stride, …, the last of which comes first."""
    made = schedulers.make(schedulers.resolve(f"{sampler} DDIM", SD1), steps)
    expected = list(range(1, 1000, 1000 // steps))[::-1]
    assert len(expected) == steps
    bar = diffusers.EulerDiscreteScheduler(**SD1).alphas_cumprod.double().numpy()[expected]
    calls = slice(None, None, 2) if sampler == "Heun" else slice(None)
    np.testing.assert_allclose(made.sigmas[calls], ((1 - bar) / bar) ** 0.5, rtol=2e-6)
    np.testing.assert_allclose(made.timesteps[calls], expected, atol=2e-3)


def test_strides_that_are_not_as_many_as_the_steps() -> None:
    """A1111 would take 13 for 12: not what was asked for, and not said."""
    config = schedulers.resolve("Euler DDIM", SD1)
    with pytest.raises(InputError, match=r"strides of 83 of 1000 training steps are 13 steps, 12 .*") as raised:
        schedulers.make(config, 12)
    assert raised.value.fix == "take 10 or 20 steps, or another schedule"
    for steps in (10, 20):
        assert len(schedulers.make(config, steps).timesteps) == steps
    with pytest.raises(InputError, match="999 steps, 1000 are asked for"):
        schedulers.make(config, 1000)


def test_timesteps_of_sigmas_where_the_table_does_not_rise() -> None:
    """Zero terminal SNR with betas that end lower than the level that stands for it: σ[998] is 15,406, σ[999] 4,096."""
    config = {"rescale_betas_zero_snr": True, "use_lu_lambdas": True}
    for steps in (4, 10, 25):
        theirs = diffusers.DPMSolverMultistepScheduler(**config)
        theirs.set_timesteps(steps)
        ours = schedulers.make({"_class_name": "DPMSolverMultistepScheduler", **config}, steps)
        np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())


def test_euler_of_continuous_timesteps_in_log_linear_steps() -> None:
    """diffusers has one call more than steps there."""
    config = {"timestep_type": "continuous", "prediction_type": "v_prediction", "interpolation_type": "log_linear"}
    theirs = diffusers.EulerDiscreteScheduler(**config)
    theirs.set_timesteps(5)
    ours = schedulers.make({"_class_name": "EulerDiscreteScheduler", **config}, 5)
    assert len(ours.timesteps) == 6
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.sigmas, theirs.sigmas.numpy()[:-1], rtol=1e-6)


def test_numbers_of_numpy_in_a_config() -> None:
    betas = np.linspace(0.0001, 0.02, 1000)
    made = [
        schedulers.make({"_class_name": "DDIMScheduler", "trained_betas": list(kind), "steps_offset": offset}, 5)
        for kind, offset in ((betas, np.int64(1)), (betas.tolist(), 1))
    ]
    np.testing.assert_array_equal(made[0].timesteps, made[1].timesteps)
    with pytest.raises(InputError, match="steps_offset: expected an integer"):
        schedulers.make({"_class_name": "DDIMScheduler", "steps_offset": np.float64(1)}, 5)
    with pytest.raises(InputError, match="expected a finite number"):
        schedulers.make({"_class_name": "DDIMScheduler", "beta_end": np.float64("nan")}, 5)


def test_steps_that_float32_cannot_take() -> None:
    config = {"_class_name": "KDPM2AncestralDiscreteScheduler", "beta_schedule": "squaredcos_cap_v2"}
    with pytest.raises(InputError, match="2 steps of this schedule are so long"):
        schedulers.make(config, 2)
    assert np.isfinite(schedulers.make(config, 12).timesteps).all()
    for sigmas, message in (([1e-30, 1e-50, 0], "sigmas end at 1e-50"), ([1 + 1e-12, 1, 0], "more than float32")):
        with pytest.raises(InputError, match=message):
            schedulers.make(schedulers.resolve("Euler", SD1), None, sigmas=sigmas)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_sgm_uniform(steps: int) -> None:
    """k-diffusion's formula: equal steps of t from the first training step to the last, the last one left out."""
    made = schedulers.make(schedulers.resolve("Euler SGM Uniform", SD1), steps)
    expected = np.linspace(999, 0, steps + 1)[:-1]
    np.testing.assert_allclose(made.timesteps, expected, rtol=1e-6)
    t = diffusers.EulerDiscreteScheduler(**SD1).alphas_cumprod.double().numpy()
    log_sigma = np.interp(expected, np.arange(1000), 0.5 * np.log((1 - t) / t))
    x = np.ones((1, 4, 8, 8), np.float32)
    np.testing.assert_allclose(
        made.scale(x, steps - 1)[0, 0, 0, 0], 1 / np.sqrt(np.exp(2 * log_sigma[-1]) + 1), rtol=1e-6
    )
    # The multistep solvers of diffusers space "linspace" so, in whole steps.
    sgm, linspace = (
        schedulers.make({**schedulers.resolve("DPM++ 2M", SD1), "timestep_spacing": spacing}, steps)
        for spacing in ("sgm_uniform", "linspace")
    )
    np.testing.assert_array_equal(sgm.timesteps, linspace.timesteps)


def test_every_option_of_diffusers_is_known() -> None:
    """A model's config may be written for any of its classes; what such a class has is no unknown option."""
    classes = {name: solver for name, solver in schedulers.CLASSES.items() if hasattr(diffusers, name)}
    for name in (*(k.name for k in diffusers.schedulers.KarrasDiffusionSchedulers), *classes):
        theirs = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "args", "kwargs"}
        assert theirs <= options.FOREIGN, name
    for name, solver in classes.items():
        theirs = inspect.signature(getattr(diffusers, name).__init__).parameters
        own = {field: default.default for field, default in solver.OPTIONS.__dataclass_fields__.items()}
        for option, default in own.items():
            if option in theirs:
                assert default == theirs[option].default or (default, theirs[option].default) == ((), []), (
                    f"{name}: {option}"
                )


@pytest.mark.parametrize("name", sorted(schedulers.CLASSES))
def test_about(name: str) -> None:
    about = schedulers.CLASSES[name].ABOUT
    assert about.diffusers == name
    assert about.what
    assert about.paper
    assert about.accepts <= {"timesteps", "sigmas", "eta"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": [1, 2]}, "timesteps must fall"),
        ({"timesteps": [2, 2]}, "timesteps must fall"),
        ({"timesteps": [5, -1]}, "not below 0"),
        ({"timesteps": [1001, 1]}, "beyond the training schedule"),
        ({"timesteps": []}, "expected a list of 1 to"),
        ({"timesteps": 3}, "expected a list of 1 to"),
        ({"timesteps": [[3, 2]]}, "not all finite numbers"),
        ({"timesteps": [float("nan")]}, "not all finite numbers"),
        ({"timesteps": [float("inf"), 1.0]}, "not all finite numbers"),
        ({"timesteps": [True]}, "not all finite numbers"),
        ({"timesteps": list(range(200_000, 0, -1))}, "expected a list of 1 to"),
        ({"timesteps": [5, 1], "sigmas": [1.0, 0.0]}, "both given"),
        ({"timesteps": [5, 1], "steps": 3}, "num_inference_steps is 3"),
        ({"sigmas": [1.0, 0.5]}, "append 0"),
        ({"sigmas": [0.0]}, r"sigmas is \[0.0\], which is for no step"),
        ({"sigmas": np.array(3.0)}, "expected a list of 1 to"),
        ({"sigmas": np.ones((2, 2))}, "not all finite numbers"),
        ({"timesteps": [[3], [2, 1]]}, "not all finite numbers"),
        ({"timesteps": [10**400, 1]}, "not all finite numbers"),
        ({"timesteps": ["3", "1"]}, "not all finite numbers"),
        ({"timesteps": 10**5000}, "too long to show"),
        ({"timesteps": np.array([])}, "expected a list of 1 to"),
        ({"eta": 10**400, "_class_name": "DDIMScheduler"}, "eta is 1000"),
        ({"eta": 10**5000, "_class_name": "DDIMScheduler"}, "eta is a value of type int that is too long"),
        ({"eta": "1", "_class_name": "DDIMScheduler"}, "eta is '1'"),
        *(({"steps": bad}, "num_inference_steps is .*, expected an integer") for bad in (True, 2.5, "3", float("nan"))),
        ({"steps": 10**400}, "num_inference_steps is 1000"),
        ({"steps": 10**5000}, "num_inference_steps is a value of type int that is too long"),
        ({"eta": 0.5}, "EulerDiscreteScheduler takes no eta"),
        ({}, "num_inference_steps is not given"),
        ({"_class_name": "DDIMScheduler", "timesteps": [5, 1]}, "DDIMScheduler takes no timesteps"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "sigmas": [5, 1]},
            "DPMSolverMultistepScheduler takes no sigmas",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "timesteps": [5.5, 1]}, "must be whole numbers"),
        ({"use_karras_sigmas": True, "timesteps": [5, 1]}, "use_karras_sigmas sets them too"),
        ({"timestep_spacing": "ays", "timesteps": [5, 1]}, "'ays' sets them too"),
        (
            {"use_karras_sigmas": True, "sigmas": [5.0, 1.0, 0.0]},
            "sigmas are given, and use_karras_sigmas sets them too",
        ),
        ({"timestep_spacing": "ddim_uniform", "sigmas": [5.0, 1.0, 0.0]}, "sigmas are given, and timestep_spacing"),
    ],
    ids=lambda value: quoted(value, 40),
)
def test_what_is_set_by_hand_is_checked(arguments: dict[str, Any], message: str) -> None:
    given = {key: arguments[key] for key in ("timesteps", "sigmas", "eta") if key in arguments}
    config = {"_class_name": "EulerDiscreteScheduler"} | {
        k: v for k, v in arguments.items() if k not in (*given, "steps")
    }
    with pytest.raises(InputError, match=message):
        schedulers.make(config, arguments.get("steps"), **given)
