"""What each precision costs and brings on ONNX Runtime: size, parity, whole pictures, U-Net time, memory.

    python benchmarks/precision.py BUNDLE [--out DIR] [-n 15] [--precision unet=int8 ...] [--shape 128x128] [--steps 10]

Builds BUNDLE (an ONNX bundle) in fp32 and each --precision. Every build runs in a process of its own, which makes one
picture, then U-Net calls in turn with fp32's process; memory is that process's peak. Pictures are compared as floats
(peak 1.0), beside the nearest wrong setting: fp32 with guidance 7.0 instead of 7.5.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from sdrt import Pipeline
from sdrt import bundle as bundles
from sdrt.cli import common
from sdrt.metrics import psnr


def work(bundle: str, width: int, height: int, steps: int, out: str) -> None:
    """A worker: writes pictures to ``out``, then answers each line of standard input by a U-Net call's seconds.

    An empty line ends it; it answers by its peak memory in bytes.
    """
    with Pipeline.from_pretrained(bundle) as pipe:
        arguments: dict[str, Any] = {"width": width, "height": height, "num_inference_steps": steps, "seed": 1}
        pictures = [
            pipe("a lighthouse at dawn", output_type="np", guidance_scale=guidance, **arguments).images
            for guidance in ((7.5, 7.0) if out.endswith("fp32.npy") else (7.5,))
        ]
        np.save(out, np.stack(pictures))
        unet = pipe.sessions[bundles.load(bundle).manifest.denoiser.component]
        sizes = {"B": 2, "H": height, "W": width, "T": 77}
        generator = np.random.default_rng(0)
        inputs = {s.name: generator.standard_normal(s.at(sizes)).astype(np.float32) for s in unet.spec.inputs}
        unet.run(**inputs)
        print("ready", flush=True)
        while sys.stdin.readline().strip():
            started = time.perf_counter()
            unet.run(**inputs)
            print(time.perf_counter() - started, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), flush=True)


class Worker:
    """A process that runs ``work``."""

    def __init__(self, bundle: Path, args: argparse.Namespace) -> None:
        self.picture = bundle.parent / f"{bundle.name}.npy"
        command = [sys.executable, __file__, "--worker", str(bundle), args.shape, str(args.steps), str(self.picture)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._answer() != "ready":
            raise SystemExit(f"{bundle}: the worker failed")

    def call(self) -> float:
        return float(self._ask("run"))

    def close(self) -> int:
        """Peak resident bytes."""
        return int(self._ask(""))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def build(args: argparse.Namespace, precision: str, folder: Path) -> tuple[Path, float]:
    """(the built bundle, seconds)"""
    out = folder / precision
    command = [sys.executable, "-m", "sdrt", "build", str(args.bundle), str(out), "--engine", "onnxruntime", "--force"]
    command += ["--precision", precision, "--shape", args.shape]
    command += ["--calibration", args.calibration] if args.calibration else []
    started = time.perf_counter()
    subprocess.run(command, check=True, stderr=None if args.verbose else subprocess.DEVNULL)
    return out, time.perf_counter() - started


def row(args: argparse.Namespace, precision: str, folder: Path) -> list[object]:
    """One line of the table."""
    fp32 = folder / "fp32"
    built, seconds = (fp32, args.fp32_seconds) if precision == "fp32" else build(args, precision, folder)
    base = Worker(fp32, args)
    other = Worker(built, args) if precision != "fp32" else base
    base_times: list[float] = []
    times: list[float] = []
    for i in range(args.n):
        turns = [(base, base_times), (other, times)]
        for worker, into in turns if i % 2 else reversed(turns):
            into.append(worker.call())
    rss = other.close()
    if other is not base:
        base.close()
    manifest = bundles.load(built).manifest
    parity = [p.psnr for c in manifest.components.values() for p in c.artifact.parity if p.psnr is not None]
    size = sum(file.bytes for c in manifest.components.values() for file in c.artifact.files)
    reference = np.load(folder / "fp32.npy")
    picture = np.load(other.picture)[0]
    median = statistics.median(times)
    ratios = [b / a for a, b in zip(base_times, times, strict=True)]
    decibels = psnr(reference[0], picture, 1.0)
    return [
        precision, f"{seconds:.0f} s", f"{size / 1e6:.1f} MB", f"{min(parity):.1f} dB",
        "-" if decibels == float("inf") else f"{decibels:.1f} dB", f"{psnr(reference[0], reference[1], 1.0):.1f} dB",
        f"{1e3 * median:.1f} ms", f"{1e3 * min(times):.1f}..{1e3 * max(times):.1f}",
        f"{statistics.median(ratios):.2f}", f"{rss / 1e6:.0f} MB",
    ]  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        bundle, shape, steps, out = sys.argv[2:]
        width, height = map(int, shape.split("x"))
        work(bundle, width, height, int(steps), out)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, help="keep the builds here")
    parser.add_argument("-n", type=int, default=15, help="U-Net calls")
    parser.add_argument("--precision", action="append", help="as sdrt build's; repeatable (default: fp16, w8, int8)")
    parser.add_argument("--shape", default="128x128")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--calibration", help="as sdrt build's")
    parser.add_argument("--verbose", action="store_true", help="show the builds' progress")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        _, args.fp32_seconds = build(args, "fp32", folder)
        rows = [row(args, precision, folder) for precision in ("fp32", *(args.precision or ("fp16", "w8", "int8")))]
    head = (
        "precision", "build", "weights", "worst parity", "picture", "guidance 7.0", "U-Net", "min..max ms", "/ fp32",
        "peak RSS",
    )  # fmt: skip
    print(common.table(head, rows))
    print(f"{args.shape}, {args.steps} steps, n={args.n}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
