"""How often the intervals and verdicts of ``sdrt.bench.statistics`` are right, on simulated times, beside others.

    python benchmarks/statistics_simulated.py [-n 1000]

A simulated time is the product of its variant's true time, lognormal noise of the iteration, an effect of its process,
a spike that makes it 1.2 to 3 times as long, and drift that all share: a random walk with a sinusoid on it. Variants
alternate, A B B A, in time. Two reports drift each for itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args
from unittest import mock

import numpy as np

from sdrt.bench import statistics
from sdrt.bench.statistics import CONFIDENCE, RESOLUTION, THRESHOLD, Ratio, Verdict, compare_stages, paired_ratio
from sdrt.cli import common

SLOWDOWN = 1.05
RESAMPLES = 1000


@dataclass(frozen=True)
class Noise:
    """Standard deviations of log times; ``spikes`` is the share of iterations, ``burst`` how many a spike lasts."""

    processes: int
    iterations: int
    iteration: float = 0.01
    process: float = 0.003
    spikes: float = 0.05
    drift: float = 0.002
    burst: int = 1

    def logs(self, rng: np.random.Generator) -> np.ndarray:
        """Log times without drift, f64[P,I]."""
        shape = self.processes, self.iterations
        starts = rng.random(shape) < self.spikes / self.burst
        spiked = starts.copy()
        for later in range(1, self.burst):
            spiked[:, later:] |= starts[:, :-later]
        spikes = np.where(spiked, np.log(rng.uniform(1.2, 3.0, shape)), 0.0)
        return rng.normal(0.0, self.iteration, shape) + rng.normal(0.0, self.process, (self.processes, 1)) + spikes

    def drifts(self, rng: np.random.Generator) -> np.ndarray:
        """What both variants share at each turn of an alternating run, f64[2,P,I]."""
        n = self.processes * self.iterations
        wave = 3.0 * self.drift * np.sin(np.linspace(0.0, 9.0, 2 * n) + rng.uniform(0.0, 2.0 * math.pi))
        turns = (rng.normal(0.0, self.drift, 2 * n).cumsum() + wave).reshape(n, 2)
        turns[1::2] = turns[1::2, ::-1]
        return turns.T.reshape(2, self.processes, self.iterations)

    def pair(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Times of A and B, f64[P,I] each; the true ratio is 1."""
        drift = self.drifts(rng)
        return np.exp(self.logs(rng) + drift[0]), np.exp(self.logs(rng) + drift[1])


NOISES = {
    "3x8 quiet": Noise(3, 8, spikes=0.02, drift=0.001),
    "3x5 quiet": Noise(3, 5, iteration=0.005, process=0.002, drift=0.001),
    "3x5": Noise(3, 5),
    "3x8 process 1 %": Noise(3, 8, process=0.01),
    "3x10 noise 3 %, spikes 10 %": Noise(3, 10, iteration=0.03, spikes=0.1, drift=0.003),
    "3x8 bursts of 3, 10 %": Noise(3, 8, spikes=0.1, burst=3),
    "5x6": Noise(5, 6),
    "5x6 process 1 %": Noise(5, 6, process=0.01),
    "1x10": Noise(1, 10),
    "1x20": Noise(1, 20),
    "1x20 process 1 %": Noise(1, 20, process=0.01),
    "3x2": Noise(3, 2),
    "8x1": Noise(8, 1),
}
SHARES = {"text_encoder": 0.02, "step": 0.85, "vae_decoder": 0.12, "post": 0.01}
"""Stages, and how much of the total each takes."""

Interval = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[float, float]]


def chosen(a: np.ndarray, b: np.ndarray, _: np.random.Generator) -> tuple[float, float]:
    return ends(paired_ratio(a.tolist(), b.tolist()))


def one_level(a: np.ndarray, b: np.ndarray, _: np.random.Generator) -> tuple[float, float]:
    """As if each iteration had a process of its own."""
    return ends(paired_ratio(a.reshape(-1, 1).tolist(), b.reshape(-1, 1).tolist()))


def without_assumption(a: np.ndarray, b: np.ndarray, _: np.random.Generator) -> tuple[float, float]:
    with mock.patch.object(statistics, "PROCESS_WEIGHT", 0):
        return ends(paired_ratio(a.tolist(), b.tolist()))


def bootstrap(levels: int, widened: bool = False) -> Interval:
    """Percentile bootstrap of the median log ratio. ``widened``: for the few processes, by Student's t."""

    def interval(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
        x = np.log(b / a)
        processes, iterations = x.shape
        if levels == 1:
            drawn = x.reshape(-1)[rng.integers(0, x.size, (RESAMPLES, x.size))]
        else:
            which = rng.integers(0, processes, (RESAMPLES, processes, 1))
            drawn = x[which, rng.integers(0, iterations, (RESAMPLES, processes, iterations))].reshape(RESAMPLES, -1)
        ends = np.quantile(np.median(drawn, axis=1), [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
        if widened:
            normal = statistics.student_quantile(0.5 + CONFIDENCE / 2, 1e4)
            factor = statistics.student_quantile(0.5 + CONFIDENCE / 2, processes - 1) / normal
            middle = float(np.median(x))
            ends = middle + (ends - middle) * factor * math.sqrt(processes / (processes - 1))
        return math.exp(ends[0]), math.exp(ends[1])

    return interval


INTERVALS: dict[str, Interval] = {
    "bootstrap, one level": bootstrap(1),
    "bootstrap, two": bootstrap(2),
    "two, widened": bootstrap(2, widened=True),
    "biweight t, one level": one_level,
    "two, P-1 df": without_assumption,
    "chosen": chosen,
}


def ends(ratio: Ratio) -> tuple[float, float]:
    assert ratio.low is not None
    assert ratio.high is not None
    return ratio.low, ratio.high


def percent(flags: Sequence[bool] | np.ndarray) -> str:
    return f"{100.0 * float(np.mean(flags)):.1f}"


def pairs(noise: Noise, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same ones for every method."""
    return (noise.pair(np.random.default_rng((1, i))) for i in range(n))


def intervals(n: int) -> str:
    """One stage, pairs: coverage / false alarms / slowdowns found, by method."""
    rows = []
    for name, noise in NOISES.items():
        row = [name]
        for method, interval in INTERVALS.items():
            if noise.processes == 1 and method in ("two, widened", "two, P-1 df"):
                row.append("-")
                continue
            rng = np.random.default_rng(1)
            got = np.array([interval(a, b, rng) for a, b in pairs(noise, n)])
            low, high = got.T
            false = (low > 1.0 + THRESHOLD) | (high < 1.0 - THRESHOLD)
            row.append(
                f"{percent((low <= 1.0) & (high >= 1.0))} / {percent(false)} / "
                f"{percent(low * SLOWDOWN > 1.0 + THRESHOLD)}"
            )
        rows.append(row)
    return common.table(("one stage", *INTERVALS), rows)


def verdicts(n: int) -> str:
    """One stage, chosen method, pairs: how often each verdict falls, and what a laxer "no difference" would add."""
    rows = []
    for name, noise in NOISES.items():
        for ratio in (1.0, 1.02, SLOWDOWN):
            got = [paired_ratio(a.tolist(), (ratio * b).tolist()) for a, b in pairs(noise, n)]
            lax = [r.verdict == "cannot tell" and r.resolution is not None and r.resolution <= RESOLUTION for r in got]
            asked = [r.needed / r.n for r in got if r.needed is not None]
            rows.append(
                [
                    name if ratio == 1.0 else "", f"{ratio:.2f}",
                    *(percent([r.verdict == verdict for r in got]) for verdict in get_args(Verdict)),
                    percent(lax), f"{np.median([r.resolution or 0.0 for r in got]):.1%}",
                    f"{np.median(asked):.1f}" if asked else "-",
                ]
            )  # fmt: skip
    head = ("one stage", "true", *get_args(Verdict), "of these half-width <= 5 %", "half-width", "needed / n")
    return common.table(head, rows)


Stages = dict[str, tuple[np.ndarray, np.ndarray]]


def run_of_stages(noise: Noise, rng: np.random.Generator, slowdown: float) -> Stages:
    """Times of the stages and of their total; B's step is slower. Drift is common to all."""
    drift = noise.drifts(rng)
    stages = {
        name: (
            share * np.exp(noise.logs(rng) + drift[0]),
            share * np.exp(noise.logs(rng) + drift[1]) * (slowdown if name == "step" else 1.0),
        )
        for name, share in SHARES.items()
    }
    return {**stages, "total": (sum(a for a, _ in stages.values()), sum(b for _, b in stages.values()))}


def bonferroni(stages: Stages) -> list[Ratio]:
    return list(compare_stages({name: (a.tolist(), b.tolist()) for name, (a, b) in stages.items()}).values())


def largest_t(stages: Stages) -> list[Ratio]:
    """The quantile of the largest |t| of all stages, drawn with the correlation of their influences."""
    rng = np.random.default_rng(4)
    influences = np.stack([statistics.biweight(np.log(b / a).reshape(-1))[1] for a, b in stages.values()])
    freedom = statistics.PROCESS_WEIGHT + len(stages["step"][0]) - 1
    correlation = np.corrcoef(influences) + 1e-9 * np.eye(len(stages))
    drawn = rng.standard_normal((4000, len(stages))) @ np.linalg.cholesky(correlation).T
    largest = np.abs(drawn).max(axis=1) / np.sqrt(rng.chisquare(freedom, 4000) / freedom)
    with mock.patch.object(statistics, "student_quantile", return_value=float(np.quantile(largest, CONFIDENCE))):
        return alone(stages)


def alone(stages: Stages) -> list[Ratio]:
    return [paired_ratio(a.tolist(), b.tolist()) for a, b in stages.values()]


def alone_one_level(stages: Stages) -> list[Ratio]:
    return alone({name: (a.reshape(-1, 1), b.reshape(-1, 1)) for name, (a, b) in stages.items()})


ADJUSTMENTS = {
    "Bonferroni (chosen)": bonferroni,
    "largest t": largest_t,
    "none": alone,
    "none, one level": alone_one_level,
}
TOGETHER = {
    **{name: NOISES[name] for name in ("3x8 quiet", "3x5 quiet", "3x8 process 1 %", "5x6", "5x6 process 1 %")},
    "3x10 noise 3 %, spikes 10 %": NOISES["3x10 noise 3 %, spikes 10 %"],
    "2x8 quiet": replace(NOISES["3x8 quiet"], processes=2),
}


def together(n: int) -> str:
    """Five stages judged together, A against A and with a slower step."""
    rows = []
    step = list(SHARES).index("step")
    for name, noise in TOGETHER.items():
        for method, judge in ADJUSTMENTS.items():
            same = [judge(run_of_stages(noise, np.random.default_rng((2, i)), 1.0)) for i in range(n)]
            slow = [judge(run_of_stages(noise, np.random.default_rng((2, i)), SLOWDOWN)) for i in range(n)]
            rows.append(
                [
                    name if judge is bonferroni else "",
                    method,
                    percent([all(low <= 1.0 <= high for low, high in map(ends, run)) for run in same]),
                    percent([any(r.verdict in ("slower", "faster") for r in run) for run in same]),
                    percent([all(r.verdict == "no difference" for r in run) for run in same]),
                    percent([run[step].verdict == "slower" for run in slow]),
                    f"{np.median([r.resolution or 0.0 for run in same for r in run]):.1%}",
                ]
            )
    head = ("five stages", "adjusted by", "all hold", "any alarm", "all no difference", "step found", "half-width")
    return common.table(head, rows)


def sessions(n: int) -> str:
    """One stage, two reports: with and without the variance assumed between them."""
    rows = []
    for name, noise in NOISES.items():
        row = [name]
        for effect in (0.0, statistics.SESSION_EFFECT):
            low, high = [], []
            with mock.patch.object(statistics, "SESSION_EFFECT", effect):
                for i in range(n):
                    rng = np.random.default_rng((3, i))
                    a, b = noise.pair(rng)[0], noise.pair(rng)[0]
                    interval = ends(statistics.unpaired_ratio(a.tolist(), b.tolist()))
                    low.append(interval[0])
                    high.append(interval[1])
            lows, highs = np.array(low), np.array(high)
            row.append(
                f"{percent((lows <= 1.0) & (highs >= 1.0))} / "
                f"{percent((lows > 1.0 + THRESHOLD) | (highs < 1.0 - THRESHOLD))} / "
                f"{percent(lows * SLOWDOWN > 1.0 + THRESHOLD)} / {percent(lows * 1.1 > 1.0 + THRESHOLD)}"
            )
        rows.append(row)
    return common.table(("one stage, two reports", "no session effect assumed", "chosen"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=1000, help="simulated comparisons for each cell")
    n = parser.parse_args().n
    print(f"n = {n}; percent of comparisons throughout; nominal {CONFIDENCE:.0%}, slowdown {SLOWDOWN}\n")
    print("covered / false alarm / slowdown found\n" + intervals(n) + "\n")
    print(verdicts(n) + "\n")
    print(together(n) + "\n")
    print("covered / false alarm / slowdown found / slowdown of 1.1 found\n" + sessions(n))


if __name__ == "__main__":
    main()
