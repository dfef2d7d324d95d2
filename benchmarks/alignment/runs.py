"""What is evaluated: captions of scenes kept from training, and every setting that was asked for, on all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from PIL import Image

from benchmarks.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    random_scene,
)
from sdrt import Pipeline
from sdrt import bundle as bundles
from sdrt.engine import default_engine, find_engine
from sdrt.errors import InputError
from sdrt.request import Arguments, GenerationRequest

Progress = Callable[[int], object]
"""Told how many pictures were made since the last call."""


@dataclass(frozen=True)
class Setting:
    """One way to make pictures; None leaves a choice to the bundle, or to sdrt."""

    name: str
    model: str
    engine: str | None = None
    device: str | None = None
    scheduler: str | None = None
    steps: int = 20
    guidance: float | None = None
    size: tuple[int, int] | None = None

    def request(self, prompts: Sequence[str], seed: int, negative: str | None = None) -> GenerationRequest:
        """That of one batch, whose first picture has this seed."""
        arguments: Arguments = {"num_inference_steps": self.steps, "scheduler": self.scheduler, "seed": seed}
        arguments["negative_prompt"] = negative
        if self.guidance is not None:
            arguments["guidance_scale"] = self.guidance
        if self.size is not None:
            arguments["width"], arguments["height"] = self.size
        return GenerationRequest.make(prompts, **arguments)

    def open(self) -> Pipeline:
        """The bundle, loaded; where none is named and the engine does not run here, on what it checks its builds on."""
        held = bundles.load(self.model)
        engine = self.engine or default_engine(held.component(held.manifest.denoiser.component))
        return Pipeline.from_pretrained(self.model, self.engine, self.device or find_engine(engine).CHECKS_ON)

    def check(self, batch: int, seed: int) -> None:
        """Raise what opening the bundle and a batch's request raise, and an unusable engine; loads no weights."""
        if self.engine is not None:
            find_engine(self.engine).devices()
        with Pipeline.from_pretrained(self.model, "null") as pipe:
            pipe.check(self.request(["a"] * batch, seed))


def settings(
    models: Sequence[str], engines: Sequence[str | None], schedulers: Sequence[str | None], steps: Sequence[int],
    guidances: Sequence[float | None], *, devices: Sequence[str | None] = (None,), size: tuple[int, int] | None = None,
) -> list[Setting]:  # fmt: skip
    """Every combination, named by what differs. devices: one for all models, or each one's. InputError."""
    if len(devices) not in (1, len(models)):
        raise InputError(f"--device: {len(devices)} for {len(models)} models", "one for all, or one for each")
    made: list[Setting] = []
    placed = list(zip(models, devices if len(devices) > 1 else [*devices] * len(models), strict=True))
    for (model, device), engine, scheduler, count, guidance in product(placed, engines, schedulers, steps, guidances):
        name = ", ".join((
            Path(model).name or model,
            *([engine or "own engine"] if len(engines) > 1 else []),
            *([scheduler or "own scheduler"] if len(schedulers) > 1 else []),
            *([f"{count} steps"] if len(steps) > 1 else []),
            *([f"guidance {guidance:g}"] if len(guidances) > 1 and guidance is not None else []),
        ))  # fmt: skip
        same = sum(setting.name.split(" #")[0] == name for setting in made)
        name = f"{name} #{same + 1}" if same else name
        made.append(Setting(name, model, engine, device, scheduler, count, guidance, size))
    return made


def scenes(count: int, seed: int) -> list[Scene]:
    """Scenes kept from training, of one and of two things in turn: always the same for a seed.

    Of one thing there are few (``SINGLES``): none comes again before all have come.
    """
    rng = random.Random(f"alignment/{seed}")
    singles = _rounds(rng)
    return [next(singles) if number % 2 == 0 else random_scene(rng, things=2, held_out=True) for number in range(count)]


SINGLES = tuple(
    scene
    for shape, colour, size, background in product(SHAPES, COLOURS, SIZES, BACKGROUNDS)
    if colour != background and is_held_out(scene := Scene((Thing(shape, colour, size),), background))
)
"""All scenes of one thing that are kept from training."""


def _rounds(rng: random.Random) -> Iterator[Scene]:
    while True:
        yield from rng.sample(SINGLES, len(SINGLES))


def generate(
    pipe: Pipeline, setting: Setting, captions: Sequence[str], *, seed: int, batch: int, progress: Progress,
    negative: str | None = None,
) -> list[Image.Image]:  # fmt: skip
    """One picture a caption, the i-th from the noise of ``seed + i`` whatever the batch."""
    pictures: list[Image.Image] = []
    for start in range(0, len(captions), batch):
        request = setting.request(captions[start : start + batch], seed + start, negative)
        made = pipe.generate(request).images
        pictures += made
        progress(len(made))
    return pictures
