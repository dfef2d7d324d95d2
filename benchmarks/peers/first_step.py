"""How long from the start of a process to its first denoising step, beside the peers that compile, with a warm cache.

    python -m benchmarks.peers.first_step MODELS BUNDLE... --peers DIR --caches DIR [--shape 512x512] [-n 5]
        [--only NAME ...] [-O name=value ...] [--json FILE]

MODELS, BUNDLE, -O and --peers as in compare.py, whose plans these are. Each runs once without being timed, which fills
its folder of CACHES and the system's cache of files; then in fresh processes, one at a time, in an order that changes.
"To the first step": start, imports, loading, text, compiling (the VAE's decoder, too, which some do before and some
after the step), until the first step is done; later steps, decoding and what makes pictures of it are left out. Its
network call is told apart, as the part that no loading can shorten. Memory is the peak until the picture is done. One
that fails is told, and left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers import compare
from sdrt.bench.memory import MemorySampler
from sdrt.bench.rounds import Plan
from sdrt.errors import SdrtError

CACHING = ("optimum-intel", "openvino-genai")
"""The peers whose runners take a cache."""


def plans(args: argparse.Namespace) -> dict[str, Plan]:
    """Each with a cache, where it can have one, and without."""
    made: dict[str, Plan] = {}
    for number, (name, plan) in enumerate(compare.plans(args).items()):
        made[name] = plan
        if name in CACHING or name.startswith("sdrt openvino"):
            folder = args.caches / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            settings = dataclasses.replace(plan.settings, cache=str(folder))
            made[f"{name}, warm cache"] = dataclasses.replace(plan, settings=settings)
    return made


def once(plan: Plan) -> dict[str, float]:
    """Seconds of one process, and bytes."""
    with plan.start() as process, MemorySampler(process.pid) as sampler:
        loaded = process.ask(plan.loading())
        sample = process.ask(plan.running())["samples"][0]
        peak = sampler.peak()
    after = sum(sample.get(stage) or 0.0 for stage in ("vae_decoder", "post")) + sum(sample["steps"][1:])
    text_and_step = sample["total"] - after
    network = (sample.get("network") or sample["steps"])[0]
    load = process.start + loaded["import"] + loaded["load"]
    return {
        "to the first step": load + text_and_step, "loaded": load, "network": network, "rss": peak.rss,
        "anonymous": peak.anonymous,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="MODELS")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--peers", type=Path, required=True, metavar="DIR")
    parser.add_argument("--caches", type=Path, required=True, metavar="DIR")
    parser.add_argument("--shape", default="512x512")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-n", type=int, default=5)
    parser.add_argument("--only", action="append", metavar="NAME", help="of the peers, these; repeatable")
    parser.add_argument("-O", "--option", action="append", metavar="name=value", help="of sdrt's engine; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    args.steps, args.sdcpp = 1, None
    planned = plans(args)
    for name, plan in list(planned.items()):
        print(f"warm-up: {name}", file=sys.stderr)
        try:
            once(plan)
        except SdrtError as error:
            print(f"{name} failed: {error}", file=sys.stderr)
            del planned[name]
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in planned}
    order = random.Random(0)
    for turn in range(args.n):
        for name in order.sample(list(planned), len(planned)):
            taken[name].append(once(planned[name]))
            told = ", ".join(f"{what} {value:.3g}" for what, value in taken[name][-1].items())
            print(f"turn {turn + 1} of {args.n}: {name}: {told}", file=sys.stderr)
            if args.json:  # as it is so far
                args.json.write_text(json.dumps(taken, indent=1) + "\n")
    print(table(taken))
    return 0


def table(taken: Mapping[str, list[dict[str, float]]]) -> str:
    """Markdown: medians, and the range of what is compared."""

    def median(runs: list[dict[str, float]], what: str) -> float:
        return statistics.median(run[what] for run in runs)

    rows: list[tuple[Any, ...]] = [
        ("", "to the first step", "range", "loaded", "of it the network", "the rest", "peak RSS / anonymous"),
        ("---",) * 7,
    ]
    for name, runs in taken.items():
        whole = [run["to the first step"] for run in runs]
        rest = statistics.median(run["to the first step"] - run["network"] for run in runs)
        rows.append((
            name, f"{statistics.median(whole):.2f} s", f"{min(whole):.2f}–{max(whole):.2f}",
            f"{median(runs, 'loaded'):.2f} s", f"{median(runs, 'network'):.2f} s", f"{rest:.2f} s",
            f"{median(runs, 'rss') / 1e9:.2f} / {median(runs, 'anonymous') / 1e9:.2f} GB",
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
