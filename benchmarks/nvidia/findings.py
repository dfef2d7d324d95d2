"""What was found on one card: one file, from which the tables are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdrt import strict_json
from sdrt.bench.statistics import Ratio, Summary
from sdrt.errors import BundleError, InputError
from sdrt.staging import replacing

FORMAT = "sdrt-nvidia"
VERSION = 1
EQUAL = 200.0
"""Decibels that stand for the same picture, bit for bit: infinity is no JSON."""


@dataclass(frozen=True)
class Build:
    """One of ours, made ready. seconds, peak_rss: of ``sdrt build`` as a process; plan: bytes of its artifacts.

    target: what it was built for; failure: why there is none.
    """

    name: str
    engine: str
    precision: str
    target: str = ""
    seconds: float = 0.0
    plan: int = 0
    peak_rss: int = 0
    version: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Row:
    """One way to make pictures. Seconds and bytes.

    ours: made by sdrt. vram_by: who told ``vram``, the peak. held: of it, by kind, as the engine tells. psnr: the worst
    of the batch's pictures. floor: of a step. over: by name, the whole's time there over that here, of pairs taken in
    turn. failure: why there are no figures.
    """

    name: str
    ours: bool
    batch: int
    stages: Mapping[str, Summary] = field(default_factory=dict)
    images_per_second: float | None = None
    load: float | None = None
    vram: int | None = None
    vram_by: str = ""
    held: Mapping[str, int] = field(default_factory=dict)
    psnr: float | None = None
    floor: float | None = None
    over: Mapping[str, Ratio] = field(default_factory=dict)
    failure: str = ""

    def median(self, stage: str) -> float | None:
        """Seconds of a stage; None where it is not known."""
        return self.stages[stage].median if stage in self.stages else None


@dataclass(frozen=True)
class Aligned:
    """The demo model's pictures, read: shares of wholly right captions, fp32's and this one's, and the difference.

    In points of a percent, with the bounds of its interval of 95 %.
    """

    name: str
    captions: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Findings:
    """All of one run. ``flops``: the card's peak, where it is known. ``loop``: a step with an engine that computes
    nothing. paired: all stayed loaded, and took turns batch by batch. turns: of each of ``starts`` processes."""

    created: str
    command: str
    device: str
    about: str
    sdrt: str
    commit: str | None
    width: int
    height: int
    steps: int
    scheduler: str
    guidance_scale: float
    starts: int
    turns: int
    paired: bool
    rows: tuple[Row, ...]
    builds: tuple[Build, ...] = ()
    flops: float | None = None
    loop: Summary | None = None
    aligned: tuple[Aligned, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write the JSON; the file is whole or not there. OSError."""
        value = {"format": FORMAT, "version": VERSION, **strict_json.encode(self)}
        with replacing(path) as temporary:
            temporary.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def load(path: Path) -> Findings:
    """Read them. InputError for a file that is none."""
    again = "give the report.json that python -m benchmarks.nvidia wrote"
    try:
        value = strict_json.read(path)
        if not isinstance(value, dict) or (value.get("format"), value.get("version")) != (FORMAT, VERSION):
            raise InputError(f'{path}: is no report of this benchmark: "format" must be "{FORMAT}"', again)
        rest = {key: item for key, item in value.items() if key not in ("format", "version")}
        return strict_json.decode(Findings, rest, str(path))
    except BundleError as error:
        raise InputError(error.message, again) from None
