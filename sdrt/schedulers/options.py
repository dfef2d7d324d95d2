"""Reading a solver's options from scheduler_config.json: names, types and defaults are diffusers'."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from sdrt.errors import InputError, quoted

MAX_VALUES = 100_000
"""Of one option that is a list, and of training steps."""

FOREIGN = frozenset({
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "steps_offset", "rescale_betas_zero_snr",
    "skip_prk_steps", "set_alpha_to_one", "clip_sample", "clip_sample_range", "thresholding", "sample_max_value",
    "dynamic_thresholding_ratio", "variance_type", "solver_order", "algorithm_type", "solver_type", "lower_order_final",
    "euler_at_final", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "use_flow_sigmas", "flow_shift", "final_sigmas_type", "lambda_min_clipped", "interpolation_type", "sigma_min",
    "sigma_max", "timestep_type", "use_dynamic_shifting", "time_shift_type", "timestep_scaling",
    "original_inference_steps", "predict_x0", "solver_p", "disable_corrector", "sigma_data", "sigma_schedule", "rho",
    "noise_sampler_seed", "shift", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
    "invert_sigmas", "shift_terminal", "stochastic_sampling", "predictor_order", "corrector_order", "tau_func", "eta",
    "s_noise", "corrector_steps", "sampling_eps", "snr",
})  # fmt: skip
"""Options of any diffusers scheduler, which a config that was written for another class may hold."""

O = TypeVar("O")  # noqa: E741 - O for options
_hints = functools.cache(get_type_hints)  # without it, three quarters of the time that making a scheduler takes


def read(kind: type[O], config: Mapping[str, Any], name: str) -> O:
    """Fill a solver's options, a frozen dataclass, from scheduler_config.json.

    A key that belongs to other diffusers schedulers only is passed over, as ``from_config`` does; any other unknown
    key, and a value of the wrong type, is an InputError.
    """
    hints = _hints(kind)  # type: ignore[arg-type] # to mypy, a class whose instances have a hash has none itself
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key in hints:
            values[key] = _option(hints[key], value, f"{name}: {key}")
        elif not key.startswith("_") and key not in FOREIGN:
            known = ", ".join(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type] # O is one
            raise InputError(f"{name} has no option {quoted(key)}; known options: {known}")
    return kind(**values)


def accepts(kind: type, **options: Any) -> bool:
    """Whether a solver's options have these names, and these values are among those that they may take."""
    hints = _hints(kind)
    try:
        return all(name in hints and _option(hints[name], value, name) == value for name, value in options.items())
    except InputError:
        return False


def unsupported(name: str, **options: tuple[Any, Any]) -> None:
    """InputError for each option, given as (value, the only value supported), that asks for something else."""
    for option, (value, supported) in options.items():
        if value != supported:
            raise InputError(
                f"{name}: {option}={value!r} is not supported; supported: {supported!r}",
                "choose another scheduler, or change scheduler_config.json",
            )


def _option(hint: Any, value: Any, where: str) -> Any:
    """One value as its annotation has it: bool, int, float, Literal, tuple of numbers, or one of them ``| None``."""
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    for kind in kinds:
        # An integer beyond 64 bits is nowhere meant, and some are no float, or cannot be shown in an error.
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        whole = integer and -(2**63) <= int(value) < 2**63
        number = whole or (isinstance(value, (float, np.floating)) and math.isfinite(value))
        if value is None and kind is type(None):
            return None
        if get_origin(kind) is Literal and isinstance(value, str) and value in get_args(kind):
            return value
        if kind is float and number:
            return float(value)
        if kind is bool and type(value) is bool:
            return value
        if kind is int and whole:
            return int(value)
        if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            if len(value) > MAX_VALUES:
                raise InputError(f"{where} has {len(value)} values, at most {MAX_VALUES}")
            inner = get_args(kind)[0]
            return tuple(_option(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    expected = " or ".join(_spoken(kind) for kind in kinds)
    raise InputError(f"{where}: expected {expected}, got {quoted(value)}")


def _spoken(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of numbers"
    return {bool: "true or false", int: "an integer", float: "a finite number", type(None): "null"}[kind]
