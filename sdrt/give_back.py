"""Freed memory, back to the system."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from typing import Any


def give_back() -> None:
    """Return what was freed to the system, where its allocator can be asked to.

    glibc keeps freed memory for the next allocation: after Stable Diffusion 1.5's U-Net was closed in ONNX Runtime, 1.2
    GB stayed with the process, and the next network came on top. https://man7.org/linux/man-pages/man3/malloc_trim.3.html
    """
    gc.collect()  # what an engine's objects hold in cycles is not freed before
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    """glibc's malloc_trim; None with another C library."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
