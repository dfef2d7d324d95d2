"""Wall time and memory of ``sdrt export`` on a full-size checkpoint with random weights.

    python benchmarks/export_full.py [--architecture sd1|sd2] [--checkpoint DIR] [--keep DIR]

Memory is sampled from /proc every 20 ms for each process of the export: resident, and what of it is anonymous (the
rest is mapped files, which the system can drop). The largest single process is what the table shows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

VOCABULARY = Path(__file__).resolve().parent.parent / "tests" / "data" / "clip_bpe_simple_vocab_16e6.txt.gz"


class MemorySampler(threading.Thread):
    """Peaks of resident and anonymous memory, in bytes, of every process below ``pid``, by process."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.done = pid, threading.Event()
        self.peaks: dict[int, dict[str, int]] = {}
        self.names: dict[int, str] = {}

    def run(self) -> None:
        while not self.done.wait(0.02):
            for pid in self._tree():
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                self.names.setdefault(pid, _what(pid))
                fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
                peak = self.peaks.setdefault(pid, {"VmRSS": 0, "RssAnon": 0})
                for name in peak:
                    if name in fields:
                        peak[name] = max(peak[name], int(fields[name].split()[0]) * 1024)

    def _tree(self) -> list[int]:
        found, queue = [], [self.pid]
        while queue:
            pid = queue.pop()
            found.append(pid)
            try:
                queue += [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            except OSError:
                continue
        return found


def _what(pid: int) -> str:
    """``trace unet``, ``check unet``, … or the command itself."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return f"{words[3]} {json.loads(words[4])['part']}"
    except (OSError, IndexError, ValueError, TypeError):
        return "sdrt export"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=("sd1", "sd2"), default="sd1")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint in diffusers' layout; made when left out")
    parser.add_argument("--keep", type=Path, help="where the bundle goes; a temporary place when left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = args.checkpoint
        if checkpoint is None:
            checkpoint = Path(scratch) / f"{args.architecture}-random"
            make = [sys.executable, "-m", "sdrt_export.testing", str(checkpoint), "--size", "full"]
            make += ["--architecture", args.architecture]
            subprocess.run([*make, "--vocabulary", str(VOCABULARY)], check=True)
        out = args.keep or Path(scratch) / "bundle"
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "sdrt", "export", str(checkpoint), str(out), "--force"])
        sampler = MemorySampler(process.pid)
        sampler.start()
        code = process.wait()
        wall = time.perf_counter() - started
        sampler.done.set()
        sampler.join()
        largest = {name: max(peak[name] for peak in sampler.peaks.values()) for name in ("VmRSS", "RssAnon")}
        for pid, peak in sampler.peaks.items():
            print(f"{sampler.names[pid]:22} rss {peak['VmRSS'] / 1e9:.2f} GB, anonymous {peak['RssAnon'] / 1e9:.2f} GB")
        print(
            json.dumps(
                {
                    "exit": code,
                    "wall_s": round(wall, 1),
                    "peak_rss": largest["VmRSS"],
                    "peak_anonymous": largest["RssAnon"],
                }
            )
        )
        sys.exit(code)


if __name__ == "__main__":
    main()
