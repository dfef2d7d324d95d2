"""The report: what follows from samples, and the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sdrt.bench import report
from sdrt.bench.environment import Environment, Interference
from sdrt.bench.memory import Usage
from sdrt.bench.report import Load, Memory, Rates, Report, Roof, Sample, Settings
from sdrt.errors import InputError

ENVIRONMENT = Environment("a chip", ("avx2",), 2, 4, 4, 8 * 2**30, 2400.0, "Linux 6", "3.12.0", "0.1.0", "abc+")


def sample(process: int, turn: int, scale: float = 1.0, **rest: float) -> Sample:
    return Sample(
        process, turn, 1.25 * scale, scale * 1.0, (0.3 * scale, 0.1 * scale, 0.2 * scale),
        (0.29 * scale, 0.08 * scale, 0.19 * scale), text_encoder=0.1 * scale, vae_decoder=0.25 * scale, **rest,
    )  # fmt: skip


def made(name: str = "tiny", scale: float = 1.0) -> report.Variant:
    taken = [sample(p, t, scale) for p in range(2) for t in range(4)]
    return report.variant(name, Settings("tiny", 64, 64, batch=2, steps=3), taken, versions={"sdrt": "0.1.0"})


def whole(*variants: report.Variant) -> Report:
    return Report("2026-01-01T00:00:00+00:00", "sdrt bench", ENVIRONMENT, variants)


def test_stages_of_a_sample() -> None:
    """A step is the median over the steps; what no stage holds is ``other``; what is not known is left out."""
    found = sample(0, 0).stages
    assert found == pytest.approx({
        "text_encoder": 0.1, "step": 0.2, "network": 0.19, "host": 0.01, "vae_decoder": 0.25, "other": 0.05, "total": 1.0
    })  # fmt: skip
    assert list(found) == [stage for stage in report.STAGES if stage in found]
    assert Sample(0, 0, 2.0, 1.5).stages == {"total": 1.5}


def test_throughput_is_by_the_wall() -> None:
    variant = made()
    assert variant.images_per_second == pytest.approx(2 / 1.25)
    assert variant.steps_per_second == pytest.approx(1 / 0.2)
    two = report.variant("x", replace(variant.settings, streams=2), variant.samples, versions={})
    assert two.images_per_second == pytest.approx(4 / 1.25)


def test_share_counts_every_call() -> None:
    variant = made()
    assert variant.share("network") == pytest.approx(3 * 0.19)
    assert variant.share("vae_decoder") == pytest.approx(0.25)


def test_values_are_by_process_and_turn_and_streams_are_one_turn() -> None:
    taken = [sample(0, 0), sample(0, 0, 3.0), sample(0, 1), sample(1, 0, 2.0)]
    variant = report.variant("x", Settings("x", 64, 64, streams=2), taken, versions={})
    assert variant.values("total") == [[2.0, 1.0], [2.0]]
    assert variant.values("post") == []


def test_samples_of_an_answer() -> None:
    """Stages that a runner cannot tell are None; what the report does not know is passed over."""
    answer = {"wall": 2.0, "samples": [{"total": 1.0, "steps": [0.5], "network": None, "post": 0.1, "mood": 3}]}
    assert report.samples(answer, 1, 2) == [Sample(1, 2, 2.0, 1.0, (0.5,), post=0.1)]


def test_file_and_back(tmp_path: Path) -> None:
    usage = Usage(10, 5, 3)
    variant = replace(
        made(), load=Load((0.1,), (0.2,), (0.3,), (0.4,), 0.5, 0.6), memory=Memory(usage, usage, usage, {"weights": 2}),
        rates=Rates({"sgemm": 1e11}, 1e10), roof={"unet": Roof({"linear": 5}, 7, 0.1, 0.5)}, sha256="ab",
        precision={"unet": "fp32"}, disk=9, warnings=("mind the gap",),
    )  # fmt: skip
    one = replace(whole(variant), interference=(Interference(1.0, 0.1, None, (0.1, 0.2), None),), best=("x",))
    one.save(tmp_path / "report.json")
    assert report.load(tmp_path / "report.json") == one
    assert json.loads((tmp_path / "report.json").read_text())["format"] == "sdrt-bench"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "is no report"),
        ('{"format": "sdrt"}', "is no report"),
        ('{"format": "sdrt-bench", "version": 9}', "has version 9, this sdrt reads 1"),
        ('{"format": "sdrt-bench", "version": 1}', "missing key 'created'"),
    ],
)
def test_what_is_no_report(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        report.load(path)
    assert "sdrt bench --json" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": []}, r"variants\[0\]: variant tiny has no samples"),
        ({"stages": {}}, r"variants\[0\]: variant tiny has no summary of text_encoder"),
        ({"load": {"start": [1.0], "imports": [1.0], "load": [], "first": [1.0]}}, "need one entry a start each"),
        ({"samples": [{"process": 0, "turn": 0, "wall": 1.0, "total": 0.0}]}, r"samples\[0\]: .* must be positive"),
        ({"samples": [{"process": 0, "turn": 0, "wall": 1.0, "total": 1.0, "steps": [0.1, 0.1], "network": [0.1]}]},
         r"samples\[0\]: .* 1 network times for 2 steps"),
    ],
)  # fmt: skip
def test_a_report_that_was_edited(tmp_path: Path, change: dict[str, object], message: str) -> None:
    value = whole(made()).json()
    value["variants"][0] |= change
    path = tmp_path / "report.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        report.load(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        report.load(tmp_path / "none.json")


def test_schema_is_documented() -> None:
    """docs/bench.md names every key of the file, and no other."""
    import re
    from dataclasses import fields

    from sdrt.bench import compare, environment, memory, statistics

    text = (Path(__file__).resolve().parents[3] / "docs" / "bench.md").read_text()
    for kind in (
        Report, report.Variant, Settings, Sample, statistics.Summary, Load, Memory, memory.Usage, Rates, Roof,
        compare.Comparison, statistics.Ratio, environment.Environment, Interference,
    ):  # fmt: skip
        section = re.search(rf"^### {kind.__name__}$(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
        assert section is not None, kind.__name__
        documented = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
        assert documented == [f.name for f in fields(kind)], kind.__name__
