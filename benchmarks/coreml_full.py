"""What a Core ML build of a full-size bundle takes, stage by stage, and how far the saved packages are from float32.

    python -m benchmarks.coreml_full BUNDLE OUT [--precision fp16] [-O attention=split_einsum] [--json report.json]

BUNDLE: of ``sdrt export``. The stages of each component: calibrate and measure (float16 only), translate and write,
check (ONNX Runtime computes the reference at the size that is built for, the verifier evaluates the saved package).
Peak resident memory is the process's up to the end of each component, sampled nowhere: ``ru_maxrss``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from sdrt.bundle import Bundle
from sdrt.cli import common
from sdrt.engine import BuildOptions
from sdrt.verify import reference_cases
from sdrt_engines.build import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("-O", dest="extra", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started = before = time.perf_counter()
    stages: dict[tuple[str, str], float] = {}
    peaks: dict[str, float] = {}
    now = ("", "")

    def report(name: str, what: str, _: float) -> None:
        nonlocal before, now
        seconds, before = time.perf_counter() - before, time.perf_counter()
        if now[0]:
            stages[now] = stages.get(now, 0.0) + seconds
            peaks[now[0]] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        now = (name, "calibrate" if what.startswith(("calibrate", "measure")) else what)

    extra = dict(option.split("=", 1) for option in args.extra)
    options: Any = BuildOptions(precision=args.precision, extra=extra)
    made = build(args.bundle, args.out, "coreml", options, force=True, report=report)
    report("", "", 1)
    rows: list[dict[str, Any]] = [
        {"component": name, "seconds": {what: round(s, 1) for (n, what), s in stages.items() if n == name},
         "peak_gb": round(peaks[name], 2), "bytes": sum(file.bytes for file in component.artifact.files),
         "relative_l2": far(made, name)}
        for name, component in made.manifest.components.items()
    ]  # fmt: skip
    print(f"{platform.processor() or platform.machine()}, {time.perf_counter() - started:.0f} s in all")
    head = ("component", "seconds by stage", "peak GB so far", "MB", "relative L2")
    told = [
        (r["component"], ", ".join(f"{what} {s}" for what, s in r["seconds"].items()), r["peak_gb"],
         round(r["bytes"] / 1e6), f"{r['relative_l2']:.1e}")
        for r in rows
    ]  # fmt: skip
    print(common.table(head, told))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def far(made: Bundle, name: str) -> float:
    """The largest relative L2 of a component's outputs, from the figures that the build measured."""
    worst, cases = 0.0, reference_cases(made, name)
    for parity in made.component(name).artifact.parity:
        if parity.psnr is not None:
            reference = cases[parity.case][1][parity.output].astype(np.float64)
            level = np.abs(reference).max() / np.sqrt(np.mean(reference**2))
            worst = max(worst, float(level * 10 ** (-parity.psnr / 20)))
    return worst


if __name__ == "__main__":
    main()
