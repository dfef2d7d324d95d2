"""Start-up: ``import sdrt``, and process start → picture on disk, as whole processes.

    python benchmarks/startup.py BUNDLE [-n 15]

BUNDLE is a tiny bundle (the README's first command makes out/tiny). The two bundles, ONNX and built for ONNX Runtime,
and the bare interpreter are measured in turn, one warm-up each; times are wall seconds, memory is the process's peak.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(command: list[str]) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of one process, which must succeed."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} exited with {process.returncode}")
    return wall, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-n", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "built"
        build = [sys.executable, "-m", "sdrt", "build", str(args.bundle), str(built), "--engine", "onnxruntime"]
        subprocess.run(build, check=True, stderr=subprocess.DEVNULL)

        def generate(bundle: Path) -> list[str]:
            size = ["-W", "64", "-H", "64", "--steps", "4", "--seed", "1"]
            out = str(Path(scratch) / "x.png")
            return [sys.executable, "-m", "sdrt", "generate", "a fox", "-m", str(bundle), "-o", out, *size]

        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "python -c 'import sdrt'": [sys.executable, "-c", "import sdrt"],
            "generate, ONNX bundle": generate(args.bundle),
            "generate, engine bundle": generate(built),
        }
        runs: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
        for round_ in range(args.n + 1):
            for name, command in commands.items():
                figure = run(command)
                if round_:
                    runs[name].append(figure)
    print(f"{'':26} {'median':>8} {'min':>8} {'max':>8} {'peak RSS':>10}   n={args.n}, load {os.getloadavg()[0]:.2f}")
    for name, figures in runs.items():
        walls = [wall for wall, _ in figures]
        peak = max(memory for _, memory in figures)
        print(f"{name:26} {statistics.median(walls):7.3f}s {min(walls):7.3f}s {max(walls):7.3f}s {peak / 1e6:7.0f} MB")


if __name__ == "__main__":
    main()
