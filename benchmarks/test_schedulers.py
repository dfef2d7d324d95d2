"""Solvers: one step of 64×64 latents, and the tables of 20 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt import schedulers

NAMES = list(schedulers.A1111)


@pytest.fixture
def config(bundle: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    base = schedulers.read_config(bundle / "scheduler" / "scheduler_config.json")
    return schedulers.resolve(request.param, base)


@pytest.mark.parametrize("config", NAMES, indirect=True)
def test_step(benchmark: Any, config: dict[str, Any]) -> None:
    x, pred = np.random.default_rng(0).standard_normal((2, 1, 4, 64, 64), dtype=np.float32)
    scheduler = schedulers.make(config, 20)
    for i in range(10):  # until a multistep solver has its history
        scheduler.step(x, pred, i, x.copy)
    benchmark(scheduler.step, x, pred, 10, x.copy)


@pytest.mark.parametrize("config", NAMES, indirect=True)
def test_tables(benchmark: Any, config: dict[str, Any]) -> None:
    benchmark(schedulers.make, config, 20)
