"""Intervals and the test, against published figures, coverage counted out, and what must hold of any counts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.alignment.proportions import Paired, wilson

COUNTS = st.builds(Paired, *(st.integers(0, 400) for _ in range(4))).filter(lambda pairs: pairs.n > 0)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_newcombe_1998_tabulates_it(right: int, n: int, low: float, high: float) -> None:
    found = wilson(right, n)
    assert (found.estimate, round(found.low, 4), round(found.high, 4)) == (right / n, low, high)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (-1, 5), (6, 5), (math.nan, 5)])
def test_what_is_no_share_is_refused(right: float, n: float) -> None:
    with pytest.raises(ValueError, match="is no share"):
        wilson(right, n)


@given(st.integers(0, 500), st.integers(1, 500))
def test_wilson_is_symmetric_and_holds_its_estimate(right: int, n: int) -> None:
    right = min(right, n)
    one, other = wilson(right, n), wilson(n - right, n)
    assert 0 <= one.low <= one.estimate <= one.high <= 1
    assert one.low == pytest.approx(1 - other.high)
    assert (one.low == 0) == (right == 0)


def test_paired_counts() -> None:
    assert Paired.of([True, True, False, False, True], [True, False, True, False, True]) == Paired(2, 1, 1, 1)
    with pytest.raises(ValueError):
        Paired.of([True], [])
    with pytest.raises(ValueError, match="no pairs"):
        Paired.of([], [])


def test_a_published_table() -> None:
    """Airway hyper-responsiveness before and after a transplantation, as analysed by Fagerland, Lydersen and Laake
    (2014), "Recommended tests and confidence intervals for paired binomial proportions"."""
    pairs = Paired(1, 7, 1, 12)  # 8 of 21 before, 2 of 21 after
    difference, ratio = pairs.difference(), pairs.ratio()
    assert (difference.estimate, round(difference.low, 3), round(difference.high, 3)) == (-6 / 21, -0.507, -0.026)
    assert (ratio.estimate, round(ratio.low, 3), round(ratio.high, 3)) == (0.25, 0.068, 0.923)


@given(COUNTS)
def test_difference_turns_its_sign_with_the_order(pairs: Paired) -> None:
    found = pairs.difference()
    turned = Paired(pairs.both, pairs.only_b, pairs.only_a, pairs.neither).difference()
    assert -1 <= found.low <= found.estimate <= found.high <= 1
    assert (found.low, found.high) == (pytest.approx(-turned.high), pytest.approx(-turned.low))


@given(COUNTS)
def test_ratio_is_inverted_with_the_order(pairs: Paired) -> None:
    found = pairs.ratio()
    turned = Paired(pairs.both, pairs.only_b, pairs.only_a, pairs.neither).ratio()
    if pairs.n == pairs.neither:
        assert math.isnan(found.estimate)
        return
    assert 0 <= found.low <= found.estimate <= found.high
    if found.low > 0 and found.high < math.inf:
        assert (found.low, found.high) == (pytest.approx(1 / turned.high), pytest.approx(1 / turned.low))
    assert (found.high == math.inf) == (pairs.both + pairs.only_a == 0)


@pytest.mark.parametrize("shares", [(0.7, 0.12, 0.06), (0.02, 0.10, 0.02), (0.4, 0.2, 0.2)], ids=str)
def test_intervals_hold_the_truth_as_often_as_they_say(shares: tuple[float, float, float]) -> None:
    """Every table of 24 pairs, weighted by how often it comes: 95 % within what such an interval is known to miss by."""
    n, both, only_a, only_b = 24, *shares
    neither = 1 - sum(shares)
    held = {"difference": 0.0, "ratio": 0.0}
    for a in range(n + 1):
        for b in range(n + 1 - a):
            for c in range(n + 1 - a - b):
                d = n - a - b - c
                ways = math.comb(n, a) * math.comb(n - a, b) * math.comb(n - a - b, c)
                weight = ways * both**a * only_a**b * only_b**c * neither**d
                if weight < 1e-7:
                    continue
                pairs = Paired(a, b, c, d)
                difference, ratio = pairs.difference(), pairs.ratio()
                held["difference"] += weight * (difference.low <= only_b - only_a <= difference.high)
                held["ratio"] += weight * (ratio.low <= (both + only_b) / (both + only_a) <= ratio.high)
    assert all(0.93 < share < 0.998 for share in held.values()), held


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"), [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 0.0625), (9, 1, 22 / 1024), (1, 9, 22 / 1024)]
)
def test_mcnemar_is_a_sign_test(only_a: int, only_b: int, p: float) -> None:
    assert Paired(50, only_a, only_b, 7).p_value() == p


def test_mcnemar_of_many() -> None:
    assert 0 < Paired(0, 2000, 1000, 0).p_value() < 1e-50
