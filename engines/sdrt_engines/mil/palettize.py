"""Weights as indices into a table of 2ⁿ values: the best table there is, by k-means on the weight's distinct values.

A float16 weight has at most 65,536 distinct values, so that k-means runs on counts of these, whatever the weight's
size. MIL's ``constexpr_lut_to_dense``; Core ML decompresses it when it loads, or as it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SMALLEST = 2048
"""Values. A smaller weight's table is no small part of it."""
ROUNDS = 40
"""Of k-means; it stops when no index changes any more."""


@dataclass(frozen=True)
class Palettized:
    """A weight as its table f16[groups, 2ⁿ] (a group is some of the output channels) and indices u8[weight's shape]."""

    table: Array
    indices: Array

    def dense(self) -> Array:
        """The weight that Core ML computes with."""
        parts = self.indices.reshape(len(self.table), -1).astype(np.intp)
        return np.take_along_axis(self.table, parts, axis=1).reshape(self.indices.shape)

    def constant(self, name: str, grouped: bool) -> Any:
        """The operation, in the function that is open in coremltools' builder; ``grouped``: as since iOS 18."""
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil import types

        bits = self.table.shape[1].bit_length() - 1
        if not grouped:
            packed = np.packbits(
                np.unpackbits(self.indices.reshape(-1, 1), axis=1, bitorder="little")[:, :bits].reshape(-1),
                bitorder="little",
            )
            shape = np.array(self.indices.shape, np.uint32)
            return Builder.constexpr_lut_to_dense(lut=self.table[0], indices=packed, shape=shape, name=name)
        kind = types.string_to_nptype(f"uint{bits}")
        lut = self.table.reshape(len(self.table), *(1,) * (self.indices.ndim - 1), -1, 1)
        return Builder.constexpr_lut_to_dense(indices=self.indices.astype(kind), lut=lut, name=name)


@dataclass
class Palette:
    """Called with each weight, gives what becomes of it; None for one that stays as it is. Kept for later functions.

    grouped: in iOS 18's form, with a table for every ``group`` output channels, 0 for all; else in iOS 16's, with one.
    """

    bits: int
    grouped: bool = False
    group: int = 0
    made: dict[str, Palettized] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """By weight, the root mean square of what it lost, over its own."""

    def __call__(self, label: str, array: Array) -> Palettized | None:
        if array.size < SMALLEST or array.dtype != np.float16:
            return None
        if label not in self.made:
            groups = array.shape[0] // self.group if self.group and array.shape[0] % self.group == 0 else 1
            self.made[label] = found = palettized(array, self.bits, groups)
            exact = array.astype(np.float32)
            lost = np.linalg.norm(found.dense().astype(np.float32) - exact)
            self.errors[label] = float(lost / max(float(np.linalg.norm(exact)), 1e-30))
        return self.made[label]


def palettized(weight: Array, bits: int, groups: int = 1) -> Palettized:
    """The weight's first axis in ``groups`` equal parts, each with a table of its own. weight: f16."""
    parts = np.ascontiguousarray(weight).reshape(groups, -1)
    tables, indices = zip(*(_clustered(part, 2**bits) for part in parts), strict=True)
    return Palettized(np.stack(tables), np.stack(indices).reshape(weight.shape))


def _clustered(values: Array, size: int) -> tuple[Array, Array]:
    """(table f16[size], indices u8[n]) of one part: Lloyd's algorithm, from quantiles on."""
    codes = (values + np.float16(0)).view(np.uint16)  # -0 as 0
    counts = np.bincount(codes, minlength=2**16)
    present = np.flatnonzero(counts)
    points = present.astype(np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(points, kind="stable")
    points, present = points[order], present[order]
    if len(points) <= size:  # each has a place of its own
        table, by_code = np.resize(points, size).astype(np.float16), np.zeros(2**16, np.uint8)
        by_code[present] = np.arange(len(points))
        return table, by_code[codes]
    weights = counts[present].astype(np.float64)
    total, sums = (np.concatenate([[0.0], np.cumsum(w)]) for w in (weights, weights * points))
    # A table of least squared error is as dense as the cube root of the values' density (Panter and Dite, 1951).
    apart = np.gradient(points)
    spread = np.cumsum(np.cbrt(weights / apart) * apart)
    table = np.interp((np.arange(size) + 0.5) / size * spread[-1], spread, points)
    for _ in range(ROUNDS):
        edges = np.searchsorted(points, (table[1:] + table[:-1]) / 2)
        starts, ends = np.concatenate([[0], edges]), np.concatenate([edges, [len(points)]])
        count = total[ends] - total[starts]
        moved = np.where(count > 0, (sums[ends] - sums[starts]) / np.maximum(count, 1), table)
        if np.array_equal(moved, table):
            break
        table = moved
    rounded = np.sort(table).astype(np.float16)
    nearest = np.searchsorted((rounded[1:].astype(np.float64) + rounded[:-1].astype(np.float64)) / 2, points)
    by_code = np.zeros(2**16, np.uint8)
    by_code[present] = nearest
    return rounded, by_code[codes]
