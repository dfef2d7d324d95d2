"""What the machine can do, by numpy alone: the rate of float32 matrix products, and memory bandwidth.

    python -m sdrt.bench.machine --threads 2        {"sgemm": FLOP/s, "bandwidth": bytes/s, "threads": 2}

numpy's BLAS takes its number of threads from the environment, once, when it is loaded. So a rate for a number of
threads is measured in a process of its own (``measure``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from sdrt import processor
from sdrt.errors import InputError, SdrtError

VARIABLES = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
)  # fmt: skip
"""Where BLAS libraries look for their number of threads."""

PRODUCT = (1024, 640, 2560)
"""(M, K, N) of one product: the feed-forward layer of SD 1.5's U-Net at half resolution (3.4 GFLOP). Short, so that one
of many runs is left in peace by what else the machine does."""

COPIED = 256 * 2**20
"""Bytes of each of the two arrays of a copy, unless four times the last-level cache are more."""

ROOM = 1 / 16
"""The share of main memory that each of them may take at most."""

SECONDS = 0.6
"""How long each of the two is repeated; the best repetition counts."""


def measure(threads: int | None = None) -> dict[str, float]:
    """``sgemm`` (FLOP/s), ``bandwidth`` (bytes/s) and ``threads``, from a process of its own. About 2 seconds.

    threads: None leaves products to the BLAS's own choice, and copies with one a core that we may use. sgemm: float32
    matrix products of numpy's BLAS. bandwidth: as STREAM's Copy counts, each byte copied is one read and one written;
    what a cache line costs that is fetched to be overwritten is not counted.

    InputError for a number of threads below 1; SdrtError when the process fails, such as for want of memory.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, expected at least 1")
    # -P: what lies in the working directory is not imported
    command = [sys.executable, "-P", "-m", "sdrt.bench.machine"]
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])  # a checkout that is run from elsewhere, not installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    if threads is not None:
        command += ["--threads", str(threads)]
        environment |= dict.fromkeys(VARIABLES, str(threads))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SdrtError(f"the machine's rates cannot be measured: {error}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise SdrtError(f"the machine's rates cannot be measured: {said[-1]}")
    return dict(json.loads(done.stdout))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _best(work: float, run: Callable[[], object], seconds: float) -> float:
    """Work a second of the fastest run, after one to warm up."""
    run()
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return work / best


def _sgemm(seconds: float = SECONDS, product: tuple[int, int, int] = PRODUCT) -> float:
    """FLOP/s, with the threads that this process's BLAS has."""
    m, k, n = product
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal(shape, np.float32) for shape in ((m, k), (k, n)))
    result = np.empty((m, n), np.float32)
    return _best(2 * m * k * n, lambda: np.matmul(left, right, out=result), seconds)


def _copy(threads: int, seconds: float = SECONDS, size: int | None = None) -> float:
    """Bytes/s read plus written; each thread copies its own share (numpy lets go of the interpreter meanwhile)."""
    size = size or _copied()
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    cuts = [size * i // threads for i in range(threads + 1)]
    slices = [slice(a, b) for a, b in pairwise(cuts)]
    with ThreadPoolExecutor(threads) as pool:
        return _best(2 * size, lambda: list(pool.map(lambda s: np.copyto(target[s], source[s]), slices)), seconds)


def _copied() -> int:
    """Bytes of each array of a copy."""
    wanted = max(COPIED, 4 * _last_level_cache())
    return min(wanted, int(processor.memory() * ROOM) or wanted)  # memory is 0 where the system does not tell


def _last_level_cache() -> int:
    """Bytes of the largest cache of the first core, where Linux tells; else 0."""
    units = {"K": 2**10, "M": 2**20}
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else 0)
    return max(sizes)


def main() -> None:
    """Print what this process measures, with the threads that its environment gives the BLAS."""
    parser = argparse.ArgumentParser("python -m sdrt.bench.machine", description="Measure this machine; JSON out.")
    parser.add_argument("--threads", type=int, help="of the copy; the BLAS takes its own from the environment")
    threads = parser.parse_args().threads or _cores()
    print(json.dumps({"sgemm": _sgemm(), "bandwidth": _copy(threads), "threads": threads}))


if __name__ == "__main__":
    main()
