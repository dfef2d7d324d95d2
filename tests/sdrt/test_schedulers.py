"""Schedulers against diffusers', step by step, given the same model outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdrt import schedulers
from sdrt.errors import BundleError, InputError
from sdrt.schedulers import tables

SD1 = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True, "trained_betas": None,
}  # fmt: skip
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{}, {"clip_sample": True, "set_alpha_to_one": True}, {"steps_offset": 0}],
    "EulerDiscreteScheduler": [{}, {"use_karras_sigmas": True}, {"final_sigmas_type": "sigma_min"}, {"steps_offset": 0}],
    "DPMSolverMultistepScheduler": [
        {}, {"use_karras_sigmas": True}, {"solver_type": "heun"}, {"final_sigmas_type": "sigma_min"},
        {"euler_at_final": True}, {"solver_order": 1}, {"lower_order_final": False},
    ],
    "PNDMScheduler": [{}, {"set_alpha_to_one": True}],
}  # fmt: skip
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


def reference(config: dict[str, Any], steps: int) -> Any:
    made = getattr(diffusers, config["_class_name"]).from_config(config)
    made.set_timesteps(steps)
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(0)
    return made


def relative(expected: np.ndarray, got: np.ndarray) -> float:
    return float(np.abs(expected - got).max() / np.abs(expected).max())


@pytest.mark.parametrize("steps", [2, 5, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_steps_equal_diffusers(name: str, options: dict[str, Any], spacing: str, prediction: str, steps: int) -> None:
    """Re-synchronised at each step: 1e-6 relative; left to itself to the end: 1e-5."""
    config = {**SD1, **options, "_class_name": name, "timestep_spacing": spacing, "prediction_type": prediction}
    theirs, ours, alone = reference(config, steps), schedulers.make(config, steps), schedulers.make(config, steps)
    # 1e-4 of a training step: karras timesteps are interpolated, in float32 there and in float64 here.
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy().astype(np.float32), rtol=0, atol=1e-4)
    assert ours.init_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    # PLMS in one or two calls of v-prediction divides by sqrt(ᾱ_999) = 0.07: one rounding is 1.4e-6 of the result.
    bar = 2e-6 if (name, prediction) == ("PNDMScheduler", "v_prediction") and steps < 5 else 1e-6
    generator = np.random.default_rng(steps)
    x = (generator.standard_normal((2, 4, 8, 8)) * ours.init_sigma).astype(np.float32)
    synchronised, own = torch.from_numpy(x), x
    for i, timestep in enumerate(theirs.timesteps):
        pred = generator.standard_normal(x.shape).astype(np.float32)
        assert (
            relative(theirs.scale_model_input(synchronised, timestep).numpy(), ours.scale(synchronised.numpy(), i))
            <= bar
        )
        got, _ = ours.step(synchronised.numpy(), pred, i, _no_noise)
        own, _ = alone.step(own, pred, i, _no_noise)
        synchronised = theirs.step(torch.from_numpy(pred), timestep, synchronised).prev_sample
        assert got.dtype == np.float32
        assert relative(synchronised.numpy(), got) <= bar, f"step {i}"
    assert relative(synchronised.numpy(), own) <= 1e-5


def _no_noise() -> Any:
    raise AssertionError("a deterministic solver drew noise")


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_predicted_x0_equals_diffusers(name: str, prediction: str) -> None:
    config = {**SD1, "_class_name": name, "prediction_type": prediction}
    theirs, ours = reference(config, 10), schedulers.make(config, 10)
    x, pred = np.random.default_rng(0).standard_normal((2, 1, 4, 8, 8)).astype(np.float32)
    theirs.scale_model_input(torch.from_numpy(x), theirs.timesteps[0])
    expected = theirs.step(torch.from_numpy(pred), theirs.timesteps[0], torch.from_numpy(x)).pred_original_sample
    assert relative(expected.numpy(), ours.step(x, pred, 0, _no_noise)[1]) <= 1e-6


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
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "algorithm_type="),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order=3"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "skip_prk_steps=False"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_said(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        schedulers.make(schedulers.resolve(config, {}), 10)


@pytest.mark.parametrize("scheduler", ["Heun", "", {"_class_name": "HeunDiscreteScheduler"}, {}, 3, {3: 1}])
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
    key=st.sampled_from(sorted([*SD1, "prediction_type", "solver_order", "sigma_min"])),
    value=JSON,
)
def test_any_value_of_any_option(name: str, key: str, value: Any) -> None:
    """A scheduler_config.json is somebody's input: it is read or refused, never a crash."""
    try:
        with np.errstate(all="ignore"):
            schedulers.make({**SD1, "_class_name": name, key: value}, 5)
    except InputError:
        pass


@pytest.mark.parametrize("name", sorted(schedulers.CLASSES))
def test_configs_as_diffusers_saves_them(name: str, tmp_path: Path) -> None:
    """DPMSolverMultistepScheduler's holds ``"lambda_min_clipped": -Infinity``, which is no JSON."""
    made = getattr(diffusers, name)(**{k: v for k, v in SD1.items() if k in getattr(diffusers, name)().config})
    made.save_pretrained(tmp_path)
    config = schedulers.read_config(tmp_path / "scheduler_config.json")
    assert json.loads(json.dumps(config, allow_nan=False)) == config
    for scheduler in (None, *schedulers.A1111):
        schedulers.make(schedulers.resolve(scheduler, config), 10)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler", "beta_start": -Infinity}')
    with pytest.raises(BundleError, match="-Infinity is not a JSON number"):
        schedulers.read_config(tmp_path / "scheduler_config.json")
