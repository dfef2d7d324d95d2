"""``scheduler_config.json`` and what is made of it: a file, or a dict that a caller gives; then steps.

An input is JSON (with NaN, infinities and big integers as Python reads them): {"config", "name", "steps", "as"}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdrt import schedulers
from sdrt.errors import InputError
from sdrt.noise import StepNoise, TorchGenerator
from tests.fuzz import mutate as mutators

BASE = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "num_train_timesteps": 1000, "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip
FULL = {
    "DDIMScheduler": {"clip_sample": True, "clip_sample_range": 1.0, "set_alpha_to_one": True, "thresholding": False},
    "EulerDiscreteScheduler": {
        "interpolation_type": "linear", "use_karras_sigmas": True, "sigma_min": 0.03, "sigma_max": 14.6,
        "timestep_type": "discrete", "final_sigmas_type": "zero",
    },
    "DPMSolverMultistepScheduler": {
        "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True,
        "euler_at_final": False, "use_karras_sigmas": False, "final_sigmas_type": "zero", "lambda_min_clipped": -5.0,
        "variance_type": None,
    },
    "PNDMScheduler": {"set_alpha_to_one": False},
    "DEISMultistepScheduler": {"solver_order": 3, "use_beta_sigmas": True, "solver_type": "logrho", "algorithm_type": "deis"},
    "DPMSolverSinglestepScheduler": {
        "solver_order": 3, "algorithm_type": "dpmsolver++", "lower_order_final": True, "use_exponential_sigmas": False,
        "final_sigmas_type": "sigma_min", "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0,
    },
    "HeunDiscreteScheduler": {"clip_sample": True, "clip_sample_range": 2.0, "use_beta_sigmas": False},
    "KDPM2DiscreteScheduler": {"use_karras_sigmas": False},
    "LMSDiscreteScheduler": {"use_exponential_sigmas": False},
    "UniPCMultistepScheduler": {
        "solver_order": 3, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True, "disable_corrector": [0, 1],
        "final_sigmas_type": "sigma_min", "sigma_min": None, "sigma_max": None, "use_flow_sigmas": False, "flow_shift": 3.0,
    },
    "DDPMScheduler": {"variance_type": "fixed_large", "clip_sample": True, "clip_sample_range": 2.0, "thresholding": False},
    "DPMSolver2SAncestralScheduler": {"use_karras_sigmas": True},
    "DPMSolverFastScheduler": {},
    "DPMSolverSDEScheduler": {"use_beta_sigmas": True, "noise_sampler_seed": None},
    "EulerAncestralDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {"use_exponential_sigmas": True},
    "LCMScheduler": {"original_inference_steps": 100, "timestep_scaling": 10.0, "clip_sample": True, "clip_sample_range": 2.0},
    "RestartScheduler": {"use_karras_sigmas": False},
    "SASolverScheduler": {
        "predictor_order": 3, "corrector_order": 4, "tau_func": None, "algorithm_type": "data_prediction", "lower_order_final": False,
        "use_karras_sigmas": True, "lambda_min_clipped": -5.0, "variance_type": None, "flow_shift": 3.0,
    },
    "TCDScheduler": {"original_inference_steps": 50},
}  # fmt: skip
"""Those that have betas."""
FLOW = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0, "shift_terminal": 0.1, "use_beta_sigmas": True, "base_shift": 0.5},
    "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
    "EDMEulerScheduler": {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0, "sigma_schedule": "karras"},
    "EDMDPMSolverMultistepScheduler": {"solver_order": 3, "sigma_schedule": "exponential", "thresholding": True},
}  # fmt: skip
SPACING = ("leading", "linspace", "trailing")
KINDS = ("epsilon", "v_prediction", "sample")
STEPS = (1, 2, 3, 4, 7, 10, 20, 50, 100, 333, 500, 501, 999, 1000)


def seeds() -> list[bytes]:
    found = []
    for name, more in (FULL | FLOW).items():
        for i in range(3):
            config = {**BASE, **more, "_class_name": name, "timestep_spacing": SPACING[i], "prediction_type": KINDS[i],
                      "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2")[i], "rescale_betas_zero_snr": i == 1}  # fmt: skip
            found.append({"config": config, "name": None, "steps": 20, "as": ("file", "dict", "model")[i]})
    small = {**BASE, "num_train_timesteps": 10, "trained_betas": [0.01 * i for i in range(1, 11)], "steps_offset": 0}
    found += [{"config": small, "name": name, "steps": 5, "as": "file"} for name in (None, *schedulers.A1111)]
    return [json.dumps(value).encode() for value in found]


def monsters() -> list[tuple[str, bytes]]:
    def one(steps: object = 20, kind: str = "file", name: object = None, **config: object) -> bytes:
        return mutators.written({"config": {**BASE, **config}, "name": name, "steps": steps, "as": kind}).encode()

    found = [
        ("10^9 steps", one(10**9)),
        *((f"nothing left, {spacing}", one(_class_name="DPMSolverMultistepScheduler", lambda_min_clipped=30, timestep_spacing=spacing)) for spacing in SPACING),
        ("10^18 training steps", one(num_train_timesteps=10**18)),
        ("the most training steps", one(1000, num_train_timesteps=10**5)),
        ("as many steps", one(10**5, num_train_timesteps=10**5, steps_offset=0)),
        ("a million betas", one(trained_betas=[0.5] * 10**6)),
        ("many betas", one(trained_betas=[0.01] * 10**5, num_train_timesteps=10**5)),
        ("a million unknown options", one(**{f"x{i}": 0 for i in range(10**6)})),
        ("a million unknown options of a dict", one(kind="dict", **{f"x{i}": 0 for i in range(10**6)})),
        ("an option of megabytes", one(**{"x" * 10**7: 0})),
        ("a class of megabytes", one(_class_name="x" * 10**7)),
        ("a name of megabytes", one(name="x" * 10**7)),
        ("a value of megabytes", one(beta_start=[0.5] * 10**6)),
        ("integers without end", one(kind="dict", beta_start=mutators.Token("9" * 4000), num_train_timesteps=mutators.Token("9" * 4000))),
    ]  # fmt: skip
    for name in FULL:
        for n in (1, 2, 10, 1000):
            for beta in (1e-45, 1e-38, 1e-12, 1e-8, 0.5, 0.99, 0.9999999, 0.99999999999):
                for more in (
                    {},
                    {"rescale_betas_zero_snr": True},
                    {"use_karras_sigmas": True},
                    {"prediction_type": "v_prediction"},
                ):
                    config = {
                        "_class_name": name,
                        "num_train_timesteps": n,
                        "beta_start": beta,
                        "beta_end": beta,
                        "steps_offset": 0,
                    }
                    found.append((f"{name} {n} {beta} {more}", one(min(n, 10), **config, **more)))
    return found


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    chosen = json.loads(rng.choice(seeds))
    if rng.random() < 0.7:
        chosen["steps"] = rng.choice(STEPS) if rng.random() < 0.9 else rng.choice(mutators.NUMBERS)
    if rng.random() < 0.3:
        chosen["name"] = rng.choice((None, *schedulers.A1111, *schedulers.CLASSES, *mutators.TEXTS))
    if rng.random() < 0.3:
        chosen["as"] = rng.choice(("file", "dict", "model"))
    if rng.random() < 0.3:
        chosen["config"]["timestep_spacing"] = rng.choice(SPACING)
        chosen["config"]["prediction_type"] = rng.choice(KINDS)
    for key in (
        "beta_start",
        "beta_end",
        "sigma_min",
        "sigma_max",
        "lambda_min_clipped",
        "clip_sample_range",
        "sample_max_value",
        "flow_shift",
        "shift",
    ):
        if rng.random() < 0.1:
            chosen["config"][key] = rng.choice(
                (10 ** rng.uniform(-45, 2), rng.random(), -rng.random() * 10, 1 - 10 ** rng.uniform(-17, 0))
            )
    if rng.random() < 0.1:
        n = chosen["config"]["num_train_timesteps"] = rng.choice((1, 2, 3, 10, 50, 1000))
        if rng.random() < 0.5:
            chosen["config"]["trained_betas"] = [10 ** rng.uniform(-rng.choice((1, 10, 40)), 0) for _ in range(n)]
    wrapped = json.dumps(chosen["config"]).encode()
    if rng.random() < 0.5:
        wrapped = mutators.json_bytes(rng, [wrapped])
    return b"%s\n%s" % (json.dumps({k: v for k, v in chosen.items() if k != "config"}).encode(), wrapped)


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The line that tells what to do, and the config's bytes; the seeds and monsters hold both as one object."""
    first, newline, rest = data.partition(b"\n")
    if newline:
        return json.loads(first), rest
    value = json.loads(data)
    return value, json.dumps(value["config"]).encode()


def feed(data: bytes, folder: Path) -> None:
    todo, raw = _parts(data)
    model: dict[str, Any] = dict(BASE)
    chosen: Any = todo["name"]
    if todo["as"] == "dict":
        try:
            chosen = json.loads(raw)
        except (ValueError, RecursionError):
            chosen = {**BASE, "beta_start": float("nan")}
    else:
        (folder / "scheduler_config.json").write_bytes(raw)
        model = schedulers.read_config(folder / "scheduler_config.json")
    config = schedulers.resolve(chosen, model)
    assert schedulers.label(config)
    steps = todo["steps"]
    if type(steps) is not int or steps < 1:  # GenerationRequest sees to that
        raise InputError("no number of steps")
    scheduler = schedulers.make(config, steps)
    calls = len(scheduler.timesteps)
    assert 1 <= calls <= max(2 * steps + 1, steps + 9)  # fewer where lambda_min_clipped cuts some off
    assert scheduler.timesteps.dtype == np.float32
    assert np.isfinite(scheduler.timesteps).all()
    assert np.isfinite(scheduler.init_sigma)
    draw = StepNoise([TorchGenerator(0)], [0], (4, 2, 2), "cpu")
    _walk(scheduler, 0, draw() * np.float32(scheduler.init_sigma), draw)
    scheduler = schedulers.make(config, steps)
    middle = calls // 2 // scheduler.order * scheduler.order  # as image to image does
    _walk(scheduler, middle, scheduler.add_noise(draw(), draw(), middle), draw)


def _walk(scheduler: Any, first: int, x: Any, draw: Any) -> None:
    """The calls from ``first`` on, at most 12 of them: everything stays finite."""
    for i in range(first, min(len(scheduler.timesteps), first + 12)):
        seen = scheduler.scale(x, i)
        assert np.isfinite(seen).all(), f"scaled latents of call {i}"
        x, x0 = scheduler.step(x, draw(), i, draw)
        assert np.isfinite(x).all(), f"latents after call {i}"
        assert np.isfinite(x0).all(), f"x0 of call {i}"
