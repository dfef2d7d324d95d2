"""Solvers: one step of 64×64 latents, and the tables of 20 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import schedulers
from sdrt.brownian import Increments

NAMES = list(schedulers.NAMES)
MORE: list[tuple[str, dict[str, Any]]] = [  # the costliest options
    ("DEIS", {"solver_order": 3}),
    ("DPM++ 2M", {"thresholding": True, "sample_max_value": 3.0}),
    ("DPM++ 2S", {"solver_order": 3}),
    ("PLMS", {"skip_prk_steps": False}),
    ("UniPC", {"solver_order": 3}),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3}),
    ("SA-Solver", {"predictor_order": 4, "corrector_order": 4}),
]


class Same:
    """Noise that costs nothing: what drawing costs is benchmarks/test_noise.py's."""

    def __init__(self, noise: np.ndarray) -> None:
        self._noise = noise

    def __call__(self) -> np.ndarray:
        return self._noise.copy()

    def brownian(self, low: float, high: float) -> Increments:
        return lambda start, end: self()


@pytest.fixture
def config(bundle: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    base = schedulers.read_config(bundle / "scheduler" / "scheduler_config.json")
    name, options = request.param if isinstance(request.param, tuple) else (request.param, {})
    return {**schedulers.resolve(name, base), **options}


@pytest.mark.parametrize("config", [*NAMES, *MORE], indirect=True, ids=str)
def test_step(benchmark: Any, config: dict[str, Any]) -> None:
    x, pred = np.random.default_rng(0).standard_normal((2, 1, 4, 64, 64), dtype=np.float32)
    scheduler, noise = schedulers.make(config, 20), Same(x)
    for i in range(10):  # until a multistep solver has its history, and a solver of two calls begins a step
        scheduler.step(x, pred, i, noise)
    benchmark(scheduler.step, x, pred, 10, noise)


@pytest.mark.parametrize("config", [*NAMES, "DPM++ 2M Karras", "Euler Beta", "Euler AYS"], indirect=True)
def test_tables(benchmark: Any, config: dict[str, Any]) -> None:
    benchmark(schedulers.make, config, 20)
