"""Train the reader on drawn pictures.

    python -m benchmarks.alignment.train benchmarks/alignment/reader.safetensors

Stop it whenever you like: the same command goes on. Minutes on two cores.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.alignment.pictures import lesson, spoil
from benchmarks.alignment.reader import Reader, by_head
from benchmarks.alignment.reading import HEADS
from benchmarks.demo.training import Draws, Plan, pixels, train

PLAN = Plan(updates=1000, rate=3e-3, decay=0.5, ema=0.995)
BATCH = 64
UNKNOWN = -100
"""What the loss passes over."""


def loss_of(reader: Reader, draws: Draws) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross entropy of all heads over one batch, and each head's share of right words."""
    lessons = [lesson(draws.python) for _ in range(BATCH)]
    batch = spoil(pixels([picture for picture, _ in lessons], torch.device("cpu")), draws.torch)
    scores = by_head(reader(batch.contiguous(memory_format=torch.channels_last)))
    losses, shares = [], {}
    for head, words in HEADS.items():
        asked = [labels[head] for _, labels in lessons]
        target = torch.tensor([UNKNOWN if word is None else words.index(word) for word in asked])
        losses.append(torch.nn.functional.cross_entropy(scores[head], target, ignore_index=UNKNOWN))
        known = target != UNKNOWN
        shares[head] = float((scores[head].argmax(1) == target)[known].float().mean())
    return torch.stack(losses).sum(), shares


def run(out: Path, state: Path, plan: Plan = PLAN) -> Reader:
    """Train, resuming from ``state``, and write the averaged weights in float16."""
    from safetensors.torch import save_file

    torch.manual_seed(plan.seed)
    reader = Reader()
    reader.to(memory_format=torch.channels_last)
    train("reader", state, reader, plan, lambda _update, draws: loss_of(reader, draws))
    out.parent.mkdir(parents=True, exist_ok=True)
    reader.to(torch.float16, memory_format=torch.contiguous_format)  # but for BatchNorm's counters
    save_file(reader.state_dict(), out)
    return reader


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    parser.add_argument("--updates", type=int, default=PLAN.updates, help=f"of {BATCH} pictures (default: %(default)s)")
    parser.add_argument("--state", type=Path, default=Path("out/reader"), help="a folder to resume from (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    reader = run(args.out, args.state, replace(PLAN, updates=args.updates))
    size = sum(int(np.prod(parameter.shape)) for parameter in reader.parameters())
    print(f"{args.out}: {size:,} parameters, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
