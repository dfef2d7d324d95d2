"""The machine's rates: what is counted, and that threads are what was asked for. Never how fast."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdrt.bench import machine
from sdrt.errors import InputError, SdrtError
from tests.conftest import environment


def test_rates_are_numbers() -> None:
    got = machine.measure(1)
    assert got["threads"] == 1
    assert all(0 < got[name] < math.inf for name in ("sgemm", "bandwidth"))


def test_work_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes 9 seconds in the warm-up, then 4, 2, 3 in the runs; the fastest counts."""
    now = [0.0]
    durations = iter([9.0, 4.0, 2.0, 3.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])

    def run() -> None:
        now[0] += next(durations)

    assert machine._best(100, run, seconds=8) == 50


def test_flop_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_best", lambda work, run, seconds: (run(), work)[1])
    assert machine._sgemm(product=(3, 5, 7)) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bytes_of_a_copy(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Each byte is read once and written once, by exactly one thread."""
    copied: list[Any] = []
    copyto = np.copyto

    def watched(target: Any, source: Any) -> None:
        assert not target.any(), "written twice"
        copyto(target, source)
        copied.append(len(target))

    monkeypatch.setattr(machine, "_best", lambda work, run, seconds: (run(), work)[1])
    monkeypatch.setattr(machine.np, "copyto", watched)
    assert machine._copy(threads, size=1000) == 2000
    assert sum(copied) == 1000
    assert len(copied) == threads


def test_the_blas_is_told_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment of a process of its own; the caller's is left alone."""
    seen: list[Any] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        seen.append((command[1:], {env.get(name) for name in machine.VARIABLES}))
        return subprocess.CompletedProcess(command, 0, '{"sgemm": 1.0, "bandwidth": 1.0, "threads": 3}', "")

    for name in machine.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine.subprocess, "run", run)
    machine.measure(3)
    machine.measure()
    assert seen == [
        (["-P", "-m", "sdrt.bench.machine", "--threads", "3"], {"3"}),
        (["-P", "-m", "sdrt.bench.machine"], {None}),
    ]
    assert not any(name in os.environ for name in machine.VARIABLES)


def test_the_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('a file of the user')")
    monkeypatch.chdir(tmp_path)
    assert machine.measure(1)["threads"] == 1


@pytest.mark.parametrize(
    ("memory", "cache", "expected"),
    [(2**34, 2**20, 2**28), (2**34, 2**27, 2**29), (2**30, 2**20, 2**26), (2**34, 2**30, 2**30), (0, 2**20, 2**28)],
)
def test_a_copy_leaves_room(memory: int, cache: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 MiB, or four times the cache, of a machine that has them; else a sixteenth of its memory."""
    monkeypatch.setattr(machine.processor, "memory", lambda: memory)
    monkeypatch.setattr(machine, "_last_level_cache", lambda: cache)
    assert machine._copied() == expected


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="threads is 0, expected at least 1"):
        machine.measure(0)
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError: no room\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SdrtError, match="cannot be measured: MemoryError: no room"):
        machine.measure()
    failed = subprocess.CompletedProcess([], -9, "", "")
    with pytest.raises(SdrtError, match="cannot be measured: exit status -9"):
        machine.measure()
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: os.stat("/nowhere"))
    with pytest.raises(SdrtError, match=r"cannot be measured: .*No such file"):
        machine.measure()


def test_numpy_is_all_it_needs() -> None:
    code = "import sys, sdrt.bench.machine; print([m for m in ('torch', 'onnx', 'onnxruntime', 'psutil') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
