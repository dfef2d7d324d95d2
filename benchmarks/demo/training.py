"""What the three stages share: a loop that can be stopped at any moment and goes on where it was.

Everything random at update n comes from (seed, stage, n) alone, so a run that was stopped and resumed sees what one
that never stopped sees. The learning rate rises, stays, and falls over the last part: a run can be made longer
without having been another one until then.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Plan:
    """How a stage is trained.

    ``updates`` in all, ``rate``: AdamW's learning rate while it stays, reached after ``warmup`` updates and left for
    a straight line to zero over the last ``decay`` part. ``ema``: the averaged weights' decay an update.
    """

    updates: int
    rate: float
    warmup: int = 100
    decay: float = 0.3
    ema: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0

    def rate_at(self, update: int) -> float:
        """The learning rate of an update."""
        falling = (self.updates - update) / max(1.0, self.decay * self.updates)
        return self.rate * min(1.0, (update + 1) / self.warmup, max(0.0, falling))


@dataclass(frozen=True)
class Draws:
    """All the chance of one update."""

    python: random.Random
    torch: torch.Generator


def draws(stage: str, seed: int, update: int) -> Draws:
    """The random numbers of one update of a stage: the same whenever it is run."""
    python = random.Random(f"{stage}/{seed}/{update}")
    return Draws(python, torch.Generator().manual_seed(python.getrandbits(63)))


def train(
    stage: str,
    folder: Path,
    model: torch.nn.Module,
    plan: Plan,
    loss_of: Callable[[int, Draws], tuple[torch.Tensor, dict[str, float]]],
    *,
    rates: dict[str, float] | None = None,
    save_every: float = 120.0,
) -> torch.nn.Module:
    """Train ``model`` in place, resuming from ``folder/<stage>.pt`` where that is; return it with averaged weights.

    Parameters
    ----------
    loss_of
        The loss of update n, and figures for the log. It reads ``model`` as it is.
    rates
        What the learning rate of parameters whose names begin with a key is multiplied by.
    save_every
        Seconds between two savings. A file is replaced whole, so that stopping loses at most these seconds.
    """  # fmt: skip
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = next((f for start, f in (rates or {}).items() if name.startswith(start)), 1.0)
        groups.setdefault(factor, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": group, "factor": factor} for factor, group in groups.items()],
        lr=plan.rate, weight_decay=plan.weight_decay, betas=(0.9, 0.99), fused=True,
    )  # fmt: skip
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    state_file, log_file = folder / f"{stage}.pt", folder / f"{stage}.jsonl"
    start, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = {name: value.to(average[name].device) for name, value in state["average"].items()}
        start, spent = state["update"], state["seconds"]
        if start > plan.updates:
            raise ValueError(f"{state_file}: has had {start} updates, expected at most {plan.updates}: remove it")

    def save(update: int) -> None:
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "update": update,
            "seconds": spent + time.monotonic() - begun,
        }  # fmt: skip
        part = state_file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, state_file)

    folder.mkdir(parents=True, exist_ok=True)
    begun = saved = time.monotonic()
    recent: list[dict[str, float]] = []
    model.train()
    bar = tqdm(range(start, plan.updates), initial=start, total=plan.updates, desc=stage, unit="update", mininterval=5)
    for update in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(update) * group["factor"]
        loss, figures = loss_of(update, draws(stage, plan.seed, update))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        decay = min(plan.ema, (1 + update) / (10 + update))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    average[name].lerp_(value, 1 - decay)
        recent.append({"loss": loss.item(), "norm": float(norm), **figures})
        if (update + 1) % 50 == 0:
            line = {key: float(np.mean([entry[key] for entry in recent])) for key in recent[0]}
            line |= {"update": update + 1, "seconds": spent + time.monotonic() - begun, "rate": plan.rate_at(update)}
            with log_file.open("a", encoding="utf-8") as log:
                log.write(json.dumps({key: float(f"{value:.5g}") for key, value in line.items()}) + "\n")
            recent = []
        if time.monotonic() - saved > save_every:
            save(update + 1)
            saved = time.monotonic()
    if start < plan.updates:
        save(plan.updates)
    model.load_state_dict(average)
    return model.eval()


def device_of(name: str | None) -> torch.device:
    """``cuda`` where there is one and nothing else is asked for, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def pixels(pictures: list[np.ndarray[Any, Any]], device: torch.device) -> torch.Tensor:
    """Pictures ``uint8[H, W, 3]`` as ``float32[B, 3, H, W]`` in [-1, 1]."""
    batch = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)
