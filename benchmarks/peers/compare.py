"""sdrt beside its peers, on one checkpoint, in alternation: one report, one table.

    python -m benchmarks.peers.compare MODELS BUNDLE... --peers DIR [--sdcpp DIR] [--shape 512x512] [--steps 3]
        [--warmups 1] [-i 2] [--starts 3] [--only NAME ...] [-O name=value ...] [--time-only] [--json FILE]

MODELS is what prepare.py made, DIRs are environments that make_env.py made, each BUNDLE is one of sdrt's, of the same
checkpoint; the first is what all others are compared with, and -O is what all are opened with. First each makes a
picture from the same noise, which is held against diffusers' in float32; then memory and a cold start, then time; with
--time-only time alone, all loaded together (which takes less than their peaks, as mapped weights can be dropped). The
table is Markdown. "20 steps" is what the stages add up to: the whole, with 20 times the median step for the steps that
were made.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from benchmarks.peers.peers import PEERS
from sdrt.bench import alternate, show
from sdrt.bench.report import Comparison, Settings, Variant
from sdrt.bench.rounds import Plan
from sdrt.bundle import load
from sdrt.errors import SdrtError
from sdrt.metrics import psnr

REFERENCE = "diffusers fp32"
STEPS = 20
"""Of the picture whose time the table computes."""


def plans(args: argparse.Namespace) -> dict[str, Plan]:
    width, height = map(int, args.shape.split("x"))
    base = Settings(
        model="", width=width, height=height, steps=args.steps, scheduler="DDIM", seed=1, threads=args.threads,
        prompt="a lighthouse on a cliff at dawn, oil painting", negative_prompt="blurry",
    )  # fmt: skip
    made = {}
    opened = dict(option.partition("=")[::2] for option in args.option or ())
    for path in args.bundles:
        denoiser = load(path).component("unet").artifact
        name = f"sdrt {denoiser.engine} {denoiser.precision} ({path.name})"
        if name in made:
            sys.exit(f"two bundles would both be called {name}: rename a folder")
        made[name] = Plan(name, dataclasses.replace(base, model=str(path), options=opened))
    if unknown := set(args.only or ()) - {peer.name for peer in PEERS}:
        sys.exit(f"no peer is called {', '.join(sorted(unknown))}; there are {', '.join(peer.name for peer in PEERS)}")
    environments = {"peers": args.peers, "sdcpp": args.sdcpp}
    for peer in PEERS:
        if environments[peer.environment] is None:
            print(f"{peer.name}: no environment given, left out", file=sys.stderr)
            continue
        settings = dataclasses.replace(
            base, model=str(args.models / peer.model), runner=peer.name, options=peer.options_for(width, height, 1)
        )
        made[peer.name] = Plan(peer.name, settings, (str(peer.python(environments)), str(peer.script)))
    wanted = args.only or list(made)
    return {name: plan for name, plan in made.items() if name in wanted or plan.settings.runner == "sdrt"}


def pictures(planned: Mapping[str, Plan]) -> dict[str, float]:
    """Decibels of each one's float picture from diffusers' in float32."""
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in planned.items():
            print(f"picture: {name}", file=sys.stderr)
            file = Path(folder) / "picture.npy"
            try:
                with plan.start() as process:
                    process.ask(plan.loading())
                    process.ask(plan.running(str(file)))
                made[name] = np.load(file)
            except SdrtError as error:
                print(f"{name}: {error}", file=sys.stderr)
    if REFERENCE not in made:
        return {}
    return {name: psnr(made[REFERENCE], picture, 1.0) for name, picture in made.items()}


def row(variant: Variant, comparison: Comparison | None, decibels: float | None) -> Iterator[str]:
    yield variant.name
    step = variant.stages["step"].median
    yield show.seconds(step)
    yield ratio(comparison, "network", "step")
    yield show.seconds(variant.stages["vae_decoder"].median) if "vae_decoder" in variant.stages else "–"
    steps = len(variant.samples[0].steps)
    yield show.seconds(variant.stages["total"].median + (STEPS - steps) * step)
    yield ratio(comparison, "total")
    assert variant.load is not None
    loaded = [sum(parts) for parts in zip(variant.load.start, variant.load.imports, variant.load.load, strict=True)]
    yield show.seconds(float(np.median(loaded)))
    if variant.memory is None:
        yield "–"
    else:
        yield f"{variant.memory.peak.rss / 1e9:.2f} / {variant.memory.peak.anonymous / 1e9:.2f} GB"
    yield "–" if decibels is None else "reference" if decibels == float("inf") else f"{decibels:.0f} dB"


def ratio(comparison: Comparison | None, *stages: str) -> str:
    """``1.23 (1.20–1.26)``: the time of this one over the first one's."""
    if comparison is None:
        return "1"
    found = next((comparison.ratios[stage] for stage in stages if stage in comparison.ratios), None)
    if found is None:
        return "–"
    interval = "" if found.low is None or found.high is None else f" ({found.low:.2f}–{found.high:.2f})"
    return f"{found.estimate:.2f}{interval}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, metavar="MODELS")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--peers", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sdcpp", type=Path, metavar="DIR")
    parser.add_argument("--shape", default="512x512")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("-i", "--iterations", type=int, default=2)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--only", action="append", metavar="NAME", help="of the peers, these; repeatable")
    parser.add_argument("-O", "--option", action="append", metavar="name=value", help="of sdrt's engine; repeatable")
    parser.add_argument("--time-only", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    planned = plans(args)
    decibels = {} if args.time_only else pictures(planned)
    report = alternate(
        planned, warmups=args.warmups, iterations=args.iterations, processes=args.starts, memory=not args.time_only,
        machine=not args.time_only, progress=lambda what: print(what, file=sys.stderr),
    )  # fmt: skip
    if args.json:
        report.save(args.json)
    print(show.text(report) + "\n")
    compared: dict[str, Comparison] = {comparison.other: comparison for comparison in report.comparisons}
    head = ("", "step", "/ sdrt", "VAE decoder", f"{STEPS} steps", "whole / sdrt", "start to loaded",
            "peak RSS / anonymous", "PSNR")  # fmt: skip
    rows = [tuple(row(v, compared.get(v.name), decibels.get(v.name))) for v in report.variants]
    for line in (head, ("---",) * len(head), *rows):
        print(f"| {' | '.join(line)} |")
    print(f"\n{args.shape}, {args.steps} steps, {args.starts} starts of {args.warmups} + {args.iterations} batches")
    for name, failure in report.failures.items():
        print(f"{name} failed: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
