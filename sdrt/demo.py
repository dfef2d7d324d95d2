"""The shipped model on every engine that is usable here: the same pictures from each, beside diffusers' own.

The bundle ``demo`` holds, in ``showcase.npz``, what diffusers makes of the prompts below in float32 with the same
weights, so that each engine is held against it without torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdrt import bundle as bundles
from sdrt.bench.memory import high_water
from sdrt.bench.process import WORKER, Process, worker_environment
from sdrt.bench.vram import device_memory
from sdrt.bundle import Bundle, Precision
from sdrt.engine import BuildOptions, engine_names, find_engine
from sdrt.errors import BundleError, EngineUnavailable, InputError, SdrtError
from sdrt.metrics import psnr

PROMPTS = (
    "a large red star on a white background",
    "a small blue circle on a yellow background",
    "a large purple heart on a black background",
    "a large green ring left of a small orange square on a white background",
    "a small red heart above a large yellow triangle on a blue background",
    "a small white cross right of a large pink circle on a gray background",
)
STEPS = 20
SEED = 0
"""Of every prompt."""
SHOWCASE = "showcase.npz"
"""``pictures``: uint16[6, H, W, 3], one a prompt, by diffusers in float32; ``WHITE`` for 1."""
WHITE = 16383
"""14 bits: rounding to them alone is 95 dB, more than any two engines need be alike; 16 would take more room."""

Pictures = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One engine at one precision on one device: seconds, bytes and dB. ``problem``: why there are none.

    build: making the engine bundle. load: from the process's start to the loaded pipeline. first: the first picture,
    on top of that. step: the median of the steps of the others. resident: the process's peak; device_memory: what it
    holds at the end; None where the system does not tell. psnr: the least of the pictures'; 95 is all that ``WHITE``
    can tell.
    """

    engine: str
    precision: Precision
    device: str
    build: float | None = None
    load: float | None = None
    first: float | None = None
    step: float | None = None
    resident: int | None = None
    device_memory: int | None = None
    psnr: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Shown:
    """A row, and its pictures (None where there is a problem)."""

    row: Row
    pictures: Pictures | None = None


def reference(bundle: Bundle) -> Pictures:
    """diffusers' pictures of ``PROMPTS``, float32[6, H, W, 3] in [0, 1]. BundleError for a bundle without them."""
    if not any(file.path == SHOWCASE for file in bundle.manifest.files):
        raise BundleError(f"{bundle.root}: not the model that comes with sdrt: no {SHOWCASE}", "install sdrt again")
    pictures = bundles.read_arrays(bundle, SHOWCASE).get("pictures")
    if pictures is None or pictures.dtype != np.uint16 or pictures.ndim != 4 or len(pictures) != len(PROMPTS):
        raise BundleError(f"{bundle.root}: {SHOWCASE} does not hold {len(PROMPTS)} pictures", "install sdrt again")
    return pictures.astype(np.float32) / np.float32(WHITE)


def usable() -> tuple[list[tuple[str, str]], list[str]]:
    """(engine, device) of all that compute here, and why the other engines do not."""
    found: list[tuple[str, str]] = []
    missing: list[str] = []
    for name in engine_names():
        engine = find_engine(name)
        if name == "null":
            continue
        try:
            here = [device.name for device in engine.devices() if device.name != engine.CHECKS_ON]
        except EngineUnavailable as error:
            missing.append(f"{name}: {error.message} → {engine.INSTALL}")
            continue
        found += [(name, device) for device in here]
        if not here:
            missing.append(f"{name}: builds here, and runs elsewhere → sdrt build demo OUT --engine {name}")
    return found, missing


def show(
    bundle: Bundle, targets: Sequence[tuple[str, str]], precisions: Sequence[Precision],
    *, keep: Path | None = None, progress: Callable[[str], object] = lambda _: None,
) -> Iterator[Shown]:  # fmt: skip
    """Build the bundle for each (engine, device) at each precision and make the pictures, each in its own process.

    A row whose engine fails says why; the others go on. ``keep``: where the engine bundles stay, by engine and
    precision and device; None removes them. ``progress`` is called with what is about to be done.
    """
    expected = reference(bundle)
    with tempfile.TemporaryDirectory(prefix="sdrt-demo-") as temporary:
        home = keep if keep is not None else Path(temporary)
        for engine, device in targets:
            for precision in precisions:
                what = Row(engine, precision, device)
                progress(f"{engine} {precision} on {device}: build")
                try:
                    built, seconds = _built(bundle, home, what)
                    progress(f"{engine} {precision} on {device}: pictures")
                    yield _measured(dataclasses.replace(what, build=seconds), built, expected, Path(temporary))
                except SdrtError as error:
                    yield Shown(dataclasses.replace(what, problem=str(error)))


def _built(bundle: Bundle, home: Path, row: Row) -> tuple[Path, float]:
    """The engine bundle, and the seconds that building took."""
    out = home / f"{row.engine}-{row.precision}-{row.device.replace(':', '-')}"
    if out.exists() and bundles.load(out).manifest.provenance.source != bundle.manifest.provenance.source:
        raise InputError(f"{out}: is another model's bundle", "choose another --keep")
    started = time.perf_counter()
    try:
        builder: Any = importlib.import_module("sdrt_engines.build")
        builder.build(bundle.root, out, row.engine, BuildOptions(row.precision), force=out.exists())
    except ModuleNotFoundError as error:
        raise EngineUnavailable(f"building needs {error.name}", "pip install 'sdrt[bench]'") from None
    return out, time.perf_counter() - started


def _measured(row: Row, built: Path, expected: Pictures, scratch: Path) -> Shown:
    height, width = expected.shape[1:3]
    guidance = bundles.load(built).manifest.guidance_scale
    with Process(WORKER, f"{row.engine} {row.precision}", worker_environment()) as process:
        loaded = process.ask({
            "do": "load", "model": str(built), "engine": row.engine, "device": row.device, "threads": None,
            "options": {}, "streams": 1,
        })  # fmt: skip
        made, samples = [], []
        for prompt in PROMPTS:
            file = scratch / "picture.npy"
            samples += process.ask({
                "do": "run", "prompt": prompt, "negative_prompt": None, "width": width, "height": height,
                "num_inference_steps": STEPS, "guidance_scale": guidance, "seed": SEED, "batch": 1,
                "scheduler": None, "save": str(file),
            })["samples"]  # fmt: skip
            made.append(np.load(file)[0])
        resident, on_device = high_water(process.pid), device_memory([process.pid])
    row = dataclasses.replace(
        row, load=process.start + loaded["import"] + loaded["load"], first=samples[0]["total"],
        step=statistics.median(step for sample in samples[1:] for step in sample["steps"]),
        resident=resident, device_memory=on_device,
        psnr=min(psnr(theirs, ours, 1.0) for theirs, ours in zip(expected, made, strict=True)),
    )  # fmt: skip
    return Shown(row, np.stack(made))
