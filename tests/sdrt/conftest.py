"""Fixtures of the runtime's tests."""

from __future__ import annotations

from typing import Any

import pytest


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
