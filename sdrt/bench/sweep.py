"""Every combination of what was asked for, and which of them makes the most pictures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from sdrt.bench import facts
from sdrt.bench.report import Settings, Variant
from sdrt.bench.rounds import Plan
from sdrt.engine import devices_by_component
from sdrt.pipeline import Pipeline
from sdrt.request import GenerationRequest
from sdrt.schedulers import label, resolve


def plans(
    models: Sequence[str], base: Settings, *, shapes: Sequence[tuple[int, int]] = (), batches: Sequence[int] = (1,),
    threads: Sequence[int | None] = (None,), streams: Sequence[int] = (1,), guidance_scale: float | None = None,
) -> dict[str, Plan]:  # fmt: skip
    """One plan a combination, named by what differs. ``base`` holds the rest.

    shapes in pixels, none for each model's own; guidance_scale None for each model's own.

    Raises what opening a bundle and checking a request raise, for every combination, before anything is measured.
    """
    made: dict[str, Plan] = {}
    for model in models:
        with Pipeline.from_pretrained(model, "null") as pipe:  # loads no weights
            devices_by_component(pipe.bundle, base.device)
            space, config = pipe.bundle.manifest.latents, resolve(base.scheduler, pipe.scheduler_config)
            guidance = pipe.bundle.manifest.guidance_scale if guidance_scale is None else guidance_scale
            sizes = shapes or ((space.default_width, space.default_height),)
            for (width, height), batch, count, parallel in product(sizes, batches, threads, streams):
                settings = replace(
                    base, model=model, width=width, height=height, batch=batch, threads=count, streams=parallel,
                    scheduler=label(config), guidance_scale=guidance,
                )  # fmt: skip
                pipe.check(_request(settings))
                name = ", ".join((
                    Path(model).name or model,
                    *([f"{width}x{height}"] if len(sizes) > 1 else []),
                    *([f"batch {batch}"] if len(batches) > 1 else []),
                    *([f"threads {count or 'default'}"] if len(threads) > 1 else []),
                    *([f"streams {parallel}"] if len(streams) > 1 else []),
                ))  # fmt: skip
                name = _distinct(name, made)
                made[name] = Plan(name, settings, files=(*facts.files(pipe.bundle), *facts.cached(base.cache)))
    return made


def _request(s: Settings) -> GenerationRequest:
    return GenerationRequest(
        s.prompt, negative_prompt=s.negative_prompt, width=s.width, height=s.height, num_inference_steps=s.steps,
        guidance_scale=s.guidance_scale, num_images_per_prompt=s.batch, seed=s.seed, scheduler=s.scheduler,
    )  # fmt: skip


def _distinct(name: str, taken: dict[str, Plan]) -> str:
    """The name, with a number when there is one of that name: two bundles' folders, or a bundle beside itself."""
    number = 2
    candidate = name
    while candidate in taken:
        candidate, number = f"{name} ({number})", number + 1
    return candidate


def best(variants: Sequence[Variant], warmups: int, iterations: int) -> tuple[str, ...]:
    """For each picture size that several variants of sdrt's made: the one of most pictures a second, and its command
    line."""
    by_size: dict[tuple[int, int], list[Variant]] = {}
    for variant in (variant for variant in variants if variant.settings.runner == "sdrt"):
        by_size.setdefault((variant.settings.width, variant.settings.height), []).append(variant)
    lines = []
    for (width, height), several in by_size.items():
        if len(several) > 1:
            winner = max(several, key=lambda variant: variant.images_per_second)
            line = command_line(winner.settings, warmups, iterations)
            lines.append(f"{width}x{height}: {winner.images_per_second:.3g} images/s: {line}")
    return tuple(lines)


def command_line(s: Settings, warmups: int, iterations: int) -> str:
    """The ``sdrt bench`` that measures these settings."""
    words = ["sdrt", "bench", "-m", s.model, "--shape", f"{s.width}x{s.height}", "--batch", s.batch, "--streams",
             s.streams, "--steps", s.steps, "--cfg-scale", s.guidance_scale, "--scheduler", s.scheduler,
             "-p", s.prompt, "-w", warmups, "-i", iterations]  # fmt: skip
    for name in ("engine", "device", "threads", "cache"):
        if (value := getattr(s, name)) is not None:
            words += [f"--{name}", value]
    for name, value in s.options.items():
        words += ["-O", f"{name}={value}"]
    if s.low_memory:
        words.append("--low-memory")
    return shlex.join(map(str, words))
