"""What the loop costs when the network costs nothing: 512×512 (latents of 64×64), one picture, guidance 7.5."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt.bundle import Component
from sdrt.engine import CheckedSession
from sdrt.pipeline import Pipeline

REQUEST: dict[str, Any] = {"prompt": "a lighthouse", "width": 512, "height": 512, "guidance_scale": 7.5, "seed": 1}
STEPS = 500


class Ready:
    """A network whose answer lies ready. Under guidance nobody keeps it, so that it may be the same one each time."""

    def __init__(self, spec: Component) -> None:
        self.spec = spec
        self.answer = {"out_sample": np.random.default_rng(0).standard_normal((2, 4, 64, 64), dtype=np.float32)}

    def prepare(self, sizes: Any) -> bool:
        return False

    def bind(self, **constants: Any) -> None:
        pass

    def run(self, **inputs: Any) -> dict[str, Any]:
        return self.answer

    def memory(self) -> None:
        return None

    def close(self) -> None:
        pass


@pytest.fixture
def ready(bundle: Path, null: Pipeline) -> Pipeline:
    network = Ready(null.sessions["unet"].spec)
    return Pipeline(null.bundle, null.sessions | {"unet": CheckedSession(null.bundle, "unet", network)})


@pytest.mark.parametrize("scheduler", ["DDIM", "Euler", "DPM++ 2M Karras", "PLMS"])
def test_host_time_of_a_step(benchmark: Any, ready: Pipeline, scheduler: str) -> None:
    """Checks, guidance, scheduler and the loop itself."""
    steps: Iterator[Any] = ready.stream(**REQUEST, num_inference_steps=STEPS, scheduler=scheduler)
    for _ in range(10):  # until a multistep solver has its history
        next(steps)
    benchmark.pedantic(next, (steps,), rounds=STEPS - 20)


def test_generate(benchmark: Any, null: Pipeline) -> None:
    """A whole generation of 20 steps on the null engine: tokens, noise, steps, the picture."""
    assert benchmark(null, **REQUEST, num_inference_steps=20, scheduler="DDIM").size == (512, 512)
