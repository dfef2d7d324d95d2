"""Noise schedules: betas → alphas_cumprod → sigmas, and eps / v / sample / flow → x0. ``levels`` spaces the steps.

Two ways to write the same noisy latents: variance preserving, x = α·x0 + s·ε with α² + s² = 1, and k-diffusion's
variance exploding, x = x0 + σ·ε with σ = s/α. Tables are computed in float32 where diffusers computes them so, because
a schedule's rounding is part of the picture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sdrt.brownian import Increments
from sdrt.errors import InputError, quoted
from sdrt.schedulers.options import MAX_VALUES

Array = NDArray[Any]
"""float32, unless a comment says otherwise."""

MAX_TRAIN_TIMESTEPS = MAX_VALUES
MAX_SIGMA = 1e9
"""Far beyond any noise; float32 holds its square."""
MIN_ALPHA_BAR = 1e-30
"""ᾱ whose σ, squared, float32 still holds with room to spare. The cosine schedule's smallest is about 2e-9."""

Prediction = Literal["epsilon", "sample", "v_prediction"]
Spacing = Literal["leading", "linspace", "trailing"]
AnyPrediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]


class Noise(Protocol):
    """Standard normal noise of the latents' shape."""

    def __call__(self) -> Array:
        """A fresh draw."""

    def brownian(self, low: float, high: float) -> Increments:
        """A Brownian motion over [low, high], the same for the same seeds, asked for from high to low."""


class Scheduler(Protocol):
    """One generation's solver: made fresh for each, owns its history; one model call per entry of ``timesteps``."""

    timesteps: Array
    """f32[calls], from noise to picture, in units of training steps."""

    init_sigma: float
    """Standard deviation of the first latents."""

    @property
    def sigmas(self) -> Array:
        """f32[calls]: σ of what each call is given, standard deviation of the noise over that of the picture.

        Of flows, the part of the mix that is noise.
        """

    @property
    def order(self) -> int:
        """Network calls a step: image to image, which leaves out whole steps, begins at call ``steps · order``."""

    def scale(self, x: Array, i: int) -> Array:
        """What the network is given at call ``i`` for the latents x: f32[B,C,h,w]."""

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        """The latents that call ``i`` starts from when the loop begins there: x0 with the noise of that level."""

    def step(self, x: Array, pred: Array, i: int, noise: Noise) -> tuple[Array, Array]:
        """Latents before call i + 1, and the predicted x0 (for previews), from the network's output at call i.

        The first call need not be 0: image to image begins in the middle.
        """


@dataclass(frozen=True)
class About:
    """What a solver class says of itself."""

    diffusers: str
    """diffusers' class."""
    what: str
    """One line, for somebody who chooses."""
    paper: str
    arxiv: str = ""
    accepts: frozenset[str] = frozenset()
    """Which of "timesteps", "sigmas" and "eta" a caller may give; as diffusers' ``set_timesteps`` and ``step``."""
    extra: frozenset[str] = frozenset()
    """Options that diffusers' class has not: passed over, as it does, in a model's own config."""
    unused: frozenset[str] = frozenset()
    """Options that are inherited and change nothing, as diffusers' class has them not either."""


@dataclass(frozen=True)
class Plan:
    """How many steps, and what a caller set of them by hand."""

    steps: int
    timesteps: NDArray[np.float64] | None = None
    """f64[steps], falling."""
    sigmas: NDArray[np.float64] | None = None
    """f64[…], falling; as many as diffusers' class wants: some with the last one, 0, some without."""
    eta: float | None = None


class Solver(Protocol):
    """A class of schedulers: what the table of them holds."""

    @property
    def ABOUT(self) -> About:  # noqa: N802 - constants of a class
        """Its facts."""

    @property
    def OPTIONS(self) -> type[Any]:  # noqa: N802
        """A frozen dataclass: see ``options.read``."""

    def __call__(self, config: Mapping[str, Any], plan: Plan) -> Scheduler:
        """A fresh scheduler. InputError for options and plans that it can not do."""


def plan(
    about: About,
    steps: int | None,
    *,
    timesteps: Sequence[float] | Array | None = None,
    sigmas: Sequence[float] | Array | None = None,
    eta: float | None = None,
) -> Plan:
    """What the caller asks for, checked as far as that goes without the training schedule.

    steps may be None where timesteps or sigmas say how many; given with them, it must be the same.
    """
    name = about.diffusers
    for argument, value in (("timesteps", timesteps), ("sigmas", sigmas), ("eta", eta)):
        if value is not None and argument not in about.accepts:
            raise InputError(f"{name} takes no {argument}", "leave it out, or choose another scheduler")
    if eta is not None and not (_number(eta) and 0 <= eta <= 1):
        raise InputError(f"eta is {quoted(eta)}, expected a number from 0 to 1")
    if timesteps is not None and sigmas is not None:
        raise InputError(f"{name}: timesteps and sigmas are both given", "give one")
    if steps is not None and not (_number(steps) and isinstance(steps, (int, np.integer))):
        raise InputError(f"num_inference_steps is {quoted(steps)}, expected an integer below {MAX_SIGMA:g}")
    times = levels = None
    count = steps
    if timesteps is not None:
        times, count = by_hand("timesteps", timesteps)
    if sigmas is not None:
        levels, count = by_hand("sigmas", sigmas)
    if count is None:
        raise InputError("num_inference_steps is not given", "give it, or timesteps")
    if steps is not None and steps != count:
        raise InputError(
            f"num_inference_steps is {quoted(steps)}, the {'timesteps' if levels is None else 'sigmas'} given are for"
            f" {count}",
            "leave num_inference_steps out",
        )
    return Plan(int(count), times, levels, None if eta is None else float(eta))


def _number(value: Any) -> bool:
    value = value.item() if isinstance(value, np.generic) else value
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_SIGMA  # NaN is not less


def by_hand(name: str, values: object) -> tuple[NDArray[np.float64], int]:
    """A caller's timesteps or sigmas, f64[…], falling, and how many steps they are for; InputError for anything else.

    A 0 at the end of sigmas is where the last step ends, no step of its own. Classes that want none refuse it.
    """
    listed = isinstance(values, (list, tuple)) or (isinstance(values, np.ndarray) and values.ndim > 0)
    if not listed or not 1 <= len(values) <= MAX_VALUES:  # type: ignore[arg-type] # it has a length then
        raise InputError(f"{name} is {quoted(values)}, expected a list of 1 to {MAX_VALUES} numbers")
    if not all(_number(value) for value in values):  # type: ignore[attr-defined] # and can be gone through
        raise InputError(f"{name} are not all finite numbers below {MAX_SIGMA:g}")
    array = np.array(values, np.float64)
    if not (np.diff(array) < 0).all() or array[-1] < 0:
        raise InputError(f"{name} must fall from one to the next, and not below 0")
    count = len(array) - bool(name == "sigmas" and array[-1] == 0)
    if name == "sigmas" and count and array[count - 1] < 1 / MAX_SIGMA:
        raise InputError(f"sigmas end at {array[count - 1]:g}, expected {1 / MAX_SIGMA:g} or more, or 0")
    if not (np.diff(array.astype(np.float32)) < 0).all():
        raise InputError(f"{name} must fall by more than float32 rounds off")
    if not count:
        raise InputError(f"{name} is {quoted(values)}, which is for no step", "begin with the first step's, above 0")
    return array, count


@dataclass(frozen=True)
class Options:
    """The option that every class has."""

    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if not 2 <= self.num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
            raise InputError(f"num_train_timesteps is {self.num_train_timesteps}, expected 2 to {MAX_TRAIN_TIMESTEPS}")


@dataclass(frozen=True)
class TrainingSchedule(Options):
    """The options of scheduler_config.json that most classes share; names and defaults are diffusers'."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Spacing = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
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
    if options.beta_schedule == "squaredcos_cap_v2":
        bar = [math.cos((t / n + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(n + 1)]
    else:  # "exp", which few classes take
        bar = [math.exp(-12.0 * t / n) for t in range(n + 1)]
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


def x0_from(pred: Array, x: Array, alpha: Any, s: Any, kind: AnyPrediction) -> Array:
    """x0 of latents x = α·x0 + s·ε. v = α·ε - s·x0 (arXiv 2202.00512); flow: ε - x0, where α = 1 - s."""
    x0 = pred
    if kind == "epsilon":
        x0 = (x - s * pred) / alpha
    elif kind == "v_prediction":
        x0 = alpha * x - s * pred
    elif kind == "flow_prediction":
        x0 = x - s * pred
    return x0


def denoised(pred: Array, x: Array, sigma: Any, kind: Prediction) -> Array:
    """x0 of latents x = x0 + σ·ε; σ: a float32 scalar, and diffusers' order of operations."""
    x0 = pred
    if kind == "epsilon":
        x0 = x - sigma * pred
    elif kind == "v_prediction":
        x0 = pred * (-sigma / np.sqrt(sigma**2 + 1)) + x / (sigma**2 + 1)
    return x0


def check_clip_range(clip: float) -> None:
    """InputError for a clip_sample_range that clips all or nothing."""
    if not 0 < clip <= MAX_SIGMA:
        raise InputError(f"clip_sample_range is {clip}, expected more than 0, at most {MAX_SIGMA:g}")


@dataclass(frozen=True)
class Thresholding(TrainingSchedule):
    """Options of the classes that can keep x0 within a range that each picture sets; names as in diffusers."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dynamic_thresholding_ratio <= 1:
            raise InputError(f"dynamic_thresholding_ratio is {self.dynamic_thresholding_ratio}, expected 0 to 1")
        if not 1e-3 <= self.sample_max_value <= MAX_SIGMA:
            raise InputError(f"sample_max_value is {self.sample_max_value}, expected 0.001 to {MAX_SIGMA:g}")

    def limited(self, x0: Array) -> Array:
        """x0, thresholded if the options say so."""
        return thresholded(x0, self.dynamic_thresholding_ratio, self.sample_max_value) if self.thresholding else x0


def thresholded(x0: Array, ratio: float, largest: float) -> Array:
    """Dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3): f32[B,…], each of the batch on its own.

    s, the quantile ``ratio`` of |x0|, is kept within 1 and ``largest``; x0 is clipped to ±s and divided by it. The
    quantile's place and its interpolation are in float32, as in ``torch.quantile`` and ``torch.lerp``.
    """
    flat = np.abs(x0.reshape(len(x0), -1))
    place = np.float32(ratio) * np.float32(flat.shape[1] - 1)
    low = int(place)
    high = min(low + 1, flat.shape[1] - 1)
    weight = place - np.float32(low)
    ordered = np.partition(flat, (low, high), axis=1)
    below, above = ordered[:, low], ordered[:, high]
    if weight < 0.5:
        s = below + weight * (above - below)
    else:
        s = above - (above - below) * (np.float32(1) - weight)
    s = np.minimum(np.maximum(s, np.float32(1)), np.float32(largest)).reshape(-1, *[1] * (x0.ndim - 1))
    result: Array = np.clip(x0, -s, s) / s
    return result


def diffused(x0: Array, noise: Array, alpha_bar: Any) -> Array:
    """x0 with the noise of level ᾱ, variance preserving: √ᾱ·x0 + √(1-ᾱ)·ε; in float32, as diffusers' ``add_noise``."""
    bar = np.float32(alpha_bar)
    noisy: Array = np.sqrt(bar) * x0 + np.sqrt(np.float32(1) - bar) * noise
    return noisy
