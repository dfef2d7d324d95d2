"""Where the steps of a solver lie: timestep spacings, sigma schedules, and what a caller sets by hand.

diffusers has three families of classes, which space the same options differently:

- those of whole timesteps in a table of ᾱ (DDIM, PNDM, …): ``spaced`` alone;
- k-diffusion's, latents x = x0 + σ·ε (Euler, Heun, …): ``exploding``;
- multistep solvers, variance preserving, which space one step more and leave the last out (DPM-Solver, UniPC, DEIS):
  ``preserving``.

The spacings of ``OURS`` are named as A1111 and ComfyUI name them; diffusers has them not, or not under a name.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdrt.errors import InputError
from sdrt.schedulers import tables
from sdrt.schedulers.tables import MAX_SIGMA, Array, Options, Plan, Spacing, TrainingSchedule

Floats = NDArray[np.float64]
D = TypeVar("D")
WideSpacing = Literal[
    "leading", "linspace", "trailing", "sgm_uniform", "uniform", "simple", "ddim_uniform", "kl_optimal", "ays",
    "ays_xl", "ays_svd", "align_your_steps", "align_your_steps_xl",
]  # fmt: skip

OURS = (
    "sgm_uniform", "uniform", "simple", "ddim_uniform", "kl_optimal", "ays", "ays_xl", "ays_svd", "align_your_steps",
    "align_your_steps_xl",
)  # fmt: skip
"""Spacings that diffusers does not know."""

AYS: dict[str, tuple[float, ...]] = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""Sabour et al., "Align Your Steps", arXiv 2404.14507: σ of 10 steps, as the authors published them, for SD 1.5, SDXL
and Stable Video Diffusion. The last is where a step before the end would lie; the end itself is 0."""


@dataclass(frozen=True)
class SigmaSchedule(TrainingSchedule):
    """Options of the classes that know σ; names and defaults are diffusers', but for the spacings that are ours."""

    timestep_spacing: WideSpacing = "linspace"  # type: ignore[assignment] # more than the base's
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False

    ALWAYS_ENDS_AT_SIGMA_MIN: ClassVar[bool] = False
    """Whether the solver's last step ends at the training schedule's smallest σ, with no option that says where."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends_low = self.ALWAYS_ENDS_AT_SIGMA_MIN or getattr(self, "final_sigmas_type", "zero") == "sigma_min"
        if self.timestep_spacing == "kl_optimal" and not ends_low:
            raise InputError(
                "timestep_spacing 'kl_optimal' ends at the smallest sigma, and these options at 0",
                "set final_sigmas_type to 'sigma_min', or choose a scheduler that has it",
            )
        if schedules(self) != ["use_karras_sigmas", "use_flow_sigmas"]:
            check_one(self)


def schedules(o: TrainingSchedule) -> list[str]:
    """The sigma schedules that the options ask for: at most one, but for UniPC's Karras sigmas of a flow."""
    flags = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
    chosen = [flag for flag in flags if getattr(o, flag, False)]
    return chosen + ([f"timestep_spacing {o.timestep_spacing!r}"] if o.timestep_spacing in OURS else [])


def check_one(o: TrainingSchedule) -> None:
    """InputError for more than one sigma schedule."""
    if len(chosen := schedules(o)) > 1:
        raise InputError(f"only one of {', '.join(chosen)} can be used", "set the others to false")


def check_steps(steps: int, options: Options) -> None:
    """InputError unless the training schedule has that many steps."""
    if not 1 <= steps <= options.num_train_timesteps:
        raise InputError(f"num_inference_steps is {steps}, expected 1 to {options.num_train_timesteps}")


def check_timesteps(timesteps: Floats, options: TrainingSchedule) -> Array:
    """The timesteps in float32, if the training schedule holds them all; InputError for one that is beyond it."""
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


def whole(timesteps: Floats) -> Floats:
    """Timesteps that a caller gave, for a class that looks them up in a table. InputError for a fraction."""
    if not (timesteps == timesteps.round()).all():
        raise InputError("timesteps must be whole numbers for this scheduler", "choose another scheduler")
    return timesteps


def spaced(
    spacing: Spacing, steps: int, n: int, offset: int = 0, *, last: int | None = None, drop: bool = False
) -> Floats:
    """f64[steps], falling: ``steps`` of n training steps ("trailing" may round to one more); arXiv 2305.08891, table 2.

    last: how many of the training steps count, where the noisiest are cut off. drop: space one step more and leave the
    least noisy out.
    """
    last = n if last is None else last
    count = steps + drop
    if spacing == "linspace":
        return np.linspace(0, last - 1, count)[::-1][:steps]
    if spacing == "leading":
        return (np.arange(count, dtype=np.float64) * (last // count))[::-1][:steps] + offset
    trailing: Floats = np.arange(last, 0, -n / steps).round() - 1
    return trailing


# -- sigma schedules ---------------------------------------------------------------------------------------------------


def karras(low: float, high: float, steps: int) -> Floats:
    """f64[steps], falling from high to low: arXiv 2206.00364, equation 5, with ρ = 7."""
    rho = 7.0
    bottom, top = low ** (1 / rho), high ** (1 / rho)
    sigmas: Floats = (top + np.linspace(0, 1, steps) * (bottom - top)) ** rho
    return sigmas


def exponential(low: float, high: float, steps: int) -> Floats:
    """f64[steps], falling from high to low in equal steps of log σ (k-diffusion's "exponential")."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def lu(log_sigmas: Array, steps: int) -> Floats:
    """f64[steps]: equal steps of λ = -log σ over the whole training schedule; arXiv 2206.00927, section 3.4."""
    low, high = float(log_sigmas[0]), float(log_sigmas[-1])
    return np.exp(high + np.linspace(0, 1, steps) * (low - high))


def beta(low: float, high: float, steps: int) -> Floats:
    """f64[steps], falling from high to low: quantiles of the beta distribution Beta(0.6, 0.6); arXiv 2407.12173."""
    return low + beta_quantiles(steps) * (high - low)


@functools.lru_cache(16)
def beta_quantiles(steps: int, shape: float = 0.6) -> Floats:
    """f64[steps], falling: where the regularised incomplete beta I_x(a, a) is 1, …, 0 in equal steps; to 1e-12."""
    return symmetric_beta_quantile(1 - np.linspace(0, 1, steps), shape)


def symmetric_beta_quantile(p: Floats, a: float) -> Floats:
    """x in [0, 1] with I_x(a, a) = p: f64, of p's shape.

    As I_x = 1 - I_(1-x), x is looked for in [0, 1/2] only, where the power series
    B_x = x^a · Σ_k (1-a)_k / k! · x^k / (a + k) (DLMF 8.17.7 and 15.2.1) loses a factor of 2 a term. In u = x^a the
    function is nearly a line, so that Newton's method ends after a few rounds.
    """
    target = np.minimum(p, 1 - p) * (math.gamma(a) ** 2 / math.gamma(2 * a))
    terms, coefficient = [], 1.0
    for k in range(60):
        terms.append(coefficient / (a + k))
        coefficient *= (1 - a + k) / (k + 1)
    u = np.clip(target * a, 0, 0.5**a)
    for _ in range(12):
        x = u ** (1 / a)
        u = u + (target - u * np.polynomial.polynomial.polyval(x, terms)) * a / (1 - x) ** (a - 1)
        u = np.clip(u, 0, 0.5**a)
    x = u ** (1 / a)
    return np.where(p > 0.5, 1 - x, x)


def flow(shift: float, steps: int, n: int) -> Floats:
    """f64[steps], falling: the sigmas of rectified flow, 0 < σ < 1, shifted to the noisy side; arXiv 2403.03206, 23."""
    sigmas = (1 - np.linspace(1, 1 / n, steps + 1))[::-1][:steps]
    return shifted(sigmas, shift)


def shifted(sigmas: Floats, shift: float) -> Floats:
    """σ of a flow with the resolution's shift: arXiv 2403.03206, equation 23."""
    moved: Floats = shift * sigmas / (1 + (shift - 1) * sigmas)
    return moved


def own_sigmas(spacing: str, steps: int, training: Array) -> Floats | None:
    """f64[steps]: the sigmas of a spacing of ours; None for another one. training: f32[n], rising.

    uniform: k-diffusion's ``get_sigmas``, equal steps of t from the last one to 0, where each σ is interpolated in
    log σ. simple: entries of the training table, in equal steps from the last one. ddim_uniform: entries in whole
    strides up from the second one, as latent diffusion's DDIM took them. kl_optimal: equal steps of arctan σ over the
    whole table, at whose end the last step ends (arXiv 2404.14507, theorem 3.1).
    """
    n = len(training)
    if spacing == "ddim_uniform":
        return _strides(steps, training)
    if spacing == "kl_optimal":
        high, low = np.arctan(training[[-1, 0]].astype(np.float64)).tolist()
        return np.tan(np.linspace(high, low, steps + 1)[:steps])
    if spacing == "uniform":
        return np.exp(np.interp(np.linspace(n - 1, 0, steps), np.arange(n), np.log(training)))
    if spacing == "simple":
        return training[[n - 1 - int(i * (n / steps)) for i in range(steps)]].astype(np.float64)
    if spacing in AYS:
        return align_your_steps(spacing, steps + 1)[:steps]
    if spacing in ("align_your_steps", "align_your_steps_xl"):
        return align_your_steps(spacing.replace("align_your_steps", "ays"), steps)
    return None


def _strides(steps: int, training: Array) -> Floats:
    """f64[steps]: every n // steps-th σ of the n. InputError where those are not as many as there are to be steps."""
    stride = max(len(training) // steps, 1)
    strided: Floats = training[1::stride][::-1].astype(np.float64)
    if len(strided) != steps:
        fits = [k for k in range(1, len(training)) if len(training[1 :: len(training) // k]) == k]
        below, above = [k for k in fits if k < steps][-1:], [k for k in fits if k > steps][:1]
        raise InputError(
            f"ddim_uniform spacing: whole strides of {stride} of {len(training)} training steps are {len(strided)}"
            f" steps, {steps} are asked for",
            f"take {' or '.join(map(str, below + above))} steps, or another schedule",
        )
    return strided


def align_your_steps(table_name: str, count: int) -> Floats:
    """f64[count]: the table's sigmas, interpolated in log σ to another number of them.

    Its authors (and diffusers) take one more than there are steps, and 0 in place of the last; A1111 takes as many as
    there are steps, and appends 0.
    """
    table = AYS[table_name]
    places = np.linspace(0, len(table) - 1, count)
    return np.exp(np.interp(places, np.arange(len(table)), np.log(table)))


def sigma_to_t(sigmas: Floats, log_sigmas: Array) -> Floats:
    """Fractional timesteps whose log σ, interpolated linearly in the training table, are those of ``sigmas``."""
    logs = np.log(np.maximum(sigmas, 1e-10))
    if (np.diff(log_sigmas) > 0).all():
        low = np.searchsorted(log_sigmas, logs, side="right") - 1
    else:  # zero terminal SNR may end below where it was (``training_sigmas``): the last entry that is not above
        low = len(log_sigmas) - 1 - np.argmax((log_sigmas[:, None] <= logs.reshape(-1))[::-1], axis=0)
        low = np.where((log_sigmas[:, None] <= logs.reshape(-1)).any(axis=0), low, 0).reshape(logs.shape)
    low = np.clip(low, 0, len(log_sigmas) - 2)
    below, above = log_sigmas[low].astype(np.float64), log_sigmas[low + 1].astype(np.float64)
    weight = np.clip((below - logs) / (below - above), 0, 1)
    return (1 - weight) * low + weight * (low + 1)


# -- the families ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Levels:
    """What a solver's steps are made of."""

    timesteps: Floats
    """f64[steps], falling."""
    sigmas: Floats
    """f64[steps], falling: σ = s/α of each; of a flow its own."""
    training: Array
    """f32[num_train_timesteps], rising: σ of the training schedule."""


def _given(plan: Plan, o: SigmaSchedule, name: str) -> Floats | None:
    """Timesteps that a caller set, if none of the options says where they lie."""
    if plan.timesteps is not None and (chosen := schedules(o)):
        raise InputError(f"{name}: timesteps are given, and {chosen[0]} sets them too", "give up one")
    return plan.timesteps


class _Flags(Protocol):
    """Options that may name a sigma schedule."""

    @property
    def use_karras_sigmas(self) -> bool | None: ...
    @property
    def use_exponential_sigmas(self) -> bool | None: ...
    @property
    def use_beta_sigmas(self) -> bool | None: ...


def named(o: _Flags, low: float, high: float, steps: int, otherwise: D) -> Floats | D:
    """f64[steps]: the sigma schedule between low and high that the options name, if any."""
    if o.use_karras_sigmas:
        return karras(low, high, steps)
    if o.use_exponential_sigmas:
        return exponential(low, high, steps)
    return beta(low, high, steps) if o.use_beta_sigmas else otherwise


def exploding(
    o: SigmaSchedule, plan: Plan, name: str, *, low: float | None = None, high: float | None = None,
    karras_rounded: bool = False, exact: bool = False,
) -> Levels:  # fmt: skip
    """Levels of a class of k-diffusion's family. low, high: where a named schedule ends, else the first and last σ.

    exact: for a class whose "linspace" is not rounded to float32.
    """
    check_steps(plan.steps, o)
    n = o.num_train_timesteps
    training = tables.training_sigmas(tables.alphas_cumprod(o))
    logs, index = np.log(training), np.arange(n)
    timesteps = _given(plan, o, name)
    if timesteps is not None:
        timesteps = timesteps.astype(np.float32).astype(np.float64)
        sigmas = np.interp(timesteps, index, training)
    elif (own := own_sigmas(o.timestep_spacing, plan.steps, training)) is not None:
        sigmas, timesteps = own, sigma_to_t(own, logs)
    elif o.timestep_spacing == "sgm_uniform":  # as k-diffusion interpolates: in log σ
        timesteps = spaced("linspace", plan.steps, n, drop=True)
        sigmas = np.exp(np.interp(timesteps, index, logs))
    else:
        timesteps = spaced(o.timestep_spacing, plan.steps, n, o.steps_offset)  # type: ignore[arg-type] # diffusers' own
        if o.timestep_spacing == "linspace" and not exact:  # in float32 there
            timesteps = timesteps.astype(np.float32).astype(np.float64)
        sigmas = np.interp(timesteps, index, training)
    check_timesteps(timesteps, o)
    low, high = float(sigmas[-1]) if low is None else low, float(sigmas[0]) if high is None else high
    made = named(o, low, high, plan.steps, None)
    if made is not None:
        sigmas, timesteps = made, sigma_to_t(made, logs)
        if o.use_karras_sigmas and karras_rounded:
            timesteps = timesteps.round()
    return Levels(timesteps, sigmas, training)


def preserving(
    o: SigmaSchedule, plan: Plan, name: str, *, lambda_min: float = -math.inf, low: float | None = None,
    high: float | None = None, flow_shift: float | None = 1.0, karras_rounded: bool = True,
) -> Levels:  # fmt: skip
    """Levels of a multistep solver; its timesteps are whole, cut off where a schedule gives fractions.

    lambda_min: timesteps whose λ = -log σ is below are cut off at the noisy end. low, high: where a named schedule
    ends, else at the training schedule's.
    """
    check_steps(plan.steps, o)
    n = o.num_train_timesteps
    training = tables.training_sigmas(tables.alphas_cumprod(o))
    logs = np.log(training)
    timesteps = _given(plan, o, name)
    last = n - int(np.searchsorted(-logs[::-1], lambda_min))
    own = own_sigmas(o.timestep_spacing, plan.steps, training[:last])
    if own is not None and last < n and own[0] > 1.000001 * training[last - 1]:
        raise InputError(f"{name}: timestep_spacing {o.timestep_spacing!r} begins above what lambda_min_clipped leaves")
    if timesteps is not None:
        timesteps = whole(timesteps)
    elif own is not None:
        sigmas, timesteps = own, sigma_to_t(own, logs).round()
    else:
        spacing: Spacing = "linspace" if o.timestep_spacing == "sgm_uniform" else o.timestep_spacing  # type: ignore[assignment]
        timesteps = spaced(spacing, plan.steps, n, o.steps_offset, last=last, drop=True).round()
    check_timesteps(timesteps, o)
    if plan.timesteps is not None or own is None:
        sigmas = np.interp(timesteps, np.arange(n), training)
    low, high = float(training[0]) if low is None else low, float(training[-1]) if high is None else high
    made = named(o, low, high, plan.steps, None)
    if made is None and getattr(o, "use_lu_lambdas", False):
        made = lu(logs, plan.steps)
    if made is not None:
        sigmas, timesteps = made, sigma_to_t(made, logs)
        if karras_rounded and (o.use_karras_sigmas or getattr(o, "use_lu_lambdas", False)):
            timesteps = timesteps.round()
    elif getattr(o, "use_flow_sigmas", False):
        sigmas = flow(1.0 if flow_shift is None else flow_shift, plan.steps, n)
        timesteps = sigmas * n
    check_falling(sigmas, name, last)
    return Levels(np.trunc(timesteps), sigmas, training)


def check_falling(sigmas: Floats, name: str, n: int) -> None:
    """InputError where two steps have the same noise in float32: multistep formulas divide by their difference."""
    if not (np.diff(sigmas.astype(np.float32)) < 0).all():
        raise InputError(
            f"{name}: {len(sigmas)} steps in {n} training steps: two would have the same noise", "take fewer steps"
        )


def check_range(**sigmas: float | None) -> None:
    """InputError for a sigma_min or sigma_max that float32 cannot work with."""
    for name, sigma in sigmas.items():
        if sigma is not None and not 1 / MAX_SIGMA <= sigma <= MAX_SIGMA:
            raise InputError(f"{name} is {sigma}, expected {1 / MAX_SIGMA:g} to {MAX_SIGMA:g}")
    low, high = sigmas.get("sigma_min"), sigmas.get("sigma_max")
    if low is not None and high is not None and low > high:
        raise InputError(f"sigma_min is {low}, more than sigma_max, {high}")


def start_sigma(sigmas: Array, spacing: str) -> float:
    """Standard deviation of the first latents of ``Exploding`` solvers, as k-diffusion's and diffusers' have it."""
    top = float(sigmas.max())
    return math.sqrt(top**2 + 1) if spacing == "leading" else top


def interleaved(begin: NDArray[Any], middle: NDArray[Any]) -> Array:
    """f32[2·steps - 1]: b0, m0, b1, m1, …, b of the last step, which is of first order."""
    both = np.empty(len(begin) + len(middle), np.float32)
    both[0::2], both[1::2] = begin, middle
    return both


class Tabled:
    """What solvers of latents √ᾱ·x0 + √(1-ᾱ)·ε share whose calls are at whole training steps: ``_alpha_bar`` is ᾱ."""

    init_sigma = 1.0
    order = 1
    timesteps: Array
    _alpha_bar: Array

    @property
    def sigmas(self) -> Array:
        return tables.training_sigmas(self._alpha_bar[self.timesteps.astype(int)])

    def scale(self, x: Array, i: int) -> Array:
        return x

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        return tables.diffused(x0, noise, self._alpha_bar[int(self.timesteps[i])])


class Exploding:
    """What solvers of latents x = x0 + σ·ε share: the network sees x / sqrt(σ² + 1). ``_sigmas``: f32, by call."""

    timesteps: Array
    _sigmas: Array

    @property
    def sigmas(self) -> Array:
        return np.array([self._level(i) for i in range(len(self.timesteps))])

    def scale(self, x: Array, i: int) -> Array:
        scaled: Array = x / np.sqrt(self._level(i) ** 2 + 1)
        return scaled

    def add_noise(self, x0: Array, noise: Array, i: int) -> Array:
        noisy: Array = x0 + noise * self._level(i)
        return noisy

    def _level(self, i: int) -> np.float32:
        level: np.float32 = self._sigmas[i]
        return level


class Halved(Exploding):
    """The same of two calls a step: ``_sigmas`` by step, and ``_middles``, where second calls are."""

    _middles: Array

    def _level(self, i: int) -> np.float32:
        return np.float32((self._middles if i % 2 else self._sigmas)[i // 2])
