"""Noise schedules: betas → alphas_cumprod → sigmas, timestep spacings, and eps / v / sample → x0.

Two ways to write the same noisy latents: variance preserving, x = α·x0 + s·ε with α² + s² = 1, and k-diffusion's
variance exploding, x = x0 + σ·ε with σ = s/α. Tables are computed in float32 where diffusers computes them so, because
a schedule's rounding is part of the picture.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import InputError, quoted

Array = NDArray[Any]
"""float32, unless a comment says otherwise."""
Noise = Callable[[], Array]
"""Draws fresh standard normal noise of the latents' shape."""

MAX_TRAIN_TIMESTEPS = 100_000
MIN_ALPHA_BAR = 1e-30
"""ᾱ whose σ, squared, float32 still holds with room to spare. The cosine schedule's smallest is about 2e-9."""

Prediction = Literal["epsilon", "sample", "v_prediction"]


class Scheduler(Protocol):
    """One generation's solver: made fresh for each, owns its history; one model call per entry of ``timesteps``."""

    timesteps: Array
    """f32[calls], from noise to picture, in units of training steps."""

    init_sigma: float
    """Standard deviation of the first latents."""

    def scale(self, x: Array, i: int) -> Array:
        """What the network is given at call ``i`` for the latents x: f32[B,C,h,w]."""

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        """The latents that call ``i`` starts from when the loop begins there: x0 with the noise of that level."""

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        """Latents before call i + 1, and the predicted x0 (for previews), from the network's output at call i.

        The first call need not be 0: image to image begins in the middle.
        """


@dataclass(frozen=True)
class TrainingSchedule:
    """The options of scheduler_config.json that every class shares; names and defaults are diffusers'."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
            raise InputError(f"num_train_timesteps is {self.num_train_timesteps}, expected 2 to {MAX_TRAIN_TIMESTEPS}")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise InputError(f"trained_betas has {len(self.trained_betas)} values, expected {self.num_train_timesteps}")
        if self.trained_betas is not None and not all(0 < beta < 1 for beta in self.trained_betas):
            raise InputError("trained_betas must lie between 0 and 1")
        if not 0 < self.beta_start < 1 or not 0 < self.beta_end < 1:
            raise InputError(f"beta_start {self.beta_start} and beta_end {self.beta_end} must lie between 0 and 1")
        if not 0 <= self.steps_offset < self.num_train_timesteps:
            raise InputError(f"steps_offset is {self.steps_offset}, expected 0 to {self.num_train_timesteps - 1}")


def betas(options: TrainingSchedule) -> Array:
    """f32[num_train_timesteps]; the schedules of DDPM, latent diffusion and improved DDPM (cosine)."""
    n = options.num_train_timesteps
    if options.trained_betas is not None:
        return np.array(options.trained_betas, np.float32)
    if options.beta_schedule == "linear":
        return linspace(options.beta_start, options.beta_end, n)
    if options.beta_schedule == "scaled_linear":
        return linspace(math.sqrt(options.beta_start), math.sqrt(options.beta_end), n) ** 2
    bar = [math.cos((t / n + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(n + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(bar)], np.float32)


def linspace(start: float, end: float, n: int) -> Array:
    """``torch.linspace`` in float32: the first half counts up from start, the second half down from end.

    torch's vectorised code multiplies and adds with one rounding; float64 in between gives the same.
    """
    first, last = np.float32(start), np.float32(end)
    if n == 1:
        return np.array([first])
    step = (last - first) / np.float32(n - 1)
    index = np.arange(n, dtype=np.float64)
    rising, falling = float(first) + float(step) * index, float(last) - float(step) * (n - 1 - index)
    return np.where(index < n // 2, rising, falling).astype(np.float32)


def cumprod(values: Array) -> Array:
    """``torch.cumprod`` of float32: accumulated in float64, rounded at each entry."""
    return np.cumprod(values.astype(np.float64)).astype(np.float32)


def alphas_cumprod(options: TrainingSchedule) -> Array:
    """ᾱ: f32[num_train_timesteps], falling; with ``rescale_betas_zero_snr`` it ends at 0 (arXiv 2305.08891, alg. 1).

    InputError for betas with which some step adds no noise, or leaves nothing but noise, as far as float32 tells.
    """
    alphas = np.float32(1.0) - betas(options)
    if options.rescale_betas_zero_snr:
        root = np.sqrt(cumprod(alphas))
        first, last = root[0], root[-1]
        if not first > last:
            raise _degenerate(options)
        bar = ((root - last) * (first / (first - last))) ** 2
        if not (bar[:-1] > 0).all():
            raise _degenerate(options)
        alphas = np.float32(1.0) - (np.float32(1.0) - np.concatenate([bar[:1], bar[1:] / bar[:-1]]))
    alpha_bar = cumprod(alphas)
    noisy = alpha_bar[:-1] if options.rescale_betas_zero_snr else alpha_bar
    if not (alpha_bar[0] < 1 and (np.diff(alpha_bar) < 0).all() and noisy[-1] >= MIN_ALPHA_BAR):
        raise _degenerate(options)
    return alpha_bar


def _degenerate(options: TrainingSchedule) -> InputError:
    return InputError(
        "the betas are too small or too large: in float32 some training step adds no noise, or leaves nothing else"
        f" (beta_start {options.beta_start:g}, beta_end {options.beta_end:g}, {options.num_train_timesteps} steps)"
    )


def training_sigmas(alpha_bar: Array) -> Array:
    """σ = sqrt((1 - ᾱ) / ᾱ), f32, rising; where ᾱ is 0 it is taken as 2^-24, as in diffusers."""
    safe = np.where(alpha_bar > 0, alpha_bar, np.float32(2.0**-24))
    return np.sqrt((np.float32(1.0) - safe) / safe)


def check_steps(steps: int, options: TrainingSchedule) -> None:
    """InputError unless the training schedule has that many steps."""
    if not 1 <= steps <= options.num_train_timesteps:
        raise InputError(f"num_inference_steps is {steps}, expected 1 to {options.num_train_timesteps}")


def check_timesteps(timesteps: Array, options: TrainingSchedule) -> Array:
    """The timesteps, if the training schedule holds them all; InputError for an offset that pushes them out."""
    if not len(timesteps):
        raise InputError("lambda_min_clipped leaves no timestep", "choose a lower one")
    top = float(timesteps.max())
    if top > options.num_train_timesteps - 1 or float(timesteps.min()) < 0:
        raise InputError(
            f"timestep {top:g} is beyond the training schedule's last, {options.num_train_timesteps - 1}"
            f" (steps_offset {options.steps_offset}, {options.timestep_spacing} spacing)",
            "take fewer steps",
        )
    return timesteps.astype(np.float32)


def karras(sigma_min: float, sigma_max: float, steps: int) -> NDArray[np.float64]:
    """f64[steps], falling from sigma_max to sigma_min: arXiv 2206.00364, equation 5, with ρ = 7."""
    rho = 7.0
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas: NDArray[np.float64] = (high + np.linspace(0, 1, steps) * (low - high)) ** rho
    return sigmas


def sigma_to_t(sigmas: NDArray[np.float64], log_sigmas: Array) -> NDArray[np.float64]:
    """Fractional timesteps whose log σ, interpolated linearly in the training table, are those of ``sigmas``."""
    logs = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_sigmas, logs, side="right") - 1, 0, len(log_sigmas) - 2)
    below, above = log_sigmas[low].astype(np.float64), log_sigmas[low + 1].astype(np.float64)
    weight = np.clip((below - logs) / (below - above), 0, 1)
    return (1 - weight) * low + weight * (low + 1)


def x0_from(pred: Array, x: Array, alpha: float, s: float, kind: Prediction) -> Array:
    """x0 of variance-preserving latents x = α·x0 + s·ε. v = α·ε - s·x0 (arXiv 2202.00512)."""
    if kind == "epsilon":
        return (x - s * pred) / alpha
    if kind == "v_prediction":
        return alpha * x - s * pred
    return pred


O = TypeVar("O", bound=TrainingSchedule)  # noqa: E741 - O for options
_hints = functools.cache(get_type_hints)  # without it, three quarters of the time that making a scheduler takes


def read_options(kind: type[O], config: Mapping[str, Any], name: str) -> O:
    """Fill a solver's options from scheduler_config.json.

    A key that belongs to other diffusers schedulers only is passed over, as ``from_config`` does; any other unknown
    key, and a value of the wrong type, is an InputError.
    """
    hints = _hints(kind)  # type: ignore[arg-type] # to mypy, a class whose instances have a hash has none itself
    values: dict[str, Any] = {}
    for key, value in config.items():
        if key in hints:
            values[key] = _option(hints[key], value, f"{name}: {key}")
        elif not key.startswith("_") and key not in FOREIGN:
            known = ", ".join(field.name for field in dataclasses.fields(kind))
            raise InputError(f"{name} has no option {quoted(key)}; known options: {known}")
    return kind(**values)


def _option(hint: Any, value: Any, where: str) -> Any:
    """One value as its annotation has it: bool, int, float, Literal, tuple of floats, or one of them ``| None``."""
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    for kind in kinds:
        # An integer beyond 64 bits is nowhere meant, and some are no float, or cannot be shown in an error.
        whole = type(value) is int and -(2**63) <= value < 2**63
        number = whole or (type(value) is float and math.isfinite(value))
        if value is None and kind is type(None):
            return None
        if get_origin(kind) is Literal and isinstance(value, str) and value in get_args(kind):
            return value
        if kind is float and number:
            return float(value)
        if (kind is bool and type(value) is bool) or (kind is int and whole):
            return value
        if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            if len(value) > MAX_TRAIN_TIMESTEPS:
                raise InputError(f"{where} has {len(value)} values, at most {MAX_TRAIN_TIMESTEPS}")
            return tuple(_option(float, item, f"{where}[{i}]") for i, item in enumerate(value))
    expected = " or ".join(_spoken(kind) for kind in kinds)
    raise InputError(f"{where}: expected {expected}, got {quoted(value)}")


def _spoken(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of numbers"
    return {bool: "true or false", int: "an integer", float: "a finite number", type(None): "null"}[kind]


def diffused(x0: Array, noise: Array, alpha_bar: Any) -> Array:
    """x0 with the noise of level ᾱ, variance preserving: √ᾱ·x0 + √(1-ᾱ)·ε; in float32, as diffusers' ``add_noise``."""
    bar = np.float32(alpha_bar)
    noisy: Array = np.sqrt(bar) * x0 + np.sqrt(np.float32(1) - bar) * noise
    return noisy


FOREIGN = frozenset({
    "skip_prk_steps", "set_alpha_to_one", "clip_sample", "clip_sample_range", "thresholding", "sample_max_value",
    "dynamic_thresholding_ratio", "variance_type", "solver_order", "algorithm_type", "solver_type", "lower_order_final",
    "euler_at_final", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
    "use_flow_sigmas", "flow_shift", "final_sigmas_type", "lambda_min_clipped", "interpolation_type", "sigma_min",
    "sigma_max", "timestep_type", "use_dynamic_shifting", "time_shift_type", "timestep_scaling",
    "original_inference_steps", "predict_x0", "solver_p", "disable_corrector", "sigma_data", "rho",
    "noise_sampler_seed", "shift_terminal", "eta",
})  # fmt: skip
"""Options of other diffusers schedulers, which a config that was written for one of those may hold."""


def unsupported(name: str, **options: tuple[Any, Any]) -> None:
    """InputError for each option, given as (value, the only value supported), that asks for something else."""
    for option, (value, supported) in options.items():
        if value != supported:
            raise InputError(
                f"{name}: {option}={value!r} is not supported; supported: {supported!r}",
                "choose another scheduler, or change scheduler_config.json",
            )
