"""A figure of where each scheduler's network calls lie: noise level σ over calls, 20 steps of Stable Diffusion 1.5.

    python -m benchmarks.sigmas docs/sigmas.svg

Small panels, one a sampler, then one a schedule (of DPM++ 2M); the grey line is Euler's.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from sdrt import schedulers
from sdrt.schedulers import NAMES, SUFFIXES

STEPS = 20
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
WIDE, HIGH, COLUMNS = 150, 110, 7
LOWEST, HIGHEST = math.log10(0.02), math.log10(20)


def sigmas(name: str) -> list[float]:
    """σ of each network call."""
    levels: list[float] = schedulers.make(schedulers.resolve(name, BASE), STEPS).sigmas.tolist()
    return levels


def panel(name: str, label: str, column: int, row: int, plain: list[float]) -> list[str]:
    """One set of dots."""
    left, top = 8 + column * (WIDE + 10), 8 + row * (HIGH + 26)

    def points(levels: list[float]) -> list[tuple[float, float]]:
        places = np.linspace(left + 6, left + WIDE - 6, len(levels))
        part = [(math.log10(level) - LOWEST) / (HIGHEST - LOWEST) for level in levels]
        return [(float(x), top + HIGH - 6 - (HIGH - 12) * p) for x, p in zip(places, part, strict=True)]

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points(plain))
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="#1668a8"/>' for x, y in points(sigmas(name))]
    return [
        f'<rect x="{left}" y="{top}" width="{WIDE}" height="{HIGH}" fill="#f6f8fa" rx="4"/>',
        f'<polyline points="{line}" fill="none" stroke="#bbb"/>',
        *dots,
        f'<text x="{left + WIDE / 2}" y="{top + HIGH + 15}" text-anchor="middle">{label}</text>',
    ]


def main() -> None:
    samplers = [(name, name) for name in NAMES]
    schedules = [(f"DPM++ 2M {suffix}", suffix) for suffix in SUFFIXES]
    first = math.ceil(len(samplers) / COLUMNS) * COLUMNS  # schedules begin a row
    places = [*enumerate(samplers), *enumerate(schedules, first)]
    plain, rows = sigmas("Euler"), math.ceil((first + len(schedules)) / COLUMNS)
    width, height = 16 + COLUMNS * (WIDE + 10), 16 + rows * (HIGH + 26)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, (name, label) in places:
        parts += panel(name, label, i % COLUMNS, i // COLUMNS, plain)
    Path(sys.argv[1]).write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
