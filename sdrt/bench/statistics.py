"""What times say, through noise: summaries, ratios of two variants with confidence intervals, verdicts.

Samples are ``samples[process][iteration]``: each outer entry is a fresh process, since the same program is a little
faster or slower in each (memory layout), and within it are its iterations in turn, in any unit that is the same on both
sides. Few processes are what a benchmark can afford, so the interval has to know both levels and has to make do with
three of them. How it does, for x = log(b / a) of each pair (or log a and log b apart):

1. The location is Tukey's biweight M-estimate of all values: about a mean where noise is normal, and what lies beyond
   six median absolute deviations (another process had the core) has no say.
2. Each value's influence on that location is averaged by process. The variance of these averages holds both levels;
   with P processes it has P - 1 degrees of freedom, far too few.
3. It is therefore pooled with what is assumed of any machine, ``PROCESS_EFFECT``, worth ``PROCESS_WEIGHT`` degrees of
   freedom: one process is judged by the assumption, many by what they show. (A moderated t statistic: Smyth 2004,
   "Linear models and empirical Bayes methods for assessing differential expression in microarray experiments".)
4. Student's t gives the interval. Several intervals hold together by Bonferroni's inequality.
5. Values without a say must not all tell the same: where significantly more of them lie on one side, something slows
   one variant now and then, which the location does not show, and no verdict that they contradict is given.

``benchmarks/statistics_simulated.py`` shows the choice beside bootstraps. Nothing here is random.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np

from sdrt.errors import InputError, quoted

Samples: TypeAlias = Sequence[Sequence[float]]
Verdict: TypeAlias = Literal["slower", "faster", "no difference", "cannot tell"]

CONFIDENCE = 0.95
"""That all intervals that are judged together hold the true ratios."""
THRESHOLD = 0.01
"""A difference that matters: ``slower`` and ``faster`` are said when the whole interval lies beyond it."""
RESOLUTION = 0.05
"""A difference that must be seen: ``no difference`` is said when the whole interval lies within it."""
FEWEST = 6
"""Pairs, in all processes together; with fewer there is no interval and no verdict."""
PROCESS_EFFECT = 0.01
"""Assumed standard deviation of a fresh process's log ratio: 0.7 % for each side."""
PROCESS_WEIGHT = 4
"""How many measured degrees of freedom that assumption is worth."""
SESSION_EFFECT = 0.01
"""Assumed standard deviation of the log ratio of one program at two times: clocks and neighbours change in between.
No report can show it; only alternation removes it."""

CUTOFF = 6.0
"""In median absolute deviations, some four standard deviations of normal noise."""
LEAN = 3.0
"""Standard errors by which values beyond the cutoff may lie on one side more often than on the other by chance."""
FINEST = 1e-3
"""Least scale, and least process effect, of log times: equal figures come from a coarse clock, not from no noise."""
MOST_PROCESSES = 10_000
TIMES = 1e-30, 1e30
"""Beyond these a figure is no time in any unit, and ratios leave the range of floats."""


@dataclass(frozen=True)
class Summary:
    """One series of figures, in their unit. ``spread`` is the interquartile range by the median, without a unit; None
    where one figure, or a median of 0, says nothing about it. Quantiles are interpolated."""

    n: int
    median: float
    p90: float
    min: float
    max: float
    spread: float | None


@dataclass(frozen=True)
class Ratio:
    """How b compares with a: 1.05 is 5 % slower, where figures are times.

    ``low`` and ``high`` hold the true ratio with ``confidence``; they, and ``resolution``, are None below ``FEWEST``
    pairs. ``n`` counts pairs in all processes (of two reports: the smaller one's iterations). ``resolution`` is what
    these data can tell apart: half the interval's width by the estimate. Where the verdict is ``cannot tell``,
    ``needed`` is about how many pairs would tell, in more processes of the same length; otherwise, and where no number
    would (outliers speak against the interval), it is None.
    """

    estimate: float
    low: float | None
    high: float | None
    confidence: float
    n: int
    verdict: Verdict
    resolution: float | None
    needed: int | None


def summarize(values: Sequence[float]) -> Summary:
    """Median, 90th percentile, extremes and spread. ``InputError``: no value, or one that is not finite."""
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise InputError(f"a summary needs finite numbers in a flat sequence, got {quoted(values)}")
    low, median, high, p90 = (float(q) for q in np.quantile(x, (0.25, 0.5, 0.75, 0.9)))
    spread = (high - low) / median if x.size > 1 and median else None
    return Summary(x.size, median, p90, float(x.min()), float(x.max()), spread)


def paired_ratio(
    a: Samples,
    b: Samples,
    *,
    confidence: float = CONFIDENCE,
    threshold: float = THRESHOLD,
    resolution: float = RESOLUTION,
) -> Ratio:
    """b / a of two variants measured in alternation: ``a[p][i]`` and ``b[p][i]`` are neighbours in time, so that drift
    cancels.

    ``InputError``: a time that is not a positive finite number, no process, an empty one, shapes that differ, or limits
    that do not satisfy 0 < confidence < 1 and 0 <= threshold < resolution.
    """
    logs_a, logs_b = _logs("a", a), _logs("b", b)
    shapes = [[len(process) for process in side] for side in (logs_a, logs_b)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"paired samples need as many processes and iterations on both sides, got {shapes[0]} and {shapes[1]}",
            "compare samples that were not taken in alternation with unpaired_ratio",
        )
    side = _two_levels([y - x for x, y in zip(logs_a, logs_b, strict=True)], PROCESS_EFFECT)
    return _judged([side], 0.0, confidence, threshold, resolution)


def unpaired_ratio(
    a: Samples,
    b: Samples,
    *,
    confidence: float = CONFIDENCE,
    threshold: float = THRESHOLD,
    resolution: float = RESOLUTION,
) -> Ratio:
    """b / a of two reports from different times; shapes may differ. What changed on the machine in between is only
    assumed (``SESSION_EFFECT``), so it resolves less than ``paired_ratio``. Raises as that does, shapes apart."""
    sides = [_two_levels(_logs(name, x), PROCESS_EFFECT / math.sqrt(2)) for name, x in (("a", a), ("b", b))]
    return _judged(sides, SESSION_EFFECT**2, confidence, threshold, resolution)


def compare_stages(
    stages: Mapping[str, tuple[Samples, Samples]],
    *,
    paired: bool = True,
    confidence: float = CONFIDENCE,
    threshold: float = THRESHOLD,
    resolution: float = RESOLUTION,
) -> dict[str, Ratio]:
    """Each stage's ratio of (a, b), such that all intervals hold together with ``confidence``.

    Each of k stages gets the confidence 1 - (1 - confidence) / k (Bonferroni), whatever their dependence.
    """
    ratio = paired_ratio if paired else unpaired_ratio
    each = 1.0 - (1.0 - confidence) / max(1, len(stages))
    return {
        name: ratio(a, b, confidence=each, threshold=threshold, resolution=resolution)
        for name, (a, b) in stages.items()
    }


@dataclass(frozen=True)
class _Side:
    """Log times, or log ratios, of one side. ``variance``: of one process's mean influence, with P - 1 + ``weight``
    degrees of freedom. ``above`` and ``below``: values beyond the cutoff."""

    location: float
    variance: float
    weight: int
    processes: int
    n: int
    above: int
    below: int


def _two_levels(logs: Sequence[np.ndarray], process_effect: float) -> _Side:
    """Location of all values, and the moderated variance between processes."""
    x = np.concatenate(logs)
    sizes = np.array([len(process) for process in logs])
    location, influence = biweight(x)
    starts = np.cumsum(sizes) - sizes
    means = np.add.reduceat(influence, starts) / sizes
    residuals = influence - np.repeat(means, sizes)
    within = float(residuals @ residuals) / max(1, len(x) - len(logs)) * float(np.mean(1.0 / sizes))
    between = float(np.sum(np.square(means - means.mean())))
    # Processes of one iteration each show no noise within, so nothing can be assumed of both: their means tell all.
    weight = PROCESS_WEIGHT if len(x) > len(logs) else 0
    variance = (weight * (process_effect**2 + within) + between) / max(1, weight + len(logs) - 1)
    beyond = x[influence == 0.0] - location
    above, below = (int(np.count_nonzero(side)) for side in (beyond > 0.0, beyond < 0.0))
    return _Side(location, max(variance, FINEST**2), weight, len(logs), len(x), above, below)


def biweight(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Tukey's biweight location of f64[N], and each value's influence on it, f64[N], of mean 0.

    Location: the root of sum psi(u) = 0 with psi(u) = u (1 - u^2)^2 for |u| < 1 and u = (x - location) / (CUTOFF MAD),
    by reweighting from the median. Influence: psi(u) over the mean of its derivative (1 - u^2) (1 - 5 u^2), rescaled.
    """
    location = float(np.median(x))
    scale = CUTOFF * max(FINEST, float(np.median(np.abs(x - location))))
    for _ in range(20):
        weights = np.square(1.0 - np.square(np.clip((x - location) / scale, -1.0, 1.0)))
        location = float(weights @ x / weights.sum())
    u = np.clip((x - location) / scale, -1.0, 1.0)
    slope = float(np.mean((1.0 - u * u) * (1.0 - 5.0 * u * u)))
    return location, scale * u * np.square(1.0 - u * u) / max(0.1, slope)


def _judged(sides: Sequence[_Side], session: float, confidence: float, threshold: float, resolution: float) -> Ratio:
    """The interval around the ratio, and what it says. ``sides``: one of log ratios, or a's and b's log times;
    ``session``: variance that no measuring lessens."""
    if not (0.0 < confidence < 1.0 and 0.0 <= threshold < resolution):
        raise InputError(
            f"got confidence {confidence}, threshold {threshold}, resolution {resolution}; "
            "expected 0 < confidence < 1 and 0 <= threshold < resolution"
        )
    location = sides[-1].location - sum(side.location for side in sides[:-1])
    estimate, n = math.exp(location), min(side.n for side in sides)
    if n < FEWEST:
        return Ratio(estimate, None, None, confidence, n, "cannot tell", None, FEWEST)

    def widths(times: float) -> tuple[float, float]:
        """Half the log interval's width and its standard error, had there been ``times`` as many processes."""
        variances = [side.variance / (side.processes * times) for side in sides]
        freedom = [side.weight + side.processes * times - 1 for side in sides]
        total = sum(variances) + session
        # Welch and Satterthwaite; the session's variance is assumed, hence known.
        combined = total**2 / sum(v**2 / f for v, f in zip(variances, freedom, strict=True))
        error = math.sqrt(total)
        return student_quantile(0.5 + confidence / 2, round(min(combined, 1e4), 1)) * error, error

    half, _ = widths(1.0)
    low, high = math.exp(location - half), math.exp(location + half)
    verdict = _verdict(low, high, threshold, resolution)
    needed = None
    if verdict == "cannot tell":
        # Enough is what brings the interval beyond the threshold or within the resolution, whichever is nearer, even
        # when the estimate moves by its standard error.
        target = max(abs(location) - math.log1p(threshold), math.log1p(resolution) - abs(location))
        fewest = min(side.processes for side in sides)
        counts = range(fewest + 1, MOST_PROCESSES + 1)
        at = bisect_left(counts, True, key=lambda count: sum(widths(count / fewest)) <= target)
        needed = math.ceil(n * counts[at] / fewest) if at < len(counts) else None
    lean = _lean(sides)
    if (lean > LEAN and verdict != "slower") or (lean < -LEAN and verdict != "faster"):
        verdict, needed = "cannot tell", None
    return Ratio(estimate, low, high, confidence, n, verdict, (high - low) / 2 / estimate, needed)


def _lean(sides: Sequence[_Side]) -> float:
    """How much more often b was beyond the cutoff for being slow than for being fast, in standard errors (Poisson)."""
    shares = [(side.above - side.below) / side.n for side in sides]
    variance = sum((side.above + side.below) / side.n**2 for side in sides)
    return (shares[-1] - sum(shares[:-1])) / math.sqrt(variance) if variance else 0.0


def _verdict(low: float, high: float, threshold: float, resolution: float) -> Verdict:
    if low > 1.0 + threshold:
        return "slower"
    if high < 1.0 - threshold:
        return "faster"
    return "no difference" if low >= 1.0 - resolution and high <= 1.0 + resolution else "cannot tell"


@lru_cache(maxsize=4096)
def student_quantile(p: float, freedom: float) -> float:
    """Quantile of Student's t, freedom >= 1. At t = sqrt(freedom) tan(angle) its density is cos(angle)^(freedom - 1),
    up to a factor; its integral is inverted. Right to 1e-4 of its value for the p in use."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.maximum(np.cos(angle), 0.0) ** (freedom - 1.0)
    integral = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(p, integral / integral[-1], angle)))


def _logs(name: str, samples: Samples) -> list[np.ndarray]:
    try:
        processes = [np.asarray(process, np.float64) for process in samples]
    except (TypeError, ValueError):  # texts, or lists of several lengths in one process
        processes = []
    good = [x.ndim == 1 and x.size > 0 and bool(((x > TIMES[0]) & (x < TIMES[1])).all()) for x in processes]
    if not processes or not all(good):
        raise InputError(
            f"{name}: expected positive finite times as [process][iteration], no process empty, got {quoted(samples)}"
        )
    return [np.log(x) for x in processes]
