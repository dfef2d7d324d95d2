"""Memory on NVIDIA devices, by the driver's account, where nvidia-ml-py is installed and there is such a device."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection
from typing import Any


def device_memory(pids: Collection[int]) -> int | None:
    """Bytes that these processes hold on all NVIDIA devices, contexts included.

    None where nobody can tell: no driver, none of the processes known to it (it may number them otherwise, in a
    container), or a driver that does not say.
    """
    library = _library()
    if library is None:
        return None
    held: list[int | None] = []
    try:
        for index in range(library.nvmlDeviceGetCount()):
            handle = library.nvmlDeviceGetHandleByIndex(index)
            for process in library.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid in pids:
                    held.append(process.usedGpuMemory)  # None under Windows' driver model
    except library.NVMLError:
        return None
    return sum(n for n in held if n is not None) if held and None not in held else None


@functools.cache
def _library() -> Any:
    """The driver's library, initialised; None without it or without a driver."""
    try:
        library = importlib.import_module("pynvml")
        library.nvmlInit()
    except Exception:  # its errors are built at run time, and share no base class with ImportError
        return None
    return library
