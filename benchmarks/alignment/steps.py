"""Which scheduler at how many steps: a table and a figure of what evaluate.py read.

    python -m benchmarks.alignment.evaluate -m demo --scheduler "Euler,DPM++ 2M" --steps 4,8,12,20,50 --json steps.json
    python -m benchmarks.alignment.steps steps.json [MORE.json ...] --figure docs/scheduler-steps.svg

The share of pictures that show all that their caption says. Columns are the network calls that were asked for as
"steps"; samplers of two calls a step make as many more, and are marked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.alignment.proportions import Interval, wilson
from sdrt import schedulers

Shares = Mapping[str, Mapping[int, Interval]]
"""By scheduler, by steps."""

CELL, LEFT, TOP = (74, 22), 190, 46


def read(files: list[Path]) -> dict[str, dict[int, Interval]]:
    """The shares of every run of these reports."""
    found: dict[str, dict[int, Interval]] = {}
    for file in files:
        for run in json.loads(file.read_text())["runs"]:
            right = [judged["everything"] == 1.0 for judged in run["right"]]
            name = run["setting"]["scheduler"] or run["sampler"]
            found.setdefault(name, {})[run["setting"]["steps"]] = wilson(sum(right), len(right))
    return found


def calls(name: str) -> int:
    """Network calls a step."""
    return schedulers.make(schedulers.resolve(name, {}), 5).order


def ordered(shares: Shares) -> list[str]:
    """Best first: by the mean over steps."""
    return sorted(shares, key=lambda name: -sum(s.estimate for s in shares[name].values()) / len(shares[name]))


def table(shares: Shares) -> str:
    """Markdown."""
    steps = sorted({count for by_steps in shares.values() for count in by_steps})
    lines = [f"| | {' | '.join(f'{count} steps' for count in steps)} |", f"|---|{'---|' * len(steps)}"]
    for name in ordered(shares):
        cells = [f"{100 * shares[name][c].estimate:.0f} %" if c in shares[name] else "–" for c in steps]
        lines.append(f"| {name}{' (two calls a step)' if calls(name) > 1 else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(shares: Shares) -> str:
    """SVG: one row a scheduler, one column a number of steps, darker where more is right."""
    steps = sorted({count for by_steps in shares.values() for count in by_steps})
    width, height = LEFT + CELL[0] * len(steps) + 10, TOP + CELL[1] * len(shares) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="12" fill="#444">pictures that show all of their caption, by steps</text>',
    ]
    for column, count in enumerate(steps):
        x = LEFT + CELL[0] * (column + 0.5)
        parts.append(f'<text x="{x}" y="{TOP - 8}" text-anchor="middle" font-weight="bold">{count}</text>')
    for row, name in enumerate(ordered(shares)):
        y = TOP + CELL[1] * row
        mark = " ×2" if calls(name) > 1 else ""
        parts.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{name}{mark}</text>')
        for column, count in enumerate(steps):
            if count not in shares[name]:
                continue
            share = shares[name][count].estimate
            x = LEFT + CELL[0] * column
            shade = f"hsl(205,65%,{96 - 58 * share**2:.0f}%)"
            ink = "#fff" if share > 0.75 else "#222"
            parts.append(
                f'<rect x="{x + 1}" y="{y + 1}" width="{CELL[0] - 2}" height="{CELL[1] - 2}" rx="3" fill="{shade}"/>'
            )
            parts.append(
                f'<text x="{x + CELL[0] / 2}" y="{y + 16}" text-anchor="middle" fill="{ink}">{100 * share:.0f}</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json")
    parser.add_argument("--figure", type=Path, metavar="FILE.svg")
    args = parser.parse_args()
    shares = read(args.reports)
    print(table(shares))
    if args.figure is not None:
        args.figure.write_text(figure(shares), encoding="utf-8")


if __name__ == "__main__":
    main()
