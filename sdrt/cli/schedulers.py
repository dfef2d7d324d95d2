"""sdrt schedulers"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import click
import numpy as np

from sdrt import schedulers
from sdrt.brownian import Increments
from sdrt.cli import Command, common
from sdrt.schedulers import CLASSES, NAMES, SUFFIXES
from sdrt.schedulers.tables import Array

_BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
"""Stable Diffusion's own training schedule."""
_STEPS = 20
"""Enough for Restart to turn back."""
_LETTERS = dict(zip(SUFFIXES, "KEBSAXUPDLYZ", strict=True))

EXAMPLES = """\
sdrt schedulers
sdrt schedulers --json -
sdrt generate "a lighthouse" --scheduler "DPM++ 2M Karras" --steps 20"""


@dataclass(frozen=True)
class Row:
    """One sampler: its names, what a step costs, what may be asked of it.

    name: A1111's, or diffusers' class where A1111 has none. calls: of the network, a step. stochastic: whether steps
    draw noise unasked; noise: "each step", "some steps", "with eta" or nothing. schedules: names that may follow this
    one. accepts: of timesteps, sigmas and eta.
    """

    name: str
    diffusers: str
    calls: int
    stochastic: bool
    noise: str
    schedules: tuple[str, ...]
    accepts: tuple[str, ...]
    what: str
    paper: str
    arxiv: str


@click.command(cls=Command, examples=EXAMPLES)
@common.json_option
def command(json_file: str | None) -> None:
    """List the schedulers: names, schedules that may follow them, what a step takes, and the papers.

    Any name is good for --scheduler, as are diffusers' class names. Capitals do not matter.
    """
    found = list(rows())
    if json_file is not None:
        common.write_json([asdict(row) for row in found], json_file)
    if json_file != "-":
        click.echo(as_text(found))


def rows() -> Iterator[Row]:
    """Every sampler by its name, then the classes that have none."""
    named = {class_name for class_name, _ in NAMES.values()}
    for name, class_name in [(n, c) for n, (c, _) in NAMES.items()] + [(c, c) for c in CLASSES if c not in named]:
        about = CLASSES[class_name].ABOUT
        calls, drawing = _seen(name)
        noise = "with eta" if not drawing and "eta" in about.accepts else ""
        if drawing:  # a solver's step may be three of these, and the last one without
            noise = "each step" if drawing > _STEPS / 3 else "some steps"
        following = tuple(s for s in SUFFIXES if f"{name} {s}" in schedulers.A1111)
        accepts = tuple(sorted(about.accepts))
        yield Row(
            name, class_name, calls, bool(drawing), noise, following, accepts, about.what, about.paper, about.arxiv
        )


def _seen(name: str) -> tuple[int, int]:
    """Network calls a step, and in how many steps noise is drawn."""
    made = schedulers.make(schedulers.resolve(name, _BASE), _STEPS)
    x = np.ones((1, 4, 8, 8), np.float32)
    noise, drawing = _Watched(), set()
    for i in range(len(made.timesteps)):
        noise.drawn = False
        made.step(x, x, i, noise)
        if noise.drawn:
            drawing.add(i // made.order)
    return made.order, len(drawing)


class _Watched:
    """Noise of nothing, that knows whether it was asked for."""

    drawn = False

    def __call__(self) -> Array:
        self.drawn = True
        return np.zeros((1, 4, 8, 8), np.float32)

    def brownian(self, low: float, high: float) -> Increments:
        return lambda start, end: self()


def as_text(found: list[Row]) -> str:
    """A table, and what its letters mean."""
    table = common.table(
        ("name", "calls", "noise", "schedules", "takes", "paper", "what it is"),
        [
            (
                row.name, row.calls, row.noise, "".join(_LETTERS[s] for s in row.schedules),
                " ".join(row.accepts), f"arXiv {row.arxiv}" if row.arxiv else row.paper, row.what,
            )
            for row in found
        ],
    )  # fmt: skip
    told = ", ".join(f"{letter} {suffix}" for suffix, letter in _LETTERS.items())
    return (
        f"{table}\n\ncalls: of the network, a step. schedules: may follow the name (DPM++ 2M Karras): {told}.\n"
        "takes: what a call may give instead of a number of steps, and eta, how much noise a step draws.\n"
        "diffusers' class names and scheduler_config.json do as well; --json - has them, and the papers' titles."
    )
