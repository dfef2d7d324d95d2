"""What is measured: pictures and memory of each alone, then time of all in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.nvidia.findings import EQUAL, Row
from benchmarks.nvidia.prepare import Ours
from benchmarks.peers.make_env import python as interpreter
from benchmarks.peers.peers import HERE
from sdrt.bench import alternate
from sdrt.bench.compare import compared
from sdrt.bench.memory import INTERVAL, MemorySampler
from sdrt.bench.report import Report, Settings, Variant
from sdrt.bench.rounds import Plan, Progress
from sdrt.bench.statistics import Summary
from sdrt.bundle import Bundle
from sdrt.engine import find_engine
from sdrt.errors import SdrtError
from sdrt.metrics import psnr

SCHEDULER = "DPM++ 2M"
GUIDANCE = 7.5
REFERENCE = "diffusers fp32"
EAGER = "diffusers eager"
WARMUPS = 3
"""Batches before the first that counts. torch.compile's CUDA graphs take as many for what runs once a picture: it is
compiled in the first, recorded in the second, replayed from the third on."""
ROOM = 0.9
"""Share of a card's memory that all processes together may take, for them to stay loaded between their turns."""


@dataclass(frozen=True)
class Ask:
    """What every one is asked for."""

    device: str
    width: int
    height: int
    steps: int
    threads: int | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether it is an NVIDIA GPU."""
        return self.device != "cpu"

    def settings(self, batch: int) -> Settings:
        """All but what is loaded, and how."""
        return Settings(
            model="", width=self.width, height=self.height, batch=batch, steps=self.steps, scheduler=SCHEDULER,
            guidance_scale=GUIDANCE, seed=1, device=self.device, threads=self.threads,
            prompt="a lighthouse on a cliff at dawn, oil painting", negative_prompt="blurry",
        )  # fmt: skip


def plan_of_ours(ours: Ours, out: Path, ask: Ask, batch: int) -> Plan:
    """A bundle that was built, in the process that serves sdrt."""
    cache = str(out / "cache" / ours.engine) if find_engine(ours.engine).CACHES else None
    settings = dataclasses.replace(
        ask.settings(batch), model=str(ours.at(out)), options=dict(ours.options), cache=cache
    )  # fmt: skip
    return Plan(ours.name, settings)


def plan_of_diffusers(
    name: str, options: Mapping[str, Any], checkpoint: Path, out: Path, ask: Ask, batch: int, peers: Path | None
) -> Plan:
    """diffusers, from the checkpoint. peers: its environment; None for this one. What it compiles is kept in OUT."""
    settings = dataclasses.replace(ask.settings(batch), model=str(checkpoint), runner=name, options=dict(options))
    python = os.fspath(interpreter(peers.absolute())) if peers is not None else sys.executable
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment = inherited | {
        "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str((out / "cache" / "inductor").absolute())
    }  # fmt: skip
    return Plan(name, settings, (python, str(HERE / "runner_diffusers.py")), environment)


class CardMemory:
    """The most that is taken of a card while it watches, by whomever, over what was taken before. Bytes.

    with CardMemory(used) as watch:
        ...
    watch.peak
    """

    def __init__(self, used: Callable[[], int]) -> None:
        self._used, self._done = used, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = used()
        self._most = self._before

    @property
    def peak(self) -> int:
        """Bytes beyond what was taken at the beginning."""
        return self._most - self._before

    def __enter__(self) -> CardMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            with contextlib.suppress(SdrtError):
                self._most = max(self._most, self._used())


def used_on(index: int) -> Callable[[], int]:
    """``cudaMemGetInfo`` of one card: what is taken. To be called in any thread."""
    from sdrt_engines import cuda

    def used() -> int:
        cuda.use(index)
        free, total = cuda.memory()
        return total - free

    return used


@dataclass(frozen=True)
class Alone:
    """Of one picture, or batch, made with nothing else on the card. pictures: f32[B,H,W,3]; held: as in ``Row``."""

    pictures: np.ndarray[Any, Any]
    vram: int | None
    vram_by: str
    versions: Mapping[str, str]
    held: Mapping[str, int]


def alone(plan: Plan, used: Callable[[], int] | None, batches: int = 1) -> Alone:
    """Load, make so many batches, and watch the card's memory. SdrtError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pictures.npy"
        with contextlib.ExitStack() as stack:
            card = stack.enter_context(CardMemory(used)) if used is not None else None
            process = stack.enter_context(plan.start())
            sampler = stack.enter_context(MemorySampler(process.pid))
            versions = process.ask(plan.loading())["versions"]
            answer = process.ask(plan.running(str(file)))
            for _ in range(batches - 1):
                answer = process.ask(plan.running())
        pictures = np.load(file)
    if not np.isfinite(pictures).all():
        raise SdrtError(f"{plan.name}: its pictures have values that are not finite")
    vram, by = (sampler.peak().device, "NVML") if card is not None else (None, "")
    if vram is None and card is not None:
        vram, by = card.peak, "cudaMemGetInfo"
    return Alone(pictures, vram, by, versions, answer.get("held", {}))


def decibels(reference: np.ndarray[Any, Any] | None, pictures: np.ndarray[Any, Any]) -> float | None:
    """PSNR of the worst of a batch; None where there is nothing to hold it against."""
    if reference is None or reference.shape != pictures.shape:
        return None
    return min(EQUAL, *(psnr(one, other, 1.0) for one, other in zip(reference, pictures, strict=True)))


@dataclass(frozen=True)
class Measured:
    """Of one batch size: rows in the order of the plans, the raw report (None when all failed), and what was run."""

    rows: tuple[Row, ...]
    report: Report | None
    versions: Mapping[str, str]
    warnings: tuple[str, ...]


def measure(
    plans: Sequence[Plan], ours: set[str], reference: Plan, *, floor: float | None,
    used: Callable[[], int] | None, room: int | None, warmups: int, starts: int, turns: int, progress: Progress,
) -> Measured:  # fmt: skip
    """All plans, of one batch size. A plan that fails has a row that says why. room: bytes of the card's memory."""
    batch = reference.settings.batch
    warnings: list[str] = []
    versions: dict[str, str] = {}
    progress(f"{reference.name}: pictures")
    expected = None
    try:
        expected = alone(reference, None).pictures
    except SdrtError as error:
        warnings.append(f"no PSNR at batch {batch}, as there is no reference: {error.message}")
    made: dict[str, Alone] = {}
    failures: dict[str, str] = {}
    for plan in plans:
        progress(f"{plan.name}: pictures and memory")
        try:
            made[plan.name] = alone(plan, used, warmups)
            versions |= made[plan.name].versions
        except SdrtError as error:
            failures[plan.name] = error.message
    left = {plan.name: plan for plan in plans if plan.name in made}
    peaks = [one.vram for one in made.values() if one.vram is not None]
    resident = len(left) > 1 and (room is None or (len(peaks) == len(left) and sum(peaks) <= ROOM * room))
    report = None
    if left:
        try:
            report = alternate(
                left, warmups=warmups, iterations=turns, processes=starts, memory=False, machine=False,
                resident=resident, progress=progress,
            )  # fmt: skip
            failures |= report.failures
            warnings += report.warnings
        except SdrtError as error:
            failures |= dict.fromkeys(left, error.message)
    variants = {variant.name: variant for variant in report.variants} if report is not None else {}
    rows = tuple(
        _row(plan, plan.name in ours, variants, made.get(plan.name), expected, floor, failures, paired=resident)
        for plan in plans
    )
    return Measured(rows, report, versions, tuple(warnings))


def _row(
    plan: Plan, ours: bool, variants: Mapping[str, Variant], made: Alone | None,
    expected: np.ndarray[Any, Any] | None, floor: float | None, failures: Mapping[str, str], *, paired: bool,
) -> Row:  # fmt: skip
    row = Row(plan.name, ours, plan.settings.batch, floor=floor)
    if made is not None:
        row = dataclasses.replace(
            row, vram=made.vram, vram_by=made.vram_by, held=made.held, psnr=decibels(expected, made.pictures)
        )  # fmt: skip
    variant = variants.get(plan.name)
    if variant is None:
        return dataclasses.replace(row, failure=failures.get(plan.name, "it was not measured"))
    others = [v for v in variants.values() if ours and v.settings.runner != "sdrt"]
    ratios = {other.name: compared(variant, other, paired=paired).ratios.get("total") for other in others}
    assert variant.load is not None
    return dataclasses.replace(
        row, stages=variant.stages, images_per_second=variant.images_per_second,
        load=float(np.median(variant.load.load)),
        over={name: ratio for name, ratio in ratios.items() if ratio is not None},
    )  # fmt: skip


def loop(onnx: Bundle, ask: Ask, turns: int, progress: Progress) -> Summary:
    """A step of our loop around an engine that computes nothing: seconds."""
    settings = dataclasses.replace(ask.settings(1), model=str(onnx.root), engine="null", device=None, threads=None)
    plan = Plan("the loop alone", settings)
    report = alternate(
        {plan.name: plan}, warmups=1, iterations=turns, memory=False, machine=False, progress=progress
    )  # fmt: skip
    return report.variants[0].stages["step"]


def errors(rows: Sequence[Row]) -> Iterator[str]:
    """A line a row that failed."""
    for row in rows:
        if row.failure:
            yield f"{row.name}, batch {row.batch}: {row.failure}"
