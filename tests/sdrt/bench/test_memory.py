"""Memory as seen from outside, beside what the system says of the same process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdrt.bench import memory, vram
from sdrt.bench.memory import MemorySampler

MIB = 2**20
HOLD = """
import sys, time
held = bytearray({size}); held[::4096] = b"x" * len(held[::4096])
print("up", flush=True); sys.stdin.readline()
del held
print("down", flush=True); sys.stdin.readline()
"""

PARENT = """
import os, subprocess, sys
p = subprocess.Popen([sys.executable, "-c", {code!r}])
print(p.pid, flush=True); print(os.wait4(p.pid, 0)[2].ru_maxrss)
"""
"""A small one: what wait4 says of a process begins with the peak of the one that it was forked from."""


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told apart on Linux")
def test_peak_is_what_the_system_says_within_three_percent() -> None:
    command = [sys.executable, "-c", PARENT.format(code=HOLD.format(size=200 * MIB))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    said = {process.stdout.readline().strip() for _ in range(2)}
    (pid,) = said - {"up"}
    with MemorySampler(int(pid)) as sampler:
        time.sleep(0.05)
        high = sampler.now()
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        low, peak = sampler.now(), sampler.peak()
    told, _ = process.communicate("\n")
    assert peak.rss == pytest.approx(int(told) * 1024, rel=0.03)
    assert 200 * MIB <= high.anonymous <= peak.rss
    assert low.rss < high.rss - 190 * MIB
    assert peak.anonymous >= 200 * MIB
    assert peak.device is None


def test_children_count() -> None:
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {HOLD.format(size=100 * MIB)!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with MemorySampler(process.pid) as sampler:
        process.stdout.readline()
        time.sleep(0.05)
        peak = sampler.peak()
    process.communicate("\n\n")
    assert peak.rss > 100 * MIB


def test_mapped_files_are_not_anonymous(tmp_path: object) -> None:
    path = f"{tmp_path}/weights.npy"
    np.save(path, np.ones(50 * MIB // 8))
    with MemorySampler(os.getpid()) as sampler:
        before = sampler.now()
        mapped = np.load(path, mmap_mode="r")
        assert float(mapped.sum()) > 0
        after = sampler.now()
    if sys.platform == "linux":
        assert after.rss - before.rss > 45 * MIB
        assert after.anonymous - before.anonymous < 5 * MIB


class Unsupported(Exception):
    """What a driver answers to a question that a device knows not."""


def test_a_child_that_ends_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, real, calls = MemorySampler(os.getpid()), memory._usage, []

    def ended(process: Any) -> memory.Usage:
        calls.append(process)
        if len(calls) == 2:
            raise memory.library().NoSuchProcess(process.pid)
        return real(process)

    monkeypatch.setattr(memory, "_usage", ended)
    monkeypatch.setattr(sampler, "_family", lambda: [sampler._process] * 2)
    assert sampler.now().rss > 0
    assert len(calls) == 2


def test_drivers_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums what the driver lists for these processes; None when it lists none of them, or does not say how much."""
    listed = {0: [SimpleNamespace(pid=1, usedGpuMemory=100), SimpleNamespace(pid=2, usedGpuMemory=7)],
              1: [SimpleNamespace(pid=1, usedGpuMemory=50)]}  # fmt: skip
    driver = SimpleNamespace(
        NVMLError=Unsupported,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: listed[handle],
    )
    monkeypatch.setattr(vram, "_library", lambda: driver)
    assert vram.device_memory([1]) == 150
    assert vram.device_memory([1, 2]) == 157
    assert vram.device_memory([3]) is None
    listed[1][0].usedGpuMemory = None
    assert vram.device_memory([1]) is None
    assert vram.device_memory([2]) == 7

    def unsupported(handle: int) -> None:
        raise Unsupported

    driver.nvmlDeviceGetComputeRunningProcesses = unsupported
    assert vram.device_memory([2]) is None
