"""Memory of a process and its children, watched from outside.

Resident memory counts mapped files, which the system can drop; anonymous memory is what it cannot. The two are given
apart: a bundle's weights may be either.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdrt.bench.vram import device_memory
from sdrt.errors import EngineUnavailable

INTERVAL = 0.01
"""Seconds from one look to the next; a look itself takes some 20 µs for each process on the machine. Shorter peaks are
missed, but for the resident one where the system keeps it (Linux)."""


@dataclass(frozen=True)
class Usage:
    """Bytes: resident, and what of it is anonymous; device: what the driver says of it, None where none does."""

    rss: int
    anonymous: int
    device: int | None = None


class MemorySampler:
    """Looks at a process and its children every ``INTERVAL`` in a thread; ``peak`` is the largest sum it saw.

    with MemorySampler(pid) as sampler:
        ...
    sampler.peak()
    """

    def __init__(self, pid: int) -> None:
        self._process = library().Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._rss = self._anonymous = 0
        self._device: int | None = None
        self._alone = True

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def now(self) -> Usage:
        """What the process and its children take at this moment."""
        family, usages = self._family(), []
        for process in family:
            with contextlib.suppress(library().NoSuchProcess):  # a child that has ended meanwhile
                usages.append(_usage(process))
        device = device_memory([process.pid for process in family])
        return Usage(sum(u.rss for u in usages), sum(u.anonymous for u in usages), device)

    def peak(self) -> Usage:
        """The largest since the start. Linux keeps a process's own resident peak exactly; the rest is what was seen."""
        rss = self._rss
        if self._alone and (kept := high_water(self._process.pid)) is not None:
            rss = max(rss, kept)
        return Usage(rss, self._anonymous, self._device)

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            with contextlib.suppress(library().Error):
                seen = self.now()
                self._rss, self._anonymous = max(self._rss, seen.rss), max(self._anonymous, seen.anonymous)
                if seen.device is not None:
                    self._device = max(self._device or 0, seen.device)

    def _family(self) -> list[Any]:
        children = self._process.children(recursive=True)
        self._alone = self._alone and not children
        return [self._process, *children]


def _usage(process: Any) -> Usage:
    """Linux: resident less mapped files and shared memory; elsewhere what is the process's alone is the nearest."""
    if sys.platform == "linux":
        info = process.memory_info()
        return Usage(info.rss, info.rss - info.shared)
    info = process.memory_full_info()
    return Usage(info.rss, info.uss)


def high_water(pid: int) -> int | None:
    """The largest resident memory that the kernel saw of one process, in bytes. None where it does not tell.

    Not ``ru_maxrss``, which after a fork starts from the parent's.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def library() -> Any:
    """psutil. EngineUnavailable, which says what to install, without it."""
    try:
        import psutil
    except ImportError as error:
        raise EngineUnavailable(
            f"measuring needs psutil, which cannot be imported: {error}", "pip install 'sdrt[bench]'"
        ) from None
    return psutil
