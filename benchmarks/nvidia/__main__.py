"""sdrt beside diffusers on one NVIDIA GPU, all of it by one line; README's table is filled by it.

    python -m benchmarks.nvidia --check                     the functional first things, a line each: run this first
    python -m benchmarks.nvidia CHECKPOINT OUT              everything below
    python -m benchmarks.nvidia --fill report.json          README and log from a report that was made elsewhere
    python -m benchmarks.nvidia CHECKPOINT OUT --cpu        a rehearsal of the same chain on the CPU; fills nothing

CHECKPOINT: in diffusers' layout; made where there is none (full-size SD 1.5, random weights). OUT keeps the export, a
bundle an engine and its compiled kernels, so that a second run measures at once; report.json, and sdrt bench's report
of each batch size.

Ours: TensorRT-RTX, TensorRT and ONNX Runtime's CUDA provider (plain, with its fused kernels, and these with channels
last), in float16, each that is usable here. Beside them diffusers in float16, eager and compiled with CUDA graphs; and
in float32, whose picture all are held against. Each makes its pictures alone, while the card's memory is watched; then
time, in alternation (docs/bench.md). One that fails says why in its row.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.nvidia import cards, check, findings, measure, prepare, tables
from benchmarks.nvidia.findings import Findings, Row
from benchmarks.nvidia.measure import Ask
from sdrt import processor
from sdrt.bench import environment, facts
from sdrt.bench.memory import library
from sdrt.errors import InputError, SdrtError

MODES = ("reduce-overhead", "max-autotune")
EAGER, COMPILED = "eager", "compiled"


def size(text: str) -> tuple[int, int]:
    """``512x512``"""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) % 8 == int(height) % 8 == 0 < int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size in multiples of 8, such as 512x512")
    return int(width), int(height)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.nvidia", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT")
    made.add_argument("out", type=Path, nargs="?", metavar="OUT")
    made.add_argument("--batch", type=positive, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    made.add_argument("--steps", type=positive, default=20)
    made.add_argument("--shape", type=size, default=(512, 512), metavar="WxH")
    made.add_argument("--rounds", type=positive, default=10, metavar="N", help="batches of each, a start (default: 10)")
    made.add_argument("--starts", type=positive, default=3, metavar="N", help="fresh processes of each (default: 3)")
    made.add_argument("--readme", type=Path, metavar="FILE", help="default: README.md of this checkout")
    made.add_argument("--log", type=Path, metavar="FILE", help="default: benchmarks/LOG.md of this checkout")
    keys = [*dict.fromkeys(ours.key for ours in (*prepare.ON_A_GPU, *prepare.ON_THE_CPU)), EAGER, COMPILED]
    made.add_argument("--only", nargs="+", choices=keys, metavar="KEY",
                      help=f"of {', '.join(keys)}; README and log are then filled where they are named")  # fmt: skip
    made.add_argument("--compile", nargs="+", choices=MODES, default=[MODES[0]], metavar="MODE",
                      help=f"of torch.compile, a row each: {', '.join(MODES)} (default: {MODES[0]})")  # fmt: skip
    made.add_argument("--peers", type=Path, metavar="DIR", help="an environment with diffusers and torch for CUDA")
    made.add_argument("--gpu", type=int, default=0, metavar="N",
                      help="which one runs (default: 0); plans are built on the first")  # fmt: skip
    made.add_argument("--alignment", type=positive, metavar="N", help="also: N captions of the demo model, read")
    made.add_argument("--prepare", action="store_true", help="export and build, and measure nothing")
    made.add_argument("--cpu", action="store_true", help="rehearse on the CPU: float32, nothing compiled")
    made.add_argument("--check", nargs="*", choices=[*check.CHECKS], metavar="NAME",
                      help=f"check, and measure nothing; all, or of {', '.join(check.CHECKS)}")  # fmt: skip
    made.add_argument("--fill", type=Path, metavar="REPORT", help="fill README and log from this report.json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, 1 for an error or rows without figures, 2 for usage."""
    made = parser()
    args = made.parse_args(arguments)
    if args.fill is None and args.check is None and args.out is None:
        made.error("CHECKPOINT and OUT are needed")
    try:
        if args.fill is not None:
            _fill(findings.load(args.fill), args)
            return 0
        if args.check is not None:
            _gpu(args.gpu)
            return check.run_all(args.check or list(check.CHECKS), f"cuda:{args.gpu}")
        given = sys.argv[1:] if arguments is None else arguments
        return run(args, f"python -m benchmarks.nvidia {shlex.join(given)}")
    except SdrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _gpu(index: int) -> Any:
    """The card. EngineUnavailable without one, InputError without that one."""
    from sdrt_engines import cuda

    found = cuda.gpus()
    if not 0 <= index < len(found):
        raise InputError(f"--gpu {index}: there are {', '.join(f'{gpu.index} ({gpu.name})' for gpu in found)}")
    return found[index]


def _places(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """README and log that are to be written: named, or the checkout's, where all was measured on a GPU."""
    whole = not (args.cpu or args.only)
    readme = args.readme or (prepare.ROOT / "README.md" if whole else None)
    return readme, args.log or (prepare.ROOT / "benchmarks" / "LOG.md" if whole else None)


def _fill(found: Findings, args: argparse.Namespace) -> None:
    readme, log = _places(args)
    if readme is not None:
        tables.write_readme(readme, found)
    if log is not None:
        tables.write_log(log, found)


def run(args: argparse.Namespace, command: str) -> int:
    """Prepare, measure, write."""
    library()  # before anything takes long
    gpu = None if args.cpu else _gpu(args.gpu)
    readme, _ = _places(args)
    if readme is not None and not args.prepare:
        tables.check_readme(readme)
    ask = Ask("cpu" if gpu is None else f"cuda:{gpu.index}", args.shape[0], args.shape[1], args.steps)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    prepare.checkpoint(args.checkpoint, say)
    onnx = prepare.exported(args.checkpoint, out, say)
    about = _about(gpu)
    ours, builds, missing = [], [], []
    for one in prepare.ON_THE_CPU if args.cpu else prepare.ON_A_GPU:
        if args.only and one.key not in args.only:
            continue
        why = prepare.why_not(one, ask.device)
        if not why:
            done = prepare.built(one, onnx, out, args.shape, max(args.batch), about, say)
            builds.append(done)
            why = done.failure
        if why:
            say(f"{one.name}: {why}")
            missing += [Row(one.name, True, batch, failure=why) for batch in args.batch]
        else:
            ours.append(one)
    if args.prepare:
        return 1 if missing else 0
    found = _measured(args, ask, gpu, onnx, ours, tuple(missing), command)
    found = dataclasses.replace(found, builds=tuple(builds))
    if args.alignment:
        found = _with_alignment(found, ours, args, ask)
    found.save(out / "report.json")
    print(tables.section(found))
    _fill(found, args)
    return 1 if any(row.failure for row in found.rows) else 0


def _measured(
    args: argparse.Namespace, ask: Ask, gpu: Any, onnx: Any, ours: Sequence[prepare.Ours], missing: tuple[Row, ...],
    command: str,
) -> Findings:  # fmt: skip
    peak = cards.peak(gpu.name) if gpu is not None else None
    rows: list[Row] = []
    versions: dict[str, str] = {}
    warnings: list[str] = []
    paired = True
    for batch in args.batch:
        floor = cards.floor(cards.step_flop(onnx, ask.width, ask.height, batch), peak)
        plans = [measure.plan_of_ours(one, args.out, ask, batch) for one in ours]
        plans += [
            measure.plan_of_diffusers(name, options, args.checkpoint, args.out, ask, batch, args.peers)
            for name, options in _peers(args, ask)
        ]
        reference = measure.plan_of_diffusers(
            measure.REFERENCE, {}, args.checkpoint, args.out, ask, batch, args.peers
        )  # fmt: skip
        done = measure.measure(
            plans, {one.name for one in ours}, reference, floor=floor,
            used=measure.used_on(gpu.index) if gpu is not None else None, room=gpu.memory if gpu is not None else None,
            warmups=measure.WARMUPS if gpu is not None else 1, starts=args.starts, turns=args.rounds, progress=say,
        )  # fmt: skip
        rows += [*(row for row in missing if row.batch == batch), *done.rows]
        versions |= done.versions
        warnings += done.warnings
        if done.report is not None:
            done.report.save(args.out / f"batch-{batch}.json")
            paired = paired and all(each.paired for each in done.report.comparisons)
    for line in measure.errors(rows):
        say(line)
    machine = environment.examine()
    return Findings(
        created=datetime.now(UTC).isoformat(timespec="seconds"), command=command,
        device=gpu.name if gpu is not None else processor.name(), about=_about(gpu), sdrt=machine.sdrt,
        commit=machine.commit, width=ask.width, height=ask.height, steps=ask.steps, scheduler=measure.SCHEDULER,
        guidance_scale=measure.GUIDANCE, starts=args.starts, turns=args.rounds, paired=paired, rows=tuple(rows),
        flops=peak, loop=measure.loop(onnx, ask, args.rounds, say),
        versions=versions | facts.versions(("numpy", "cuda-bindings", "onnxruntime-gpu")),
        warnings=tuple(dict.fromkeys(warnings)),
    )  # fmt: skip


def _peers(args: argparse.Namespace, ask: Ask) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of diffusers' runner."""
    half = {"fp16": True} if ask.on_gpu else {}
    wanted = args.only or [EAGER, COMPILED]
    found: list[tuple[str, dict[str, Any]]] = []
    if EAGER in wanted:
        found.append((f"{measure.EAGER} {'fp16' if half else 'fp32'}", half))
    if COMPILED in wanted and ask.on_gpu:
        found += [(f"diffusers compiled fp16 ({mode})", {**half, "compile": mode}) for mode in args.compile]
    return found


def _about(gpu: Any) -> str:
    """The card's kind and driver; of a CPU the system."""
    if gpu is None:
        return environment.examine().system
    driver = processor.said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    from sdrt_engines import cuda

    told = [gpu.target, f"{gpu.memory / 1e9:.0f} GB", *([f"driver {driver[0]}"] if driver else [])]
    return ", ".join([*told, f"CUDA {cuda.driver_version()}"])


def _with_alignment(found: Findings, ours: Sequence[prepare.Ours], args: argparse.Namespace, ask: Ask) -> Findings:
    aligned: list[findings.Aligned] = []
    warnings = list(found.warnings)
    for one in ours:
        if not one.folder:  # another's bundle, opened otherwise
            try:
                aligned += check.alignment(one, args.out, args.alignment, ask.device, say)
            except SdrtError as error:
                warnings.append(f"{one.name}: no alignment: {error.message}")
    return dataclasses.replace(found, aligned=tuple(aligned), warnings=tuple(warnings))


def say(what: str) -> None:
    """To standard error, with the time."""
    print(f"{datetime.now(UTC):%H:%M:%S} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
