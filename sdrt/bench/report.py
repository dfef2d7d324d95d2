"""What a measurement found: one schema for sdrt, its peers, and every device. docs/bench.md is the normative text.

Seconds and bytes throughout, unless a field says otherwise.
"""

from __future__ import annotations

import functools
import json
import statistics as python_statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sdrt import strict_json
from sdrt.bench.environment import Environment, Interference
from sdrt.bench.memory import Usage
from sdrt.bench.statistics import Ratio, Summary, summarize
from sdrt.errors import BundleError, InputError, quoted
from sdrt.staging import replacing

FORMAT = "sdrt-bench"
VERSION = 1

STAGES = (
    "tokenize", "text_encoder", "vae_encoder", "step", "network", "host", "vae_decoder", "post", "load", "other",
    "total",
)  # fmt: skip
"""Stages of one batch of pictures, in their order. ``step`` is one step of the loop: ``network`` (the denoiser's call)
and ``host`` (the rest of it), for each of the three the median over a picture's steps. ``load`` is loading within the
batch. ``other`` is what of ``total`` no stage holds: drawing noise, and the time between steps."""


@dataclass(frozen=True)
class Settings:
    """What was run. Sizes in pixels; ``batch`` counts pictures; ``threads``: None leaves it to the engine.

    runner: ``sdrt``, or a peer's name. device: one for all, or by component (``unet=gpu,vae_decoder=cpu``). streams:
    batches at the same time. cache, low_memory: as in ``Pipeline.from_pretrained``.
    """

    model: str
    width: int
    height: int
    runner: str = "sdrt"
    engine: str | None = None
    device: str | None = None
    threads: int | None = None
    streams: int = 1
    batch: int = 1
    steps: int = 20
    guidance_scale: float = 7.5
    scheduler: str | None = None
    prompt: str = ""
    negative_prompt: str | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: str | None = None
    low_memory: bool = False


@dataclass(frozen=True)
class Sample:
    """One batch of pictures of one stream. Seconds; None for a stage that the runner cannot tell, or that was not run.

    process, turn: which start of the process, and which of its turns. wall: until all streams of the turn were done.
    steps, network: one entry a network call; network is empty where the runner cannot tell. BundleError when both are
    known and do not match.
    """

    process: int
    turn: int
    wall: float
    total: float
    steps: tuple[float, ...] = ()
    network: tuple[float, ...] = ()
    tokenize: float | None = None
    text_encoder: float | None = None
    vae_encoder: float | None = None
    vae_decoder: float | None = None
    post: float | None = None
    load: float | None = None

    def __post_init__(self) -> None:
        if not self.total > 0 or not self.wall > 0:
            raise BundleError(f"a sample took {self.total} s, its turn {self.wall} s: both must be positive")
        if len(self.network) not in (0, len(self.steps)):
            raise BundleError(f"a sample has {len(self.network)} network times for {len(self.steps)} steps")

    @functools.cached_property
    def stages(self) -> dict[str, float]:
        """Seconds by stage (see ``STAGES``), for those that are known."""
        found: dict[str, float | None] = {
            "tokenize": self.tokenize, "text_encoder": self.text_encoder, "vae_encoder": self.vae_encoder or None,
            "vae_decoder": self.vae_decoder or None, "post": self.post or None,
            "load": self.load or None, "total": self.total,
        }  # fmt: skip
        parts = [seconds for name, seconds in found.items() if name != "total" and seconds is not None]
        if self.steps:
            found["step"] = python_statistics.median(self.steps)
            found["other"] = self.total - sum(self.steps) - sum(parts)
        if self.network:
            found["network"] = python_statistics.median(self.network)
            host = [step - network for step, network in zip(self.steps, self.network, strict=True)]
            found["host"] = python_statistics.median(host)
        return {name: seconds for name in STAGES if (seconds := found.get(name)) is not None}


@dataclass(frozen=True)
class Load:
    """Seconds, one entry a start of the process; cold: with the bundle's files dropped from the page cache first.

    start: process start → interpreter ready. imports: libraries imported. load: model loaded (of sdrt: its engine's
    library imported, too). first: the first batch after loading. None where there was no cold start.
    """

    start: tuple[float, ...]
    imports: tuple[float, ...]
    load: tuple[float, ...]
    first: tuple[float, ...]
    cold_load: float | None = None
    cold_first: float | None = None

    def __post_init__(self) -> None:
        if len({len(each) for each in (self.start, self.imports, self.load, self.first)}) > 1 or not self.load:
            raise BundleError("start, imports, load and first need one entry a start each")


@dataclass(frozen=True)
class Memory:
    """Bytes, process and its children, in a run apart from timing.

    loaded: after loading; steady: between batches; peak: the largest sum seen, from the start on. held: between
    batches, on devices, by ``weights``, ``activations``, ``tensors``, as the engines tell; empty where they do not.
    """

    loaded: Usage
    steady: Usage
    peak: Usage
    held: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Roof:
    """What one call of a component computes and moves at least, beside what the chip can do.

    macs: multiply-accumulates by kind, counted from the graph. bytes: weights, and what its matrix products and
    convolutions read and write. floor: seconds that these take at the machine's best measured rates. share: floor over
    the measured median; None where the component was not timed.
    """

    macs: Mapping[str, int]
    bytes: int
    floor: float
    share: float | None = None


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do: FLOP/s by kind of work (a multiply-accumulate is two), bytes/s.

    ``sgemm``: float32 matrix products of numpy's BLAS; ``matmul`` and ``convolution``: through the engine, on the
    device, in the denoiser's precision.
    """

    flops: Mapping[str, float]
    bandwidth: float


@dataclass(frozen=True)
class Variant:
    """One thing that was measured. ``sha256`` is the manifest's, which holds the hashes of all other files.

    precision: by component. disk: bytes of the files of the components that are run. BundleError without samples, or
    without the time of the whole.
    """

    name: str
    settings: Settings
    versions: Mapping[str, str]
    stages: Mapping[str, Summary]
    samples: tuple[Sample, ...]
    images_per_second: float
    steps_per_second: float | None
    load: Load | None = None
    memory: Memory | None = None
    rates: Rates | None = None
    roof: Mapping[str, Roof] = field(default_factory=dict)
    sha256: str | None = None
    precision: Mapping[str, str] = field(default_factory=dict)
    disk: int | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples:
            raise BundleError(f"variant {self.name} has no samples")
        _check_stages(self.stages)
        if missing := [stage for stage in self.samples[0].stages if stage not in self.stages]:
            raise BundleError(f"variant {self.name} has no summary of {missing[0]}")

    def share(self, stage: str) -> float:
        """A known stage's part of the whole, with all its calls."""
        calls = len(self.samples[0].steps) if stage in ("step", "network", "host") else 1
        return calls * self.stages[stage].median / self.stages["total"].median

    def values(self, stage: str) -> list[list[float]]:
        """Seconds of a stage: by process, by turn (the mean of its streams)."""
        processes: dict[int, dict[int, list[float]]] = {}
        for sample in self.samples:
            seconds = sample.stages.get(stage)
            if seconds is not None:
                processes.setdefault(sample.process, {}).setdefault(sample.turn, []).append(seconds)
        return [[python_statistics.fmean(streams) for streams in turns.values()] for turns in processes.values()]


@dataclass(frozen=True)
class Comparison:
    """Times of ``other`` over those of ``base``, by stage. All intervals hold together with the confidence stated.

    paired: the two were measured in turn. A comparison of two reports is not: what changed on the machine in between
    is in it.
    """

    base: str
    other: str
    paired: bool
    ratios: Mapping[str, Ratio]

    def __post_init__(self) -> None:
        _check_stages(self.ratios)


@dataclass(frozen=True)
class Report:
    """A whole measurement. ``best``: for each picture size the command that makes the most pictures a second.
    ``failures``: what could not be measured, by name, and why."""

    created: str
    command: str
    environment: Environment
    variants: tuple[Variant, ...]
    comparisons: tuple[Comparison, ...] = ()
    interference: tuple[Interference, ...] = ()
    best: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise BundleError("two variants have one name")

    def json(self) -> dict[str, Any]:
        """JSON values, with ``format`` and ``version`` first."""
        return {"format": FORMAT, "version": VERSION, **strict_json.encode(self)}

    def save(self, path: str | Path) -> None:
        """Write the JSON; the file is whole or not there. OSError."""
        with replacing(Path(path)) as temporary:
            temporary.write((json.dumps(self.json(), indent=1, allow_nan=False) + "\n").encode())


def _check_stages(stages: Iterable[str]) -> None:
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise BundleError(f"{quoted(unknown[0])} is no stage; stages: {', '.join(STAGES)}")


def load(path: str | Path) -> Report:
    """Read a report. InputError, which names the key, for a file that is none."""
    again = "give a file that sdrt bench --json wrote"
    try:
        value = strict_json.read(Path(path))
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise InputError(f'{path}: is no report: "format" must be "{FORMAT}"', again)
        if value.get("version") != VERSION:
            raise InputError(f"{path}: has version {value.get('version')!r}, this sdrt reads {VERSION}", again)
        rest = {key: item for key, item in value.items() if key not in ("format", "version")}
        return strict_json.decode(Report, rest, str(path))
    except BundleError as error:
        raise InputError(error.message, again) from None


def samples(answer: Mapping[str, Any], process: int, turn: int) -> list[Sample]:
    """The samples of one answer to ``run`` (see ``sdrt.bench.serve``)."""
    made = []
    for sample in answer["samples"]:
        known = {name: sample[name] for name in _SAMPLED if sample.get(name) is not None}
        known |= {name: tuple(known[name]) for name in ("steps", "network") if name in known}
        made.append(Sample(process=process, turn=turn, wall=answer["wall"], **known))
    return made


_SAMPLED = [f.name for f in fields(Sample) if f.name not in ("process", "turn", "wall")]


def variant(name: str, settings: Settings, taken: Sequence[Sample], **rest: Any) -> Variant:
    """A variant from its samples: summaries by stage, and throughput."""
    by_stage: dict[str, list[float]] = {}
    for sample in taken:
        for stage, seconds in sample.stages.items():
            by_stage.setdefault(stage, []).append(seconds)
    stages = {stage: summarize(by_stage[stage]) for stage in STAGES if stage in by_stage}
    wall = python_statistics.median(sample.wall for sample in taken)
    step = stages.get("step")
    return Variant(
        name=name,
        settings=settings,
        stages=stages,
        samples=tuple(taken),
        images_per_second=settings.batch * settings.streams / wall,
        steps_per_second=settings.streams / step.median if step is not None else None,
        **rest,
    )
