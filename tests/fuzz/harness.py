"""Runs a parser over many inputs in a process of its own, with a limit on memory and on time for each input.

Input ``i`` follows from parser, seed and ``i`` alone: first the parser's seeds and monsters, then mutants of the seeds.
What kills the process or does not return to Python is seen by the parent, which goes on behind it.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import mmap
import os
import pkgutil
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

try:
    import resource
except ImportError:  # not on Windows: no limit on memory then
    resource = None  # type: ignore[assignment]

from sdrt.errors import SdrtError
from tests.fuzz import parsers

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 2**30
"""Bytes of address space that parsing may take beyond what the process has when it starts."""
SECONDS, SECONDS_PER_MIB = 2.0, 1.0
"""Of processor time: what one input may take, and what each MiB of it adds. So a busy machine makes no hang."""
STUCK = 30.0
"""Seconds after which the parent ends a process that waits for something, or does not return to Python."""
STARTING = 300.0
"""Seconds that a process may take to import what it needs and to make the monsters."""
MAX_MESSAGE = 2500
"""Characters of an error, which is read by a person."""


class Parser(Protocol):
    """Satisfied by a module in ``tests.fuzz.parsers``."""

    def seeds(self) -> list[bytes]:
        """Good inputs, made in code, a few KB each."""

    def mutate(self, rng: random.Random, seeds: Sequence[bytes]) -> bytes:
        """One input; most of what ``tests.fuzz.mutate`` offers."""

    def feed(self, data: bytes, folder: Path) -> None:
        """Parse, and use what was accepted. ``folder`` is an empty directory that is kept between calls.

        Raises SdrtError (or what ``REFUSALS`` lists) for what is refused; any other exception is a crash.
        """

    # Optional: def monsters() -> list[tuple[str, bytes]], single inputs of a size or shape that mutants do not reach;
    # REFUSALS: tuple of exception types, where a parser's contract names others than SdrtError.


class Hang(BaseException):
    """Raised by the watchdog; no Exception, so that no parser takes it for one of its own."""


@dataclass
class Failure:
    index: int
    kind: str
    what: str


@dataclass
class Tally:
    """Of one parser. Seconds; MB of resident memory at the peak, and before the first input."""

    parser: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    hangs: int = 0
    slowest: float = 0.0
    slowest_index: int = -1
    seconds: float = 0.0
    rss_start: float = 0.0
    rss_peak: float = 0.0
    failures: list[Failure] = field(default_factory=list)


def names() -> list[str]:
    return sorted(info.name for info in pkgutil.iter_modules(parsers.__path__) if info.name[0] != "_")


def load(name: str) -> Parser:
    return cast(Parser, importlib.import_module(f"tests.fuzz.parsers.{name}"))


class Inputs:
    """The inputs of one parser, by index. ``fixed``: how many seeds and monsters it has, where that is known."""

    def __init__(self, name: str, seed: int, fixed: int = -1) -> None:
        self._parser, self._key = load(name), f"{seed}/{name}"
        self._seeds = self._parser.seeds()
        self._monsters: list[bytes] | None = None
        self.fixed = fixed if fixed >= 0 else len(self._seeds) + len(self._made())

    def _made(self) -> list[bytes]:
        """The monsters; making them takes seconds."""
        if self._monsters is None:
            self._monsters = [data for _, data in getattr(self._parser, "monsters", list)()]
        return self._monsters

    def __getitem__(self, index: int) -> bytes:
        if index < len(self._seeds):
            return self._seeds[index]
        if index < self.fixed:
            return self._made()[index - len(self._seeds)]  # none, where ``fixed`` is given as 0
        return self._parser.mutate(random.Random(f"{self._key}/{index}"), self._seeds)


def _status(name: str) -> float:
    """MB, from Linux's table of this process; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":")), 0.0)


class _Formatted(logging.Handler):
    """Formats each record, as a real log would, and drops it."""

    def emit(self, record: logging.LogRecord) -> None:
        if len(record.getMessage()) > MAX_MESSAGE:
            raise AssertionError(f"a line of the log has {len(record.getMessage())} characters")


def feed(parser: Parser, data: bytes, folder: Path, limit: float) -> tuple[str, str, float]:
    """("accepted" | "refused" | "crash" | "hang", what, seconds) of one input, here. The main thread's timer is used."""

    def alarm(_signal: int, _frame: FrameType | None) -> None:
        raise Hang

    refusals = getattr(parser, "REFUSALS", (SdrtError,))
    before = signal.signal(signal.SIGPROF, alarm)
    started = time.process_time()
    outcome, what = "accepted", ""
    try:
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            parser.feed(data, folder)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except Hang:
        outcome, what = "hang", traceback.format_exc()
    except refusals as error:
        outcome, what = "refused", str(error)
        if not 0 < len(what) <= MAX_MESSAGE:
            outcome, what = "crash", f"a message of {len(what)} characters: {what[:300]}"
    except BaseException as error:  # KeyboardInterrupt too: a parser has no business to raise it
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome, what = "crash", traceback.format_exc()
    finally:
        signal.signal(signal.SIGPROF, before)
    seconds = time.process_time() - started
    if outcome in ("accepted", "refused") and seconds > limit:  # a call into C that the alarm could not end
        outcome, what = "hang", f"{seconds:.1f} s, in C"
    return outcome, what, seconds


def worker(name: str, seed: int, fixed: int, first: int, end: int, progress: Path, result: Path) -> None:
    """Runs inputs ``first`` to ``end`` in this process; ``progress`` holds the index that is under way."""
    warnings.simplefilter("error")
    handler = logging.getLogger("sdrt")
    handler.handlers, handler.propagate = [_Formatted()], False
    logging.raiseExceptions = True
    parser, inputs, tally = load(name), Inputs(name, seed, fixed), Tally(name)
    if first < fixed:
        inputs[fixed - 1]  # made before memory is counted
    gc.collect()
    gc.freeze()
    tally.rss_start = _status("VmRSS")
    if resource is not None and sys.platform == "linux":
        limit = int(_status("VmSize") * 2**20) + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with (
        tempfile.TemporaryDirectory(prefix="sdrt-fuzz-") as folder,
        progress.open("r+b") as file,
        mmap.mmap(file.fileno(), 8) as under_way,
    ):
        for index in range(first, end):
            under_way[:] = struct.pack("<q", index)
            data = inputs[index]
            allowed = SECONDS + SECONDS_PER_MIB * len(data) / 2**20
            outcome, what, seconds = feed(parser, data, Path(folder), allowed)
            tally.inputs += 1
            tally.seconds += seconds
            if seconds > tally.slowest:
                tally.slowest, tally.slowest_index = seconds, index
            if outcome == "accepted":
                tally.accepted += 1
            elif outcome == "refused":
                tally.refused += 1
            else:
                tally.crashes += outcome == "crash"
                tally.hangs += outcome == "hang"
                if len(tally.failures) < 1000:
                    tally.failures.append(Failure(index, outcome, what))
    tally.rss_peak = _status("VmHWM")
    result.write_text(json.dumps(asdict(tally)))


def run(name: str, count: int, seed: int, saved: Path | None = None, *, monsters: bool = True) -> Tally:
    """Feed a parser ``count`` inputs in processes of their own; failing inputs are kept in ``saved``."""
    total = Tally(name)
    inputs = Inputs(name, seed, -1 if monsters else 0)
    fixed = inputs.fixed
    count = max(count, fixed)
    first = 0
    with tempfile.TemporaryDirectory(prefix="sdrt-fuzz-") as folder:
        progress, result = Path(folder) / "progress", Path(folder) / "result"
        while first < count:
            # The first stretch is that of seeds and monsters, so that only one process holds those.
            progress.write_bytes(struct.pack("<q", -1))
            result.unlink(missing_ok=True)
            # In stretches, so that a crash of the process costs little of the counting.
            end = fixed if first < fixed else min(count, first + 5000)
            stuck, errors = _watch(name, seed, fixed, first, end, progress, result)
            if result.exists():
                part = json.loads(result.read_text())
                total.failures += [Failure(**failure) for failure in part["failures"]]
                for key in ("inputs", "accepted", "refused", "crashes", "hangs", "seconds"):
                    setattr(total, key, getattr(total, key) + part[key])
                if part["slowest"] > total.slowest:
                    total.slowest, total.slowest_index = part["slowest"], part["slowest_index"]
                total.rss_start = total.rss_start or part["rss_start"]
                total.rss_peak = max(total.rss_peak, part["rss_peak"])
                first = end
                continue
            # The process died, or was stuck: that is the fault of the input that was under way.
            (index,) = struct.unpack("<q", progress.read_bytes())
            if index < 0:
                raise RuntimeError(f"{name}: the process did not come to its first input: {errors}")
            total.inputs += index + 1 - first
            total.refused += index - first  # or accepted: their counts went with the process
            total.hangs += stuck
            total.crashes += not stuck
            total.failures.append(Failure(index, "hang" if stuck else "crash", f"the process ended: {errors[-2000:]}"))
            first = index + 1
    if saved is not None and total.failures:
        where = saved / name
        where.mkdir(parents=True, exist_ok=True)
        for failure in total.failures[:200]:
            (where / f"{seed}-{failure.index}").write_bytes(inputs[failure.index])
            (where / f"{seed}-{failure.index}.txt").write_text(f"{failure.kind}\n{failure.what}", errors="replace")
    return total


def _watch(name: str, seed: int, fixed: int, first: int, end: int, progress: Path, result: Path) -> tuple[bool, str]:
    """Runs one worker; whether it had to be ended because it was stuck, and what it said."""
    arguments = ["--worker", name, seed, fixed, first, end, progress, result]
    sources = os.pathsep.join(str(ROOT / part) for part in ("", "export", "engines"))
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz", *map(str, arguments)], cwd=ROOT, stdout=said, stderr=said,
            env=os.environ | {"PYTHONPATH": sources, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        seen, since = -1, time.monotonic()
        stuck = False
        while process.poll() is None:
            (index,) = struct.unpack("<q", progress.read_bytes())
            if index != seen:
                seen, since = index, time.monotonic()
            elif time.monotonic() - since > (STUCK if index >= 0 else STARTING):
                stuck = True
                process.kill()
            time.sleep(0.02)
        said.seek(0)
        return stuck, f"status {process.returncode}\n{said.read()}"


def table(tallies: Sequence[Tally]) -> str:
    """The summary, one line a parser."""
    head = (
        "parser",
        "inputs",
        "accepted",
        "refused",
        "crashes",
        "hangs",
        "slowest s",
        "mean ms",
        "RSS start",
        "RSS peak MB",
    )
    rows: list[Sequence[Any]] = [
        (t.parser, t.inputs, t.accepted, t.refused, t.crashes, t.hangs, f"{t.slowest:.2f}",
         f"{1000 * t.seconds / max(1, t.inputs):.2f}", f"{t.rss_start:.0f}", f"{t.rss_peak:.0f}")
        for t in tallies
    ]  # fmt: skip
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            str(cell).ljust(w) if i == 0 else str(cell).rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    )
