"""Fixtures of the runtime's tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdrt import Pipeline


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch with correctly rounded elementary functions.

    As shipped for x86 it takes them from MKL, whose last bit is off in up to 1 of 100 values, its square root's too:
    so are diffusers' sigmas then. (e^h - 1 - h)/h² and the like make 1e-5 and more of that.
    """

    import torch

    def once(function: Any) -> Any:
        def called(value: Any, *more: Any) -> Any:
            exact = isinstance(value, torch.Tensor) and value.dtype == torch.float32
            return function(value.double(), *more).float() if exact else function(value, *more)

        return called

    for name in ("log", "exp", "expm1", "sqrt"):
        monkeypatch.setattr(torch, name, once(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, name, once(getattr(torch.Tensor, name)))
    power = torch.Tensor.__pow__
    rooted = once(power)
    monkeypatch.setattr(torch.Tensor, "__pow__", lambda x, y: rooted(x, y) if y == 0.5 else power(x, y))


@pytest.fixture(scope="session")
def last_bits() -> float:
    """10 where MKL's square roots are coarse, else 1: by how much bars are wider where torch's own functions are used and
    the last bit counts: for SA-Solver, and for Euler where σ is 4096.

    MKL has other code for each kind of processor. Of 100 square roots one or none has a wrong last bit on Intel's with
    AVX-512 and on AMD's without; 18 on AMD's with AVX-512 (Zen 4, MKL 2024.2), and 3 of 100 logarithms.
    """
    import torch

    values = torch.linspace(0.01, 100, 100_000)
    wrong = (values.sqrt() != values.double().sqrt().float()).double().mean().item()
    return 10.0 if wrong > 0.05 else 1.0


@pytest.fixture(scope="module")
def demo_pipe() -> Iterator[Pipeline]:
    """The model that comes with sdrt."""
    with Pipeline.from_pretrained("demo") as opened:
        yield opened


@pytest.fixture(scope="module")
def demo_diffusers() -> Any:
    """The checkpoint that it was made of, in diffusers' pipeline: float16 weights, computed in float32."""
    import diffusers
    import torch

    from benchmarks.demo import ship

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(
            Path(ship.__file__).parent / "checkpoint", torch_dtype=torch.float32, safety_checker=None
        )
    loaded.set_progress_bar_config(disable=True)
    return loaded
