"""Reports of ``sdrt bench --json``: read, shown, written as CSV, and compared with themselves."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from sdrt.bench import report, show
from sdrt.bench.compare import compare_reports
from sdrt.bench.environment import Environment, Interference
from sdrt.bench.memory import Usage
from sdrt.bench.report import Load, Memory, Rates, Report, Roof, Sample, Settings
from tests.fuzz import mutate as mutators


def made() -> Report:
    """A small one, with every kind of entry."""
    usage = Usage(3, 2, 1)
    samples = [
        Sample(process, turn, 1.2, 1.0, (0.3, 0.3), (0.2, 0.2), 0.01, 0.1, 0.05, 0.1, 0.01)
        for process in range(2) for turn in range(4)
    ]  # fmt: skip
    variant = report.variant(
        "tiny", Settings("tiny", 64, 64, options={"arena": "false"}), samples, versions={"sdrt": "0.1.0"},
        load=Load((0.1,) * 2, (0.1,) * 2, (0.1,) * 2, (0.1,) * 2, 0.2, 0.2), memory=Memory(usage, usage, usage),
        rates=Rates({"sgemm": 1e11}, 1e10), roof={"unet": Roof({"linear": 5}, 7, 0.1, 0.5)}, sha256="ab",
        precision={"unet": "fp32"}, disk=9, warnings=("w",),
    )  # fmt: skip
    environment = Environment(
        "a chip", ("avx2",), 2, 4, 4, 2**33, 2400.0, "Linux", "3.12", "0.1.0", "abc", {"null": {"null": "x"}}, {"v": "d"}
    )  # fmt: skip
    noise = Interference(1.0, 0.1, 0.0, (0.1, 0.2), (1.0, 2.0))
    whole = Report("2026-01-01", "sdrt bench", environment, (variant,), (), (noise,), ("b",), {"x": "y"}, ("w",))
    comparisons, _ = compare_reports(whole, whole)
    return Report(**{**vars(whole), "comparisons": tuple(comparisons)})


def seeds() -> list[bytes]:
    return [json.dumps(made().json()).encode()]


def monsters() -> list[tuple[str, bytes]]:
    good = made().json()
    (variant,) = good["variants"]
    (sample, *_) = variant["samples"]

    def one(**changes: object) -> bytes:
        return json.dumps({**good, "variants": [{**variant, **changes}]}).encode()

    return [
        ("no samples", one(samples=[])),
        ("many samples", one(samples=[sample] * 20_000)),
        ("many processes", one(samples=[{**sample, "process": i} for i in range(5_000)])),
        ("no stages", one(stages={})),
        ("unknown stages", one(stages={"mood": variant["stages"]["total"]})),
        ("many steps", one(samples=[{**sample, "steps": [0.1] * 10**6, "network": [0.05] * 10**6}])),
        ("times of nothing", one(samples=[{**sample, "total": 0.0, "wall": 0.0, "steps": [], "network": []}])),
        ("many variants", json.dumps({**good, "variants": [variant] * 300}).encode()),
    ]


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    return mutators.json_bytes(rng, seeds)


def feed(data: bytes, folder: Path) -> None:
    path = folder / "report.json"
    path.write_bytes(data)
    got = report.load(path)
    assert show.text(got)
    assert show.table(got)
    comparisons, _ = compare_reports(got, got)
    for comparison in comparisons:
        assert show.comparison(comparison)
