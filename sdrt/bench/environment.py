"""The machine that was measured, and what else it was doing meanwhile."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdrt import processor
from sdrt.bench.memory import library

OTHERS = 0.05
"""Share of the machine's processor time, used by other processes, beyond which a figure carries a warning."""
STEAL = 0.02
"""Likewise, for time that a hypervisor gave to others."""
CLOCK = 0.05
"""Likewise, for a relative change of the clock."""
TICK = 0.01
"""Seconds that the system's account of a processor's time may be wrong by: it counts in ticks."""


@dataclass(frozen=True)
class Environment:
    """cores: physical; threads: logical; usable: those that this process may use. memory: bytes. clock: MHz.

    ``devices``: engine → what ``devices()`` says, by device name. ``commit``: of sdrt's own checkout, with ``+`` when
    it has changes; None when sdrt is installed from elsewhere.
    """

    processor: str
    features: tuple[str, ...]
    cores: int | None
    threads: int | None
    usable: int | None
    memory: int
    clock: float | None
    system: str
    python: str
    sdrt: str
    commit: str | None
    devices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    drivers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Interference:
    """What else went on between two moments.

    others, steal: shares of all processor time, used by other processes, and given away by a hypervisor (None where
    the system does not tell). load: the load average over a minute, at the beginning and at the end. clock: MHz,
    likewise.
    """

    seconds: float
    others: float
    steal: float | None
    load: tuple[float, float] | None
    clock: tuple[float, float] | None


def warnings(seen: Sequence[Interference]) -> list[str]:
    """What a reader of the figures must know, by the worst of what was seen; empty when it was quiet."""
    said = []
    # What a tick makes of a short time is in doubt.
    others = max((i for i in seen), key=lambda i: i.others - _doubt(i), default=None)
    if others is not None and others.others > OTHERS + _doubt(others):
        said.append(f"other processes used up to {others.others:.0%} of the processor")
    stolen = max(((i.steal - _doubt(i), i.steal) for i in seen if i.steal is not None), default=(0.0, 0.0))
    if stolen[0] > STEAL:
        said.append(f"the hypervisor gave up to {stolen[1]:.0%} of the processor to others")
    clocks = [i.clock for i in seen if i.clock is not None and min(i.clock) > 0]
    if clocks and _change(worst := max(clocks, key=_change)) > CLOCK:
        said.append(f"the clock changed from {worst[0]:.0f} to {worst[1]:.0f} MHz")
    return said


def _doubt(seen: Interference) -> float:
    return TICK / max(seen.seconds, TICK)


def _change(clock: tuple[float, float]) -> float:
    return abs(math.log(clock[1] / clock[0]))


class Watch:
    """Processor time of the whole machine from its making on, less this process's and that of those measured."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._psutil = library()
        self._processes = [self._psutil.Process(), *map(self._psutil.Process, pids)]
        self._started = time.perf_counter()
        self._times, self._own, self._load, self._clock = self._now()

    def stop(self) -> Interference:
        """What went on since the making. The processes must still be there."""
        seconds = time.perf_counter() - self._started
        times, own, load, clock = self._now()
        spent = {name: getattr(times, name) - getattr(self._times, name) for name in times._fields}
        # Linux counts guests' time in user and nice, too.
        idle = sum(spent.get(name, 0.0) for name in ("idle", "iowait", "steal", "guest", "guest_nice"))
        capacity = max(seconds * (os.cpu_count() or 1), 1e-9)
        return Interference(
            seconds=seconds,
            others=min(max((sum(spent.values()) - idle - (own - self._own)) / capacity, 0.0), 1.0),
            steal=spent["steal"] / capacity if "steal" in spent else None,
            load=(self._load, load) if self._load is not None and load is not None else None,
            clock=(self._clock, clock) if self._clock is not None and clock is not None else None,
        )

    def _now(self) -> tuple[Any, float, float | None, float | None]:
        own = [process.cpu_times() for process in self._processes]
        try:
            load = float(self._psutil.getloadavg()[0])
        except OSError:
            load = None
        return self._psutil.cpu_times(), sum(t.user + t.system for t in own), load, clock()


def examine(devices: Mapping[str, Mapping[str, str]] | None = None) -> Environment:
    """The machine, as this process sees it. devices: what engines say (``sdrt.bench.facts.devices``)."""
    import sdrt

    psutil = library()
    return Environment(
        processor=processor.name(),
        features=processor.features(),
        cores=psutil.cpu_count(logical=False),
        threads=os.cpu_count(),
        usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        memory=processor.memory(),
        clock=clock(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        sdrt=sdrt.__version__,
        commit=_commit(Path(sdrt.__file__).resolve().parent.parent),
        devices=devices or {},
        drivers=_drivers(),
    )


def clock() -> float | None:
    """The processor's clock in MHz; None where the system does not tell."""
    try:
        frequency: Any = library().cpu_freq()
    except (OSError, NotImplementedError, AttributeError):  # by system, psutil raises one, or lacks the function
        return None
    return float(frequency.current) if frequency is not None and frequency.current else None


def _commit(root: Path) -> str | None:
    """The commit of a source checkout; None for an installed package."""
    if not (root / ".git").exists():
        return None
    commit = processor.said("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = processor.said("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit or None


def _drivers() -> dict[str, str]:
    driver = processor.said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {"nvidia": driver} if driver else {}
