"""The asking side of ``sdrt.bench.serve``: one measured process, started, asked and ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

from sdrt.errors import SdrtError, quoted

WORKER = (sys.executable, "-P", "-m", "sdrt.bench.worker")
"""Serves sdrt itself, with this interpreter; see ``worker_environment``. -P: not what lies in the current folder."""

TAIL = 2000
"""Characters of a dead process's standard error that its error message shows."""

LEFT = 0.01
"""Share of the pages of files that may stay in memory for a load to be called cold."""


def worker_environment() -> dict[str, str]:
    """This process's, and where it imports from: a worker must not measure another sdrt than the one that asks."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}


class Process:
    """A process that serves. ``start`` seconds passed from its creation to its being ready to load.

    with Process(WORKER, "sd15") as process:
        process.ask({"do": "load", "model": "sd15", ...})
    """

    def __init__(self, command: Sequence[str], name: str, environment: Mapping[str, str] | None = None) -> None:
        """``name``: what errors call it. SdrtError when it does not get ready."""
        self.name = name
        self._log = TemporaryFile()  # noqa: SIM115 - closed with the process
        started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
            )
        except OSError as error:
            self._log.close()
            raise SdrtError(f"{name}: {command[0]} cannot be started: {error.strerror or error}") from None
        try:
            self._answer()
        except BaseException:
            self._process.kill()
            self.close()
            raise
        self.start = time.perf_counter() - started

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a line of the protocol. SdrtError with the message of a failure, or a death's last words."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._answer()

    def close(self) -> None:
        """End it: kindly, and if that does not work, not."""
        process = self._process
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._log.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()  # whatever it computes, nobody waits for it any more
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # nothing, or what it was about to say when it died
            raise self._died()
        try:
            answer = json.loads(line)
        except ValueError:
            raise SdrtError(f"{self.name}: answered {quoted(line)}, expected a line of JSON") from None
        if "error" in answer:
            error = answer["error"]
            raise SdrtError(f"{self.name}: {error['message'] or error['type']}", error["fix"] or "")
        return dict(answer["ok"])

    def _died(self) -> SdrtError:
        code = self._process.wait()
        self._log.seek(0)
        words = self._log.read().decode("utf-8", "replace").strip()[-TAIL:]
        hint = "it may have run out of memory: try a smaller --shape or --batch" if code == -9 else ""
        return SdrtError(
            f"{self.name}: the measured process ended with status {code}: {words or 'it said nothing'}", hint
        )


def forget(paths: Sequence[Path]) -> bool:
    """Drop files from the system's page cache, so that the next load is a cold one.

    False where that cannot be asked, or was no use: what another process has mapped stays, and so does a file of a file
    system in memory.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        with path.open("rb") as file:
            with contextlib.suppress(OSError):  # a file system that is read-only has nothing to write
                os.fsync(file.fileno())  # pages not yet written would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    pages = b"".join(map(_pages, paths))
    return sum(page & 1 for page in pages) <= LEFT * len(pages)


def _pages(path: Path) -> bytes:
    """A byte a page of a file; its lowest bit is set where the page is in memory (mincore(2))."""
    size = path.stat().st_size
    if size == 0:
        return b""
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)  # which the mapping must outlive
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found)
        del start
    return bytes(found) if not failed else b"\1" * len(found)
