"""Shares of yes among yes and no, and two of them on the same pictures: intervals of 95 %, and a test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Interval:
    """An estimate and what holds the truth with 95 %. Shares in [0, 1], differences in [-1, 1], ratios from 0."""

    estimate: float
    low: float
    high: float


def wilson(right: float, n: float, z: float = Z) -> Interval:
    """The share ``right / n`` with Wilson's score interval.

    Wilson (1927), "Probable inference, the law of succession, and statistical inference"; method 3 of Newcombe (1998),
    "Two-sided confidence intervals for the single proportion". ValueError unless 0 <= right <= n and n > 0.
    """
    if not (n > 0 and 0 <= right <= n):
        raise ValueError(f"{right} of {n} is no share")
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    shrink = 1 + z * z / n
    # At 0 and at 1 the bound is exact but for rounding.
    return Interval(p, min(p, max(0.0, (middle - half) / shrink)), max(p, min(1.0, (middle + half) / shrink)))


@dataclass(frozen=True)
class Paired:
    """Yes or no of the same pictures under ``a`` and under ``b``, counted."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @classmethod
    def of(cls, a: Sequence[bool], b: Sequence[bool]) -> Paired:
        """From one answer a picture. ValueError for two lengths, and for none."""
        pairs = list(zip(a, b, strict=True))
        if not pairs:
            raise ValueError("no pairs")
        return cls(*(pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def n(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    def difference(self) -> Interval:
        """b's share less a's.

        Method 10 of Newcombe (1998), "Improved confidence intervals for the difference between binomial proportions
        based on paired data": Wilson's intervals of both shares, put together with the phi coefficient of the pairs,
        which is corrected for continuity where it is positive.
        """
        a, b = wilson(self.both + self.only_a, self.n), wilson(self.both + self.only_b, self.n)
        margins = math.prod((self.both + self.only_a, self.only_b + self.neither,
                             self.both + self.only_b, self.only_a + self.neither))  # fmt: skip
        excess: float = self.both * self.neither - self.only_a * self.only_b
        if excess > 0:
            excess = max(excess - self.n / 2, 0.0)
        phi = excess / math.sqrt(margins) if margins else 0.0

        def root(x: float, y: float) -> float:
            return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

        estimate = (self.only_b - self.only_a) / self.n
        low = estimate - root(b.estimate - b.low, a.high - a.estimate)
        high = estimate + root(b.high - b.estimate, a.estimate - a.low)
        return Interval(estimate, max(-1.0, low), min(1.0, high))

    def ratio(self) -> Interval:
        """b's share over a's; NaN where neither has any, infinite where only a has none.

        Bonett and Price (2006), "Confidence intervals for a ratio of binomial proportions based on paired data": the
        hybrid of Wilson's intervals, each narrowed so that their ratio has the confidence asked for.
        """
        a, b, some = self.both + self.only_a, self.both + self.only_b, self.n - self.neither
        if not some:
            return Interval(math.nan, 0.0, math.inf)
        joint = math.sqrt((self.only_a + self.only_b + 2) / ((a + 1) * (b + 1)))
        apart = sum(math.sqrt((1 - (x + 1) / (some + 2)) / (x + 1)) for x in (a, b))
        of_a, of_b = (wilson(x, some, Z * joint / apart) for x in (a, b))
        high = of_b.high / of_a.low if of_a.low else math.inf
        return Interval(b / a if a else math.inf, of_b.low / of_a.high, high)

    def p_value(self) -> float:
        """That a and b are alike: the exact two-sided test of McNemar, a sign test of the pairs that differ.

        McNemar (1947), "Note on the sampling error of the difference between correlated proportions or percentages".
        """
        differ = self.only_a + self.only_b
        fewer = min(self.only_a, self.only_b)
        tail = sum(math.comb(differ, k) for k in range(fewer + 1))
        return min(1.0, 2 * tail / (1 << differ))
