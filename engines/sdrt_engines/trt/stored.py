"""What is kept in a cache folder between processes: kernels compiled for this GPU, and plans built anew for it.

Both are under hashes that ``checked_cache`` holds against the bytes: what was damaged is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path
from typing import Any

from sdrt.staging import replacing
from sdrt_engines.checked_cache import checked

logger = logging.getLogger("sdrt")


def key(*parts: object) -> str:
    """A file name for what these parts determine."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


def read(folder: Path, name: str) -> bytes | None:
    """``<name>.blob``, None where there is none or it was damaged. InputError where damage cannot be removed."""
    with checked(str(folder), name):
        try:
            return (folder / f"{name}.blob").read_bytes()
        except OSError:
            return None


def write(folder: Path, name: str, content: bytes | memoryview) -> None:
    """Keep ``<name>.blob``; without room or leave to write, it is made again next time."""
    with checked(str(folder), name), contextlib.suppress(OSError), replacing(folder / f"{name}.blob") as file:
        file.write(content)


class RuntimeCache:
    """TensorRT-RTX's compiled kernels of one plan, in a file."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._cache: Any = None
        self._written = read(folder, name) or b""

    def load(self, config: Any) -> None:
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._written:
                self._cache.deserialize(self._written)  # False for one that it does not know: compiled again then
        if not config.set_runtime_cache(self._cache):
            logger.warning("compiled kernels cannot be kept: the library refuses its own cache")

    def save(self) -> None:
        if self._cache is None:
            return
        content = bytes(memoryview(self._cache.serialize()))
        if content != self._written:
            write(self._folder, self._name, content)
            self._written = content
