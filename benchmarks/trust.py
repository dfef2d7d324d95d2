"""Can the measuring core be trusted? One bundle beside itself, planted slowdowns, memory beside the system's account.

    python benchmarks/trust.py BUNDLE [--shape 128x128] [--steps 6] [--threads 1] [--same 20] [--planted 10]
        [--json FILE]

Prints four tables: verdicts on the bundle beside itself; whether a slowdown of 5 % of one stage was found; peak memory
beside what /usr/bin/time -v (or wait4, which it reads) says of the same process; what the timers cost a step. The
machine should be quiet: what else ran is printed with it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sdrt import GenerationRequest, Pipeline, pipeline
from sdrt.bench import facts, show
from sdrt.bench.measuring import alternate
from sdrt.bench.memory import MemorySampler
from sdrt.bench.report import Report, Settings
from sdrt.bench.rounds import Plan
from sdrt.bundle import load
from sdrt.cli import common

HERE = Path(__file__).resolve().parent
STAGES = ("unet", "vae_decoder")
PLANT = 1.05


def plan(args: argparse.Namespace, name: str, planted: str | None = None) -> Plan:
    width, height = map(int, args.shape.split("x"))
    settings = Settings(model=str(args.bundle), width=width, height=height, steps=args.steps, prompt="a lighthouse",
                        threads=args.threads)  # fmt: skip
    if planted is None:
        return Plan(name, settings)
    command = (sys.executable, str(HERE / "planted.py"))
    return Plan(name, settings, command, {**os.environ, "PLANTED": f"{planted}={PLANT}"})


def once(args: argparse.Namespace, planted: str | None) -> Report:
    plans = {"base": plan(args, "base"), "other": plan(args, "other", planted)}
    # All stay loaded: a tiny bundle, whose memory is measured apart.
    return alternate(
        plans, warmups=1, iterations=args.iterations, processes=args.starts, memory=False, machine=False
    )  # fmt: skip


def same(args: argparse.Namespace) -> dict[str, Any]:
    """One bundle beside itself."""
    verdicts: list[dict[str, str]] = []
    others = []
    for number in range(args.same):
        report = once(args, None)
        verdicts.append({stage: ratio.verdict for stage, ratio in report.comparisons[0].ratios.items()})
        others.append(max(i.others for i in report.interference))
        print(f"  {number + 1}: {show.comparison(report.comparisons[0])}".replace("\n", "\n     "), flush=True)
    quiet = sum(set(found.values()) == {"no difference"} for found in verdicts)
    stages = dict.fromkeys(s for found in verdicts for s in found)  # a small one is not judged in every run
    rows = [(stage, *(Counter(v.get(stage) for v in verdicts)[kind] for kind in KINDS)) for stage in stages]
    print(common.table(("stage", *KINDS), rows))
    print(f"no difference in any stage: {quiet} of {args.same}; others used up to {max(others):.1%} of the processor\n")
    return {"runs": args.same, "no_difference": quiet, "verdicts": verdicts, "others": others}


KINDS = ("no difference", "slower", "faster", "cannot tell")


def planted(args: argparse.Namespace) -> dict[str, Any]:
    """A slowdown of one stage, in turn of each of ``STAGES``."""
    rows, found = [], 0
    for number in range(args.planted):
        stage = STAGES[number % len(STAGES)]
        report = once(args, stage)
        ratio = report.comparisons[0].ratios["network" if stage == "unet" else stage]
        found += ratio.verdict == "slower"
        interval = f"{ratio.low:.3f} .. {ratio.high:.3f}" if ratio.low and ratio.high else "-"
        rows.append((number + 1, stage, f"{ratio.estimate:.3f}", interval, ratio.verdict))
    print(common.table(("", f"slowed to {PLANT}", "found", "interval", "verdict"), rows))
    print(f"found: {found} of {args.planted}\n")
    return {"runs": args.planted, "found": found}


def memory(args: argparse.Namespace) -> list[float]:
    """Peak resident memory of a worker, watched by us, beside the system's account of the same process."""
    rows, ratios = [], []
    planned = plan(args, "base")
    for _ in range(3):
        timed = ["/usr/bin/time", "-v"] if Path("/usr/bin/time").exists() else []
        lines = [planned.loading(), planned.running(), {"do": "close"}]
        process = subprocess.Popen(
            [*timed, sys.executable, "-m", "sdrt.bench.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        pid = int(subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True)) if timed else process.pid
        with MemorySampler(pid) as sampler:
            for line in lines[:2]:
                process.stdin.write(json.dumps(line) + "\n")
                process.stdin.flush()
                process.stdout.readline()
            peak = sampler.peak().rss
        process.stdin.write(json.dumps(lines[2]) + "\n")
        process.stdin.flush()
        said = process.stderr.read()
        _, _, usage = os.wait4(process.pid, 0)
        theirs = usage.ru_maxrss * 1024
        if timed:
            theirs = next(int(t.split()[-1]) * 1024 for t in said.splitlines() if "Maximum resident" in t)
        ratios.append(peak / theirs)
        rows.append((common.size(peak), common.size(theirs), f"{peak / theirs:.4f}"))
    print(common.table(("peak as watched", "/usr/bin/time -v" if timed else "wait4", "ratio"), rows) + "\n")
    return ratios


def overhead(args: argparse.Namespace) -> dict[str, float]:
    """What the timers inside the loop cost a step: the null engine's loop with them, and with a clock that stands."""

    class Standing:
        @staticmethod
        def perf_counter() -> float:
            return 0.0

    request = GenerationRequest(
        "a lighthouse", width=512, height=512, num_inference_steps=50, seed=1, output_type="latent"
    )
    walls: dict[str, list[float]] = {"timers": [], "standing": []}
    with Pipeline.from_pretrained(args.bundle, "null") as pipe:
        calls = len(pipe.generate(request).timings.steps)
        for _ in range(60):
            for name, clock in (("timers", time), ("standing", Standing)):
                pipeline.time = clock  # type: ignore[assignment,attr-defined]
                started = time.perf_counter()
                pipe.generate(request)
                walls[name].append((time.perf_counter() - started) / calls)
        pipeline.time = time  # type: ignore[attr-defined]
    with Pipeline.from_pretrained(args.bundle) as pipe:
        width, height = map(int, args.shape.split("x"))
        steps = pipe.generate(GenerationRequest("a", width=width, height=height, num_inference_steps=20)).timings.steps
    cost = statistics.median(np.subtract(walls["timers"], walls["standing"]))
    step = statistics.median(steps)
    print(
        f"timers: {cost * 1e6:.2f} µs a step (with {statistics.median(walls['timers']) * 1e6:.1f} µs, without"
        f" {statistics.median(walls['standing']) * 1e6:.1f} µs a null step); a step at {args.shape} takes"
        f" {show.seconds(step)}: {cost / step:.4%}\n"
    )
    return {"timers": cost, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--shape", default="128x128")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="1 leaves a core to the rest of the system")
    parser.add_argument("--same", type=int, default=20)
    parser.add_argument("--planted", type=int, default=10)
    parser.add_argument("-i", "--iterations", type=int, default=8)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{facts.describe(load(args.bundle))}, load {os.getloadavg()[0]:.2f}\n")
    results = {"overhead": overhead(args), "memory": memory(args), "planted": planted(args), "same": same(args)}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
