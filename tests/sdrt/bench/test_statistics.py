"""Statistics by hand-made numbers, by properties, and by simulation against noise whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrt.bench.statistics import (
    FEWEST,
    Ratio,
    Summary,
    biweight,
    compare_stages,
    paired_ratio,
    student_quantile,
    summarize,
    unpaired_ratio,
)
from sdrt.errors import InputError

SHAPES = [(3, 8), (1, 10), (5, 6), (8, 1), (2, 3)]


def noisy(
    seed: int, shape: tuple[int, int] = (3, 8), noise: float = 0.01, process: float = 0.003, spikes: float = 0.02
) -> np.ndarray:
    """Times around 1 s: lognormal noise, an effect of each process, spikes of 1.2 to 3 times."""
    rng = np.random.default_rng((77, seed))
    logs = rng.normal(0.0, noise, shape) + rng.normal(0.0, process, (shape[0], 1))
    return np.exp(logs + np.where(rng.random(shape) < spikes, np.log(rng.uniform(1.2, 3.0, shape)), 0.0))


def interval(ratio: Ratio) -> tuple[float, float]:
    assert ratio.low is not None
    assert ratio.high is not None
    return ratio.low, ratio.high


def holds(ratio: Ratio, true: float = 1.0) -> bool:
    low, high = interval(ratio)
    return low <= true <= high


# Summaries


def test_summary() -> None:
    assert summarize([4.0, 1.0, 3.0, 2.0, 5.0]) == Summary(5, 3.0, pytest.approx(4.6), 1.0, 5.0, pytest.approx(2 / 3))
    assert summarize([2.0, 2.0]) == Summary(2, 2.0, 2.0, 2.0, 2.0, 0.0)


def test_one_value_has_no_spread() -> None:
    assert summarize([7]) == Summary(1, 7.0, 7.0, 7.0, 7.0, None)
    assert summarize([0.0, 0.0]).spread is None


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_summary_of_nothing(values: list[float]) -> None:
    with pytest.raises(InputError, match="finite numbers"):
        summarize(values)


# Parts


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),
    [
        (0.975, 1, 12.706205),
        (0.975, 4, 2.776445),
        (0.995, 6, 3.707428),
        (0.999, 9, 4.296806),
        (0.975, 10_000, 1.960201),
        (0.5, 5, 0.0),
    ],
)
def test_student_as_in_tables(p: float, freedom: float, expected: float) -> None:
    assert student_quantile(p, freedom) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_biweight() -> None:
    location, influence = biweight(np.array([-1.0, 0.0, 1.0, 1000.0]) * 0.01)
    assert -0.002 < location < 0.006
    assert influence[-1] == 0.0
    location, influence = biweight(np.random.default_rng(0).normal(3.0, 0.1, 1000))
    assert location == pytest.approx(3.0, abs=0.01)
    assert influence.mean() == pytest.approx(0.0, abs=1e-9)
    # The influence's variance is the estimate's: 5 % more than a mean's, as theory has it for this cutoff.
    assert 0.1 < influence.std() < 0.11


# Exact cases: without any noise, all that is left is what is assumed


def test_pairs_without_noise() -> None:
    got = paired_ratio([[1.0, 2.0, 3.0]] * 3, [[1.1, 2.2, 3.3]] * 3)
    # Variance of a process: 1 % squared with 4 degrees of freedom and 0 with 2; t(6) at 97.5 % is 2.44691.
    half = 2.44691 * math.sqrt(4 * 0.01**2 / 6 / 3)
    assert got.estimate == pytest.approx(1.1)
    assert interval(got) == pytest.approx((1.1 * math.exp(-half), 1.1 * math.exp(half)), rel=1e-5)
    assert (got.confidence, got.n, got.verdict, got.needed) == (0.95, 9, "slower", None)
    assert got.resolution == pytest.approx(math.sinh(half), rel=1e-4)


def test_one_process_is_judged_by_the_assumption() -> None:
    low, high = interval(paired_ratio([[1.0] * 8], [[1.0] * 8]))
    assert math.log(high) == pytest.approx(2.776445 * 0.01, rel=1e-5)
    assert low * high == pytest.approx(1.0)


def test_reports_without_noise() -> None:
    _, high = interval(unpaired_ratio([[1.0] * 4] * 3, [[1.0] * 5] * 3))
    # Two sides share the process effect's variance; 1 % squared for the time between them; t(363) is 1.96652.
    assert math.log(high) == pytest.approx(1.96652 * math.sqrt(4 * 0.01**2 / 6 / 3 + 0.01**2), rel=1e-4)


def test_processes_of_one_iteration_are_judged_by_what_they_show() -> None:
    a, b = [[1.0]] * 8, [[math.exp(0.03 * k)] for k in (-2, -1, -1, 0, 0, 1, 1, 2)]
    # t(7) times 3.9 % / sqrt(8) is 3.3 %, for a mean; 2.5 % if 1 % were assumed as well.
    assert 0.031 < math.log(interval(paired_ratio(a, b))[1]) < 0.037
    assert paired_ratio(a, a).verdict == "no difference"


def test_verdicts() -> None:
    a = [[1.0] * 8] * 3  # the interval is +- 1.16 %
    for b, verdict in (
        (1.0, "no difference"),
        (1.02, "no difference"),
        (1.023, "slower"),
        (0.975, "faster"),
        (0.98, "no difference"),
    ):
        assert paired_ratio(a, [[b] * 8] * 3).verdict == verdict, b
    # Neither is 4 % excluded, nor is less than 1 %: with half a resolution, the same interval says too little.
    assert paired_ratio(a, [[1.02] * 8] * 3, resolution=0.025).verdict == "cannot tell"
    assert paired_ratio(a, [[1.02] * 8] * 3, threshold=0.0).verdict == "slower"


@pytest.mark.parametrize("ratio", [paired_ratio, unpaired_ratio])
def test_two_numbers_are_no_verdict(ratio: Callable[..., Ratio]) -> None:
    assert FEWEST == 6
    for count in range(1, FEWEST):
        assert ratio([[1.0] * count], [[2.0] * count]) == Ratio(
            pytest.approx(2.0), None, None, 0.95, count, "cannot tell", None, FEWEST
        )
    assert ratio([[1.0] * 3] * 2, [[2.0] * 3] * 2).verdict == "slower"


def test_needed_pairs_mostly_suffice() -> None:
    """Measured anew with as many processes as were asked for, noise of 8 % tells in most runs."""
    told = []
    for seed in range(0, 80, 2):
        got = paired_ratio(noisy(seed, noise=0.08).tolist(), noisy(seed + 1, noise=0.08).tolist())
        if got.verdict == "cannot tell":
            assert got.needed is not None
            assert got.needed > got.n == 24
            assert got.needed % 8 == 0
            shape = got.needed // 8, 8
            a, b = noisy(1000 + seed, shape, noise=0.08), noisy(1001 + seed, shape, noise=0.08)
            told.append(paired_ratio(a.tolist(), b.tolist()).verdict != "cannot tell")
    assert len(told) >= 30
    assert np.mean(told) >= 0.8


def test_what_no_number_of_iterations_would_tell() -> None:
    a = noisy(0).tolist()
    got = unpaired_ratio(a, a, confidence=0.9999, resolution=0.03)  # the time between reports alone makes 3.9 %
    assert (got.verdict, got.needed) == ("cannot tell", None)


@pytest.mark.parametrize("ratio", [paired_ratio, unpaired_ratio])
def test_what_is_slow_now_and_then_is_not_denied(ratio: Callable[..., Ratio]) -> None:
    """Two of five turns take half as long again: no outliers, which both sides would have."""
    a, b = noisy(0, (3, 10)), noisy(1, (3, 10))
    assert ratio(a.tolist(), b.tolist()).verdict == "no difference"
    b[:, ::5] *= 1.5
    b[:, 3::5] *= 1.5
    for got in (ratio(a.tolist(), b.tolist()), ratio(b.tolist(), a.tolist())):
        assert (got.verdict, got.needed) == ("cannot tell", None)
    a[:, ::5] *= 1.5  # a noisy machine, to both
    a[:, 4::5] *= 1.5
    assert ratio(a.tolist(), b.tolist()).verdict == "no difference"


def test_stages_share_the_confidence() -> None:
    a, b = noisy(0).tolist(), noisy(1).tolist()
    got = compare_stages({"step": (a, b), "total": (b, a)})
    assert list(got) == ["step", "total"]
    assert got == {"step": paired_ratio(a, b, confidence=0.975), "total": paired_ratio(b, a, confidence=0.975)}
    assert compare_stages({"step": (a, b)}, paired=False, threshold=0.02, resolution=0.1) == {
        "step": unpaired_ratio(a, b, threshold=0.02, resolution=0.1)
    }
    assert compare_stages({}) == {}


@pytest.mark.parametrize("bad", [[], [[]], [[1.0], []], [[1.0, 0.0]], [[-1.0]], [[math.nan]], [[math.inf]], [[1e-300]], [[1e300]],
                                 [["1 s"]], [[[1.0], [1.0, 2.0]]], [1.0]])  # fmt: skip
def test_samples_are_positive_times(bad: Any) -> None:
    for ratio in (paired_ratio, unpaired_ratio):
        with pytest.raises(InputError, match="b: expected positive finite times"):
            ratio([[1.0]], bad)


def test_pairs_need_partners() -> None:
    with pytest.raises(InputError, match=r"got \[2, 1\] and \[1, 2\].*\n.*unpaired_ratio"):
        paired_ratio([[1.0, 1.0], [1.0]], [[1.0], [1.0, 1.0]])


@pytest.mark.parametrize("limits", [{"confidence": 1.0}, {"confidence": 0.0}, {"threshold": -0.1}, {"threshold": 0.05}])
def test_limits_that_make_no_sense(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match="0 <= threshold < resolution"):
        paired_ratio([[1.0] * 8], [[1.0] * 8], **limits)


# Properties

seeds = st.integers(0, 2**32)
shapes = st.sampled_from(SHAPES)
few = settings(max_examples=25, deadline=None)


@few
@given(seeds, shapes, st.floats(1e-3, 1e3))
def test_scaling_scales(seed: int, shape: tuple[int, int], factor: float) -> None:
    a, b = noisy(seed, shape), noisy(seed + 1, shape)
    for ratio in (paired_ratio, unpaired_ratio):
        plain, scaled = ratio(a.tolist(), b.tolist()), ratio(a.tolist(), (factor * b).tolist())
        assert scaled.estimate == pytest.approx(factor * plain.estimate)
        assert interval(scaled) == pytest.approx([factor * end for end in interval(plain)])
        assert scaled.resolution == pytest.approx(plain.resolution)


@few
@given(seeds, shapes)
def test_swapping_inverts(seed: int, shape: tuple[int, int]) -> None:
    a, b = noisy(seed, shape).tolist(), noisy(seed + 1, shape).tolist()
    for ratio in (paired_ratio, unpaired_ratio):
        there, back = ratio(a, b), ratio(b, a)
        low, high = interval(back)
        assert there.estimate == pytest.approx(1.0 / back.estimate)
        assert interval(there) == pytest.approx((1.0 / high, 1.0 / low))


@few
@given(seeds, shapes, st.floats(0.0, 0.5))
def test_common_drift_cancels_in_pairs(seed: int, shape: tuple[int, int], size: float) -> None:
    a, b = noisy(seed, shape), noisy(seed + 1, shape)
    drift = np.exp(np.random.default_rng(seed).normal(0.0, size, shape[0] * shape[1]).cumsum()).reshape(shape)
    plain, drifted = paired_ratio(a.tolist(), b.tolist()), paired_ratio((a * drift).tolist(), (b * drift).tolist())
    assert drifted.estimate == pytest.approx(plain.estimate)
    assert interval(drifted) == pytest.approx(interval(plain))


@few
@given(seeds, st.integers(0, 23), st.booleans(), st.sampled_from([1e-2, 1e2, 1e6]))
def test_one_spike_moves_nothing_much(seed: int, where: int, in_a: bool, factor: float) -> None:
    a, b = noisy(seed, spikes=0.0), noisy(seed + 1, spikes=0.0)
    for ratio in (paired_ratio, unpaired_ratio):
        plain = ratio(a.tolist(), b.tolist())
        spiked_a, spiked_b = a.copy(), b.copy()
        (spiked_a if in_a else spiked_b).flat[where] *= factor
        spiked = ratio(spiked_a.tolist(), spiked_b.tolist())
        assert spiked.estimate == pytest.approx(plain.estimate, abs=0.004)
        assert spiked.resolution == pytest.approx(plain.resolution, rel=0.35)


@few
@given(seeds, st.permutations(range(5)))
def test_order_of_processes_does_not_matter(seed: int, order: list[int]) -> None:
    a, b = noisy(seed, (5, 6)), noisy(seed + 1, (5, 6))
    assert interval(paired_ratio(a[order].tolist(), b[order].tolist())) == pytest.approx(
        interval(paired_ratio(a.tolist(), b.tolist()))
    )


# Simulation. Seeded, so that it passes or fails for good; the bounds lie between what the two levels and the adjustment
# give and what is seen without them.

STAGES = ("text_encoder", "step", "vae_decoder", "post", "total")


def runs(count: int, slowdown: float = 1.0, **noise: float) -> list[dict[str, Ratio]]:
    """Comparisons of five stages of alternating runs, 3 processes of 8 iterations; B's step is slower."""
    return [
        compare_stages({
            name: (
                noisy(seed := 2 * len(STAGES) * run + 2 * k, **noise).tolist(),
                (noisy(seed + 1, **noise) * (slowdown if name == "step" else 1.0)).tolist(),
            )
            for k, name in enumerate(STAGES)
        })
        for run in range(count)
    ]  # fmt: skip


def test_quiet_machine_gives_no_false_alarm_and_finds_a_slowdown() -> None:
    same = runs(200)
    assert np.mean([all(r.verdict == "no difference" for r in run.values()) for run in same]) >= 0.97
    slower = runs(200, slowdown=1.05)
    assert np.mean([run["step"].verdict == "slower" for run in slower]) >= 0.95
    assert (
        np.mean([all(r.verdict == "no difference" for name, r in run.items() if name != "step") for run in slower])
        >= 0.97
    )


def test_processes_that_differ() -> None:
    """Process effects of 1 %, as large as an iteration's noise and larger than what is assumed."""
    noise = {"process": 0.01, "spikes": 0.05}
    together = runs(200, **noise)
    # 97 %; without the adjustment 82 %, with one level 34 %.
    assert np.mean([all(map(holds, run.values())) for run in together]) >= 0.93
    alone = [paired_ratio(noisy(2 * k, **noise).tolist(), noisy(2 * k + 1, **noise).tolist()) for k in range(600)]
    assert np.mean([holds(r) for r in alone]) >= 0.93  # 96 %; with one level 65 %
    assert np.mean([r.verdict in ("slower", "faster") for r in alone]) <= 0.015  # 0.3 %; with one level 3 %


def test_noise_that_hides_a_slowdown_is_said() -> None:
    """Noise of 5 %: a slowdown is not always found, but it is not denied either."""
    got = [r["step"].verdict for r in runs(200, slowdown=1.05, noise=0.05, spikes=0.1)]
    assert got.count("no difference") <= 4
    assert got.count("cannot tell") >= 100


@pytest.mark.parametrize("apart", [0.0, 0.01])
def test_reports_from_two_times(apart: float) -> None:
    """The machine is 1 % slower or faster at another time: still no alarm, and 10 % are found."""
    rng = np.random.default_rng(5)
    pairs = [(noisy(2 * k), noisy(2 * k + 1) * math.exp(rng.normal(0.0, apart))) for k in range(300)]
    assert np.mean([holds(unpaired_ratio(a.tolist(), b.tolist())) for a, b in pairs]) >= 0.95
    assert np.mean([unpaired_ratio(a.tolist(), (1.1 * b).tolist()).verdict == "slower" for a, b in pairs]) >= 0.95
