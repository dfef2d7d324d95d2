"""Make, once, what the peers load, from a checkpoint in diffusers' layout, each by its own command line.

    python benchmarks/peers/prepare.py ENV CHECKPOINT DIR

ENV is the peers' environment (``make_env.py``). What DIR holds then:

| folder | what | loaded by |
|---|---|---|
| ``checkpoint`` | a link to CHECKPOINT | diffusers, stable-diffusion.cpp |
| ``onnx`` | ``optimum-cli export onnx`` | optimum onnxruntime |
| ``openvino`` | ``optimum-cli export openvino``, tokenizer included | optimum-intel, openvino-genai |

Each export's wall time, in seconds, and peak resident memory, in bytes, stand in its ``export.json`` and are printed.
What is there already is left alone; an interrupted export leaves ``NAME.making``, which the next one removes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

EXPORTS = {
    "onnx": ["export", "onnx", "--task", "text-to-image"],
    "openvino": ["export", "openvino", "--task", "text-to-image", "--weight-format", "fp32"],
}
REPORT = "export.json"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make what the peers load.")
    parser.add_argument("environment", type=Path, metavar="ENV")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("directory", type=Path, metavar="DIR")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    checkpoint, link = args.checkpoint.resolve(), args.directory / "checkpoint"
    if not link.is_symlink():
        link.symlink_to(checkpoint, target_is_directory=True)
    elif link.resolve() != checkpoint:
        print(f"{args.directory}: made from {link.resolve()}, not from {checkpoint}: name another DIR", file=sys.stderr)
        return 1
    for name, command in EXPORTS.items():
        if (status := export(args.environment, command, checkpoint, args.directory / name)) != 0:
            return status
        print(name, (args.directory / name / REPORT).read_text(encoding="utf-8").strip())
    return 0


def export(environment: Path, command: list[str], checkpoint: Path, out: Path) -> int:
    """Run optimum's command line, which writes to ``out``, unless that is there; its exit status."""
    if out.is_dir():
        return 0
    making = out.with_name(f"{out.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    cli = environment / ("Scripts/optimum-cli.exe" if os.name == "nt" else "bin/optimum-cli")
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(cli.absolute()), *command, "--model", str(checkpoint), str(making)],
        env=inherited | {"HF_HUB_OFFLINE": "1"}, stdout=sys.stderr,
    )  # fmt: skip
    # What /usr/bin/time -v reads too: the largest of the process and those it has waited for.
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        print(f"{out}: not made: optimum-cli ended with status {process.returncode}", file=sys.stderr)
        return process.returncode if process.returncode > 0 else 1
    report = {"command": ["optimum-cli", *command], "wall_s": round(wall, 1), "peak_rss": usage.ru_maxrss * 1024}
    (making / REPORT).write_text(json.dumps(report) + "\n", encoding="utf-8")
    making.rename(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
