"""What all runners share. Only the standard library is imported here, so that import times are the peers' own."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The very file that sdrt is served with: importing sdrt itself needs what the peers lack.
sys.path.append(str(Path(__file__).resolve().parents[2] / "sdrt" / "bench"))
from serve import serve  # type: ignore[import-not-found]

__all__ = ["SCHEDULERS", "clock", "expect", "expect_ddim", "expect_size", "loaded", "scheduler_of", "serve"]

clock = time.perf_counter


SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DPM++ 2M": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "use_karras_sigmas": False},
    ),
}
"""By sdrt's name: diffusers' class, and what is set of it whatever the checkpoint's config says."""


def expect(
    device: str | None, streams: int, options: Mapping[str, Any], *known: str, cuda: bool = False
) -> None:  # fmt: skip
    """ValueError for another device than the CPU, more than one stream, or an option that is not known.

    cuda: ``cuda:0``, ``cuda:1`` … are devices, too.
    """
    word, _, number = (device or "cpu").partition(":")
    if not (device in (None, "cpu") or (cuda and word == "cuda" and number.isdecimal())):
        raise ValueError(f"device is {device}: this peer is compared on {'cpu and cuda:N' if cuda else 'the CPU'}")
    if streams != 1:
        raise ValueError(f"{streams} streams: a peer makes one batch at a time")
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"unknown options {', '.join(unknown)}, expected {', '.join(known) or 'none'}")


def expect_ddim(scheduler: str) -> None:
    """ValueError for another scheduler than the one that every peer has."""
    if scheduler.upper() not in ("DDIM", "DDIMSCHEDULER"):
        raise ValueError(f"scheduler is {scheduler}: the peers are compared under DDIM")


def scheduler_of(scheduler: str) -> tuple[str, Mapping[str, Any]]:
    """diffusers' class and options for sdrt's name of a scheduler, or for the class's. ValueError for another one."""
    for name, (kind, options) in SCHEDULERS.items():
        if scheduler.upper() in (name.upper(), kind.upper()):
            return kind, options
    raise ValueError(f"scheduler is {scheduler}: the peers are compared under {' and '.join(SCHEDULERS)}")


def expect_size(fixed: tuple[int, int, int], width: int, height: int, batch: int) -> None:
    """ValueError for another (width, height, batch) than the model was compiled for."""
    if (width, height, batch) != fixed:
        raise ValueError(f"{width}x{height}, batch {batch}: compiled for {fixed[0]}x{fixed[1]}, batch {fixed[2]}")


def loaded(started: float, imported: float, *distributions: str) -> Mapping[str, Any]:
    """What ``load`` answers, called when all is loaded: seconds apart, and the distributions' versions."""
    versions = {name: version(name) for name in distributions}
    return {"import": imported - started, "load": clock() - imported, "versions": versions}
